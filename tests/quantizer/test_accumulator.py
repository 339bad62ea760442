import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fheconv.quantizer.rounding.accumulator import round_accumulator
from fheconv.quantizer.rounding.gptq import round_gptq
from tests.support.problems import damped, errors, nothing, problems


@given(problems(), st.integers(0, 300))
def test_no_row_exceeds_the_budget_or_its_data_type(problem, budget):
    weight, moment, ranges, bits = problem
    rounded = round_accumulator(weight, bits, moment, ranges, budget)
    greatest = max(2 ** (bits - 1) - 1, 1)
    assert rounded.range == (-greatest, greatest)
    assert rounded.values.dtype == np.int64
    assert rounded.values.shape == weight.shape
    assert np.abs(rounded.values).max() <= greatest
    assert (np.abs(rounded.values) @ ranges).max() <= budget
    assert np.isfinite(rounded.scale).all()
    assert (rounded.scale >= 0).all()


@given(problems())
def test_without_a_budget_no_worse_than_gptq(problem):
    weight, moment, ranges, bits = problem
    ours = errors(weight, moment, round_accumulator(weight, bits, moment, ranges, None))
    theirs = errors(weight, moment, round_gptq(weight, bits, moment))
    assert (ours <= theirs + 1e-9 * errors(weight, moment, nothing(weight))).all()


@given(problems(), st.integers(0, 300))
def test_every_row_is_at_least_as_good_as_no_weights(problem, budget):
    weight, moment, ranges, bits = problem
    rounded = round_accumulator(weight, bits, moment, ranges, budget)
    least = errors(weight, moment, nothing(weight))
    assert (errors(weight, moment, rounded) <= least * (1 + 1e-9)).all()


@given(problems(), st.integers(0, 300))
def test_the_scale_is_the_best_one_of_the_integers(problem, budget):
    weight, moment, ranges, bits = problem
    rounded = round_accumulator(weight, bits, moment, ranges, budget)
    h = damped(moment)
    for w, q, scale in zip(weight, rounded.values, rounded.scale, strict=True):
        best = max((w @ h @ q) / (q @ h @ q), 0) if q.any() else 0
        np.testing.assert_allclose(scale, best, rtol=1e-9)


@given(problems(), st.integers(0, 300))
def test_rows_are_rounded_each_on_its_own(problem, budget):
    weight, moment, ranges, bits = problem
    together = round_accumulator(weight, bits, moment, ranges, budget)
    for row in range(len(weight)):
        alone = round_accumulator(weight[row : row + 1], bits, moment, ranges, budget)
        # Only what depends on the order of sums may differ: two roundings that are equally good.
        np.testing.assert_allclose(
            errors(weight[row : row + 1], moment, alone),
            errors(weight, moment, together)[row],
            rtol=1e-6,
            atol=1e-12 * (weight**2).sum(),
        )


@given(problems(), st.integers(-20, 20))
def test_the_unit_of_the_weights_makes_no_difference(problem, power):
    weight, moment, ranges, bits = problem
    one, other = (round_accumulator(w, bits, moment, ranges, 100) for w in (weight, weight * 2.0**power))
    np.testing.assert_array_equal(one.values, other.values)
    np.testing.assert_allclose(one.scale * 2.0**power, other.scale)


@pytest.mark.parametrize("budget", [None, 0, 7])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_rows_of_zeros_stay_zero_beside_others(bits, budget):
    weight = np.array([[0.0, 0.0], [1.0, -0.5]])
    rounded = round_accumulator(weight, bits, np.eye(2), np.array([7, 7]), budget)
    assert not rounded.values[0].any()
    assert rounded.scale[0] == 0
    assert rounded.values[1].any() == (budget != 0)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_single_tap_is_exact_whatever_its_budget_allows(bits):
    weight = np.array([[-0.3], [2.0]])
    rounded = round_accumulator(weight, bits, np.array([[4.0]]), np.array([15]), 15)
    np.testing.assert_array_equal(rounded.values, [[-1], [1]])
    np.testing.assert_allclose(rounded.scale[:, None] * rounded.values, weight)


def test_the_budget_is_spent_where_the_inputs_are():
    """Two taps and room for one: the tap whose input varies gets the weight, not the greater one."""
    moment = np.diag([0.01, 100.0])
    rounded = round_accumulator(np.array([[2.0, 1.0]]), 4, moment, np.array([15, 15]), 15)
    np.testing.assert_array_equal(rounded.values, [[0, 1]])


def test_inputs_that_never_change_still_count():
    """Calibration on a constant: nothing can be learned from it, so the nearest weights are taken."""
    weight = np.array([[1.0, 2.0, -3.0]])
    rounded = round_accumulator(weight, 3, np.zeros((3, 3)), np.array([3, 3, 3]), None)
    np.testing.assert_allclose(rounded.scale[:, None] * rounded.values, weight, rtol=1e-12)
