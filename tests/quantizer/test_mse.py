from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fheconv.quantizer.rounding.mse import round_mse


def squared_error(weight, rounded):
    scale = rounded.scale.reshape(-1, *[1] * (weight.ndim - 1))
    return float(((weight - scale * rounded.values) ** 2).sum())


def least_error(row, q):
    """The squared error of integers `q` (…, K) under the scale that suits each best."""
    a, d = np.maximum(q @ row, 0), (q**2).sum(axis=-1)
    return float((row**2).sum() - np.divide(a**2, d, out=np.zeros(a.shape), where=d > 0).max())


@st.composite
def rows(draw, most):
    """Short rows, some with ties and zeros."""
    values = st.one_of(st.floats(-4, 4).map(lambda v: round(v, 3)), st.sampled_from([0.0, 0.5, -0.5, 1.0]))
    return np.array(draw(st.lists(values, min_size=1, max_size=most)))


@given(row=rows(3), bits=st.integers(2, 4))
def test_no_vector_of_integers_is_nearer_to_a_short_row(row, bits):
    end = 2 ** (bits - 1) - 1
    every = np.array(list(product(range(-end, end + 1), repeat=len(row))))
    ours = squared_error(row[None], round_mse(row[None], bits))
    assert ours == pytest.approx(least_error(row, every), abs=1e-12)


@given(row=rows(6))
def test_no_vector_of_signs_is_nearer_with_one_bit(row):
    every = np.array(list(product((-1, 1), repeat=len(row))))
    rounded = round_mse(row[None], 1)
    assert squared_error(row[None], rounded) == pytest.approx(least_error(row, every), abs=1e-12)
    if row.any():
        assert set(rounded.values.ravel()) <= {-1, 1}


@given(seed=st.integers(0, 2**32), bits=st.integers(2, 8), taps=st.integers(1, 40))
def test_no_scale_of_a_dense_grid_rounds_better(seed, bits, taps):
    row = np.random.default_rng(seed).standard_normal(taps)
    end = 2 ** (bits - 1) - 1
    scales = np.abs(row).max() / end * np.geomspace(0.2, 2.5 * end, 5000)[:, None]
    q = np.clip(np.rint(row / scales), -end, end)
    ours = squared_error(row[None], round_mse(row[None], bits))
    assert ours <= least_error(row, q) + 1e-12


@given(seed=st.integers(0, 2**32), bits=st.integers(1, 8))
def test_the_integers_are_those_nearest_to_the_weight_on_their_own_scale(seed, bits):
    weight = np.random.default_rng(seed).standard_normal((3, 2, 3, 3))
    rounded = round_mse(weight, bits)
    low, high = rounded.range
    assert (low, high) == ((-1, 1) if bits == 1 else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1))
    assert rounded.values.dtype == np.int64
    assert low <= rounded.values.min()
    assert rounded.values.max() <= high
    exact = weight / rounded.scale.reshape(-1, 1, 1, 1)
    away = np.abs(rounded.values - np.clip(exact, low, high))
    assert away.max() <= (1.0 if bits == 1 else 0.5) + 1e-9


@given(seed=st.integers(0, 2**32), bits=st.integers(1, 8))
def test_each_channel_is_rounded_by_itself(seed, bits):
    weight = np.random.default_rng(seed).standard_normal((4, 1, 2, 3)) * np.logspace(-3, 3, 4).reshape(
        -1, 1, 1, 1
    )
    together = round_mse(weight, bits)
    for c in range(4):
        alone = round_mse(weight[c : c + 1], bits)
        np.testing.assert_array_equal(together.values[c], alone.values[0])
        assert together.scale[c] == alone.scale[0]


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_channel_of_zeros_stays_zero_beside_others(bits):
    weight = np.array([[[0.0, 0.0]], [[1.0, -0.5]]])
    rounded = round_mse(weight, bits)
    assert rounded.values[0].tolist() == [[0, 0]]
    assert rounded.scale[0] == 0
    assert rounded.scale[1] > 0
    nothing = round_mse(np.zeros((2, 1, 3)), bits)
    assert not nothing.values.any()
    assert not nothing.scale.any()


@given(
    bits=st.integers(1, 8),
    signed=st.booleans(),
    kind=st.sampled_from(["int64", "int16", "uint8"]),
    data=st.data(),
)
def test_integers_that_fit_stay_as_they_are(bits, signed, kind, data):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed and kind != "uint8" else (0, 2**bits - 1)
    values = data.draw(st.lists(st.integers(low, high), min_size=1, max_size=8))
    weight = np.array(values, kind).reshape(1, 1, -1)
    rounded = round_mse(weight, bits)
    assert rounded.values.ravel().tolist() == values
    assert rounded.values.dtype == np.int64
    assert rounded.scale.tolist() == [1.0]
    assert rounded.range[0] <= min(values)
    assert max(values) <= rounded.range[1]
    assert rounded.range[1] - rounded.range[0] == 2**bits - 1


@pytest.mark.parametrize("values", [[8, -1], [-9, 0], [16, 3], [255, 0]])
def test_integers_that_do_not_fit_are_rounded_like_floats(values):
    weight = np.array([[values]])
    ours, floats = round_mse(weight, 4), round_mse(weight.astype(float), 4)
    np.testing.assert_array_equal(ours.values, floats.values)
    np.testing.assert_array_equal(ours.scale, floats.scale)
    assert ours.range == floats.range == (-7, 7)


@given(
    seed=st.integers(0, 2**32), bits=st.integers(1, 8), exponent=st.sampled_from([-300, -200, 200, 300, 307])
)
def test_weights_at_the_ends_of_float64_are_rounded_like_all_others(seed, bits, exponent):
    weight = np.random.default_rng(seed).uniform(-1, 1, (2, 1, 3, 3))
    plain, extreme = round_mse(weight, bits), round_mse(weight * 10.0**exponent, bits)
    assert np.isfinite(extreme.scale).all()
    # Scaling is not exact, so that a tie may fall the other way: compare what is left, not the integers.
    np.testing.assert_allclose(
        extreme.scale.reshape(-1, 1, 1, 1) / 10.0**exponent * extreme.values,
        plain.scale.reshape(-1, 1, 1, 1) * plain.values,
        atol=1e-9,
    )


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_constant_filter_is_exact(bits):
    rounded = round_mse(np.full((1, 2, 3), -0.37), bits)
    np.testing.assert_allclose(rounded.scale[0] * rounded.values, -0.37, rtol=1e-15)
    assert len(set(rounded.values.ravel())) == 1
