import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fheconv.quantizer.rounding.minmax import round_minmax
from fheconv.quantizer.rounding.mse import round_mse


@given(seed=st.integers(0, 2**32), bits=st.integers(1, 8), power=st.sampled_from([-300, -3, 0, 3, 300]))
def test_the_greatest_weight_is_exact_and_others_are_off_by_half_a_step(seed, bits, power):
    weight = np.random.default_rng(seed).standard_normal((3, 2, 2, 3)) * 10.0**power
    rounded = round_minmax(weight, bits)
    greatest = max(2 ** (bits - 1) - 1, 1)
    assert rounded.range == (-greatest, greatest)
    assert rounded.values.dtype == np.int64
    assert (np.abs(rounded.values).reshape(3, -1).max(axis=1) == greatest).all()
    scale = rounded.scale.reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(rounded.scale * greatest, np.abs(weight).reshape(3, -1).max(axis=1))
    assert (np.abs(rounded.values * scale - weight) <= scale * (0.5 + 1e-9)).all()


@given(seed=st.integers(0, 2**32), bits=st.integers(2, 8))
def test_its_squared_error_is_never_less_than_the_least(seed, bits):
    weight = np.random.default_rng(seed).standard_normal((3, 7))
    minmax, least = (
        ((weight - rounded.scale[:, None] * rounded.values) ** 2).sum(axis=1)
        for rounded in (round_minmax(weight, bits), round_mse(weight, bits))
    )
    assert (least <= minmax + 1e-12).all()


def test_a_channel_of_zeros_stays_zero_beside_others():
    rounded = round_minmax(np.array([[0.0, 0.0], [1.0, -0.5]]), 4)
    assert rounded.values.tolist() == [[0, 0], [7, -4]]
    assert rounded.scale.tolist() == [0, 1 / 7]


@pytest.mark.parametrize("kind", ["int64", "uint8"])
def test_integers_that_fit_stay_as_they_are(kind):
    weight = np.array([[3, 1], [0, 2]], kind)
    rounded = round_minmax(weight, 4)
    assert rounded.values.tolist() == weight.tolist()
    assert rounded.scale.tolist() == [1, 1]
