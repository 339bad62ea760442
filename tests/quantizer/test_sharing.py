import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fheconv.quantizer.components import connected


@given(st.integers(1, 12), st.data())
def test_labels_are_equal_exactly_where_pairs_lead_from_one_to_the_other(count, data):
    numbers = st.integers(0, count - 1)
    pairs = data.draw(st.lists(st.tuples(numbers, numbers), max_size=15))
    reached = np.eye(count, dtype=bool)
    for a, b in pairs:
        reached[a, b] = reached[b, a] = True
    for middle in range(count):
        reached |= reached[:, middle, None] & reached[middle]
    labels = connected(np.array(pairs, np.int64).reshape(-1, 2).T, count)
    np.testing.assert_array_equal(labels[:, None] == labels, reached)
