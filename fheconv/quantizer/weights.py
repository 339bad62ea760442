"""Rounds the weights of a layer to integers."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from fheconv.basics.arrays import Array, Shape
from fheconv.basics.errors import AccumulatorOverflowError
from fheconv.networks.floats import Layer
from fheconv.networks.quantization import Quantization
from fheconv.quantizer.evidence import least_squares
from fheconv.quantizer.moments import Moments
from fheconv.quantizer.rounding.base import IntegerWeight, Moment, Rounding, greatest_integer
from fheconv.quantizer.rows import Batch, IntegerTerms, Rows
from fheconv.quantizer.windows import Budget

TINY = float(np.finfo(np.float64).tiny)


def round_nearest(
    layer: Layer,
    inputs: Sequence[Quantization],
    shapes: Sequence[Shape],
    bits: int,
    method: Rounding,
    *,
    per_channel: bool,
) -> IntegerTerms:
    """Round each row by `method`, which uses only weights; without `per_channel`, all rows as one."""
    rows = Rows(layer, inputs, shapes)
    if not per_channel:
        weights = np.concatenate([*map(rows.weights, rows.rows)])[None]
        ranges = np.concatenate([*map(rows.ranges, map(rows.inputs, rows.rows))])
        together = method(weights, bits, None, ranges, None)
        ends = np.cumsum([rows.weights(row).size for row in rows.rows])[:-1]
        scale = np.full(len(rows.rows), together.scale[0])
        return rows.assemble(np.split(together.values[0], ends), scale, together.range)
    results = []
    for numbers in rows.alike():
        ranges = rows.ranges(rows.inputs(rows.rows[numbers[0]]))
        results.append((numbers, method(rows.stacked(numbers), bits, None, ranges, None)))
    return _assembled(rows, results)


def _assembled(rows: Rows, results: Sequence[tuple[Sequence[int], IntegerWeight]]) -> IntegerTerms:
    """Return the terms of a layer, for the numbers of some rows and their integers."""
    integers: list[Array] = [np.zeros(0, np.int64)] * len(rows.rows)
    scale, ends = np.zeros(len(rows.rows)), (0, 0)
    for numbers, result in results:
        ends = (min(ends[0], result.range[0]), max(ends[1], result.range[1]))
        scale[list(numbers)] = result.scale
        for number, values in zip(numbers, result.values, strict=True):
            integers[number] = values
    return rows.assemble(integers, scale, ends)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Fitted:
    """Holds the rows of a batch, fitted: weights (K, n), of which each row has those in the mask `free`.

    `size` (K,) was divided out of the weights. `read` (N,) is the mask of the batch's inputs that are read,
    `variances` (n,) are theirs, and `moment` is their covariance.
    """

    batch: Batch
    weights: Array
    free: Array
    size: Array
    read: Array
    variances: Array
    moment: Moment


class FittedWeights:
    """Holds a layer's weights, fitted so that its sums on the calibration images change little.

    `floats` holds the tensors of the float network, `tensors` those of the quantized network. The weights are
    fitted to the quantized tensors by least squares. As far as the calibration images are few or alike,
    inputs of any kind count too (`Moments`).
    """

    def __init__(
        self,
        layer: Layer,
        inputs: Sequence[Quantization],
        shapes: Sequence[Shape],
        floats: Sequence[Array],
        tensors: Sequence[Array],
    ) -> None:
        self._layer = layer
        self.rows = rows = Rows(layer, inputs, shapes)
        moments = Moments(rows, inputs, shapes, tensors, floats)
        self._evidence = moments.evidence
        self._fitted = [_fitted(rows, batch, moments) for batch in rows.together()]
        self._rounded: dict[Hashable, tuple[Array, float, tuple[int, int]]] = {}

    def rounded(
        self, bits: int, method: Rounding, budget: Budget | None, steps: Array | None = None
    ) -> IntegerTerms:
        """Return the weights rounded by `method`. Rows keep what an equal call has given them.

        `steps` (C,) are the finest real steps of accumulators, if the `budget` needs no proof.

        Raises `AccumulatorOverflowError` if the `budget` is too small for any weight.
        """
        rows, finest = self.rows, np.zeros(len(self.rows.rows))
        if budget is not None and not budget.proved:
            budget = None
        if steps is not None:
            finest = rows.greatest(steps) / rows.parts[0].unit
        if budget is not None:
            self._check(budget)
        steps_left = budget and budget.steps
        results = []
        for fitted in self._fitted:
            numbers = fitted.batch.numbers
            own = finest[numbers] / np.maximum(fitted.size, TINY)
            keys = [(bits, method, steps_left, *key) for key in zip(numbers, own.tolist(), strict=True)]
            new = [at for at, key in enumerate(keys) if key not in self._rounded]
            if new:
                ranges = rows.ranges(fitted.batch.inputs)[fitted.read]
                weights, free = fitted.weights[new], fitted.free[new]
                result = method(weights, bits, fitted.moment, ranges, steps_left, own[new], free)
                for at, integers, scale in zip(new, result.values, result.scale, strict=True):
                    self._rounded[keys[at]] = integers, scale, result.range
            found = [self._rounded[key] for key in keys]
            values = np.zeros((len(numbers), len(fitted.read)), np.int64)
            values[:, fitted.read] = np.stack([integers for integers, _, _ in found])
            scales = np.array([scale for _, scale, _ in found]) * fitted.size
            results.append((numbers, IntegerWeight(fitted.batch.of_weights(values), scales, found[0][2])))
        return _assembled(rows, results)._replace(evidence=self._evidence)

    @property
    def taps(self) -> int:
        """The greatest number of weights that are fitted together."""
        return max(len(fitted.variances) for fitted in self._fitted)

    def usual_steps(self, bits: int) -> Array:
        """Return the real steps (C,) at which the greatest weights become the greatest integer of `bits`."""
        greatest = [np.abs(fitted.weights).max(axis=1) * fitted.size for fitted in self._fitted]
        return self._by_channel(greatest) * self.rows.parts[0].unit / greatest_integer(bits)

    def variance(self) -> Array:
        """Return the sum (C,) of the second moments of all inputs of a filter, in squares of their steps."""
        return self._by_channel([fitted.free @ fitted.variances for fitted in self._fitted])

    def _by_channel(self, values: Sequence[Array]) -> Array:
        """Return the greatest value (C,) of the rows of each channel, from those of each batch."""
        of_row = np.zeros(len(self.rows.rows))
        for fitted, own in zip(self._fitted, values, strict=True):
            of_row[fitted.batch.numbers] = own
        of_channel: Array = of_row[self.rows.of_value].reshape(self._layer.shape[0], -1).max(axis=1)
        return of_channel

    def _check(self, budget: Budget) -> None:
        """Raise `AccumulatorOverflowError` if the budget is too small for any weight."""
        layer, least = self._layer, min(part.range for part in self.rows.parts)
        if budget.steps >= least:
            return
        raise AccumulatorOverflowError(
            f"Layer {layer.name!r}: a single weight of 1 already lets the accumulator span {least} steps, "
            f"where {budget.steps} are allowed.",
            layer=layer.name,
            value=least,
            limit=budget.steps,
        )


def _fitted(rows: Rows, batch: Batch, moments: Moments) -> _Fitted:
    """Fit the rows of a batch."""
    weights = rows.stacked(batch.numbers)
    # Dividing by the greatest weight keeps the squares from overflowing.
    size = np.abs(weights).max(axis=1).astype(np.float64)
    weights = np.divide(weights, size[:, None], out=np.zeros(weights.shape), where=size[:, None] > 0)
    # Pruned weights stay zero, because another value there would need more lookups. So do filters of zeros.
    masks = np.stack([rows.read(rows.rows[number]) for number in batch.numbers])
    free = batch.over_inputs(masks | (not weights.any()))
    weights, read = batch.over_inputs(weights), free.any(axis=0)
    moment, target = moments.of_batch(batch, weights, free)
    weights, free = weights[:, read], free[:, read]
    return _Fitted(
        batch=batch,
        weights=least_squares(moment, target, weights, free),
        free=free,
        size=size,
        read=read,
        variances=np.diag(moment),
        moment=Moment(moment, len(moment)),
    )
