import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fheconv.lowering.lanes import Lanes


@given(st.integers(1, 4), st.integers(0, 9), st.integers(0, 9), st.integers(1, 5), st.integers(0, 2**32))
def test_what_rides_in_lanes_comes_out_as_it_went_in(count, bits, images, values, seed):
    lanes = Lanes.of(count, bits)
    x = np.random.default_rng(seed).integers(0, 2**bits, (images, values))
    packed = lanes.pack(x, filler=0)
    assert packed.shape == (-(-images // count), values)
    assert int(packed.max(initial=0)).bit_length() <= lanes.width(bits)
    np.testing.assert_array_equal(lanes.unpack(packed, images), x)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**32))
def test_the_same_in_every_lane_is_one_number_times_every(count, bits, seed):
    lanes = Lanes.of(count, bits)
    x = np.random.default_rng(seed).integers(0, 2**bits, 7)
    np.testing.assert_array_equal(lanes.pack(np.stack([x] * count), filler=0)[0], x * lanes.every)
    np.testing.assert_array_equal(lanes.pack(x[None], filler=3)[0], x + 3 * (lanes.every - 1))
