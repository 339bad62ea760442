import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fheconv.quantizer.rounding.base import Moment
from fheconv.quantizer.rounding.gptq import SCALES, compensated, round_gptq, scale_grid
from fheconv.quantizer.rounding.minmax import round_minmax
from tests.support.problems import damped, errors, nothing, problems


@given(problems())
def test_no_integer_exceeds_its_data_type(problem):
    weight, moment, _, bits = problem
    rounded = round_gptq(weight, bits, moment)
    greatest = max(2 ** (bits - 1) - 1, 1)
    assert rounded.range == (-greatest, greatest)
    assert rounded.values.dtype == np.int64
    assert rounded.values.shape == weight.shape
    assert np.abs(rounded.values).max() <= greatest
    assert np.isfinite(rounded.scale).all()
    assert (rounded.scale >= 0).all()


@given(problems())
def test_no_worse_than_minmax_or_than_no_weights(problem):
    weight, moment, _, bits = problem
    ours = errors(weight, moment, round_gptq(weight, bits, moment))
    none = errors(weight, moment, nothing(weight))
    assert (ours <= errors(weight, moment, round_minmax(weight, bits)) + 1e-9 * none).all()
    assert (ours <= none * (1 + 1e-9)).all()


@given(problems())
def test_no_worse_than_plain_rounding_at_the_best_of_the_scales(problem):
    weight, moment, _, bits = problem
    greatest = max(2 ** (bits - 1) - 1, 1)
    rounded, h = round_gptq(weight, bits, moment), damped(moment)
    for w, ours in zip(weight, errors(weight, moment, rounded), strict=True):
        if w.any():
            scales = np.abs(w).max() * np.geomspace(0.25 / greatest, 1.6, SCALES)
            off = w - scales[:, None] * np.clip(np.rint(w / scales[:, None]), -greatest, greatest)
            best = np.einsum("kn,nm,km->k", off, h, off).min()
            assert ours <= best * (1 + 1e-6) + 1e-12 * (w**2).sum() * np.trace(h)


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_of_many_taps_a_few_promising_scales_do_nearly_as_well_as_all(bits):
    rng = np.random.default_rng(bits)
    taps, greatest = 700, 2 ** (bits - 1) - 1
    inputs = np.abs(rng.normal(size=(400, 200)) @ rng.normal(size=(200, taps))) * rng.gamma(1, 1, taps)
    weight, moment = rng.laplace(size=(6, taps)), Moment(np.cov(inputs.T), taps)
    ours = round_gptq(weight, bits, moment)
    found = moment.errors(weight, ours.values[:, None], ours.scale[:, None])[:, 0]
    _, all_errors = compensated(weight, scale_grid(weight, greatest, SCALES), moment, greatest)
    assert found.mean() <= 1.03 * all_errors.min(axis=1).mean()


@given(problems())
def test_the_scale_is_the_best_one_of_the_integers(problem):
    weight, moment, _, bits = problem
    rounded, h = round_gptq(weight, bits, moment), damped(moment)
    for w, q, scale in zip(weight, rounded.values, rounded.scale, strict=True):
        best = max((w @ h @ q) / (q @ h @ q), 0) if q.any() else 0
        np.testing.assert_allclose(scale, best, rtol=1e-9)


@given(problems(), st.integers(-20, 20))
def test_the_unit_of_the_weights_makes_no_difference(problem, power):
    weight, moment, _, bits = problem
    one, other = (round_gptq(w, bits, moment) for w in (weight, weight * 2.0**power))
    np.testing.assert_array_equal(one.values, other.values)
    np.testing.assert_allclose(one.scale * 2.0**power, other.scale)


def test_what_one_tap_leaves_is_made_up_for_by_another_that_sees_the_same():
    """Both taps read nearly the same, so that only the sum of their weights counts."""
    moment = np.array([[1.0, 0.999], [0.999, 1.0]])
    weight = np.array([[1.0, 0.45]])
    rounded = round_gptq(weight, 2, moment)
    assert errors(weight, moment, rounded) < 0.1 * errors(weight, moment, round_minmax(weight, 2))


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_rows_of_zeros_stay_zero_beside_others(bits):
    rounded = round_gptq(np.array([[0.0, 0.0], [1.0, -0.5]]), bits, None)
    assert not rounded.values[0].any()
    assert rounded.scale[0] == 0
    assert rounded.values[1].any()
