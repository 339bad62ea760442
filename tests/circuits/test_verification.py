import numpy as np
import pytest

from fheconv.circuits.verification import compare

EXPECTED = np.zeros((2, 3, 4, 1), int)  # two runs of three images with four values each


def changed(*places):
    got = EXPECTED.copy()
    for place in places:
        got[place] += 5
    return got


@pytest.mark.parametrize(
    ("by_image", "promised", "words"),
    [
        (True, 0.5, "2 of 6 images have a wrong value, no more than the expected share of 0.5"),
        (True, 1e-9, "2 of 6 images have a wrong value, MORE than the expected share of 1e-09"),
        (False, 0.5, "3 of 24 values are wrong, no more than the expected share of 0.5"),
    ],
)
def test_what_differs_is_counted_in_what_the_promise_is_about(by_image, promised, words):
    got = changed((0, 0, 0, 0), (0, 0, 1, 0), (1, 2, 3, 0))
    said = str(compare(EXPECTED, got, promised, 1, by_image=by_image))
    assert said.startswith("21 of 24 encrypted results equal the clear integers.")
    assert words in said
    assert "the greatest difference is 5." in said
    assert said.count("expected 0, got 5") == 1


def test_equal_results_need_no_words():
    assert len(str(compare(EXPECTED, EXPECTED, 0.5, 3)).splitlines()) == 1
