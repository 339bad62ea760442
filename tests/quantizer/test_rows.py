"""Filters that read nearly the same inputs are fitted and rounded together, as each would be alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fheconv.networks.quantization import Quantization
from fheconv.quantizer.evidence import RIDGE, least_squares
from fheconv.quantizer.rounding.accumulator import round_accumulator
from fheconv.quantizer.rounding.base import Moment
from fheconv.quantizer.rounding.gptq import SCALES, compensated, scale_grid
from fheconv.quantizer.rows import Rows
from tests.support.nets import quantize


@st.composite
def shared(draw):
    """Weights (K, n + K) of K rows: n weights of all rows, then one of its own for each. And a covariance."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, common = draw(st.integers(2, 5)), draw(st.integers(1, 6))
    free = np.concatenate([np.ones((rows, common), bool), np.eye(rows, dtype=bool)], axis=1)
    values = rng.normal(size=(40, common + rows)) @ rng.normal(size=(common + rows, common + rows))
    return rng.normal(size=free.shape) * free, values.T @ values / 40, free, rng


@given(shared())
def test_least_squares_fits_each_row_to_its_own_inputs(problem):
    weights, moment, free, rng = problem
    target = rng.normal(size=(len(moment), len(weights)))
    fitted = least_squares(moment, target, weights, free)
    ridge = RIDGE * np.diag(moment).mean()
    assert not fitted[~free].any()
    for row, some in enumerate(free):
        own = moment[np.ix_(some, some)] + ridge * np.eye(some.sum())
        expected = np.linalg.solve(own, target[some, row] + ridge * weights[row, some])
        np.testing.assert_allclose(fitted[row, some], expected, rtol=1e-6, atol=1e-8 * np.abs(target).max())


@given(shared(), st.integers(2, 6))
def test_gptq_rounds_each_row_as_if_it_were_alone(problem, bits):
    """A weight of a row's own has the largest inputs here, so that it comes first when its row is alone."""
    weights, moment, free, _ = problem
    greatest = 2 ** (bits - 1) - 1
    moment = moment + np.diag(np.where(free.all(axis=0), 1e-3, 1.0)) * np.trace(moment)
    scale = scale_grid(weights, greatest, SCALES)
    h = Moment(moment, len(moment))
    together, error = compensated(weights, scale, h, greatest, free)
    np.testing.assert_allclose(error, h.errors(weights, together, scale), rtol=1e-6)
    assert not together[np.broadcast_to(~free[:, None], together.shape)].any()
    for row, some in enumerate(free):
        own = Moment(None, some.sum())
        own.values = h.values[np.ix_(some, some)]
        alone, _ = compensated(weights[[row]][:, some], scale[[row]], own, greatest)
        np.testing.assert_array_equal(together[row][:, some], alone[0])


@given(shared(), st.integers(2, 6), st.sampled_from([None, 40]))
def test_rounding_leaves_weights_that_a_row_does_not_have_at_zero(problem, bits, budget):
    weights, moment, free, _ = problem
    rounded = round_accumulator(weights, bits, moment, np.full(len(moment), 3), budget, free=free)
    assert not rounded.values[~free].any()
    assert budget is None or (3 * np.abs(rounded.values).sum(axis=1) <= budget).all()


class Skip(nn.Module):
    """Adds its input, or `before` it, to a convolution of it in `groups`."""

    def __init__(self, channels, groups, before):
        super().__init__()
        self.first = nn.Conv2d(2, channels, 1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)
        self.before = before

    def forward(self, x):
        x = F.relu(self.first(x))
        return self.second(x) + self.before(x)


@pytest.mark.parametrize(
    ("groups", "before", "batches", "inputs"),
    [
        (1, nn.Identity(), 1, 9 * 8 + 8),  # all read the same 72 values, and each one of eight others
        (1, nn.Conv2d(8, 8, 1), 1, 9 * 8 + 8),
        (8, nn.Identity(), 8, 9 + 1),  # they have nothing in common
    ],
)
def test_filters_with_a_skip_are_one_batch_if_most_of_their_inputs_are_the_same(
    groups, before, batches, inputs
):
    torch.manual_seed(0)
    images = np.random.default_rng(0).uniform(0, 1, (20, 2, 5, 5))
    network = quantize(Skip(8, groups, before), images).source
    layer, unit = network.layers[-1], Quantization(scale=1.0, zero_point=0, minimum=0, maximum=1)
    rows = Rows(layer, [unit] * len(layer.terms), network.shapes)
    together = rows.together()
    assert [batch.size for batch in together] == [inputs] * batches
    assert sorted(number for batch in together for number in batch.numbers) == [*range(8)]
    tensors = network.tensors(images)
    windows = rows.windows(tensors, [1.0] * len(layer.terms), [0] * len(layer.terms))
    sums = np.moveaxis(layer.sums(tensors) - layer.bias, 1, 0).reshape(8, -1)
    for batch in together:
        weights = np.stack([rows.weights(rows.rows[number]) for number in batch.numbers])
        read = np.concatenate([windows[p][group] for p, group in batch.inputs], axis=1)
        np.testing.assert_allclose(
            rows.parts[0].unit * batch.over_inputs(weights) @ read.T, sums[batch.numbers], atol=1e-9
        )
        np.testing.assert_array_equal(batch.of_weights(batch.over_inputs(weights)), weights)
        np.testing.assert_array_equal(rows.stacked(batch.numbers), weights)
        covariance, with_sums = rows.covariances(batch, windows, windows, batch.over_inputs(weights))
        np.testing.assert_allclose(covariance, np.cov(read.T, bias=True), atol=1e-12)
        np.testing.assert_allclose(with_sums, covariance @ batch.over_inputs(weights).T, atol=1e-9)
