"""Rounds the weights of a layer to integers."""

from collections.abc import Callable, Sequence

import numpy as np
import scipy.linalg

from fheconv.basics.arrays import Array, Shape
from fheconv.basics.errors import AccumulatorOverflowError
from fheconv.networks.floats import Layer
from fheconv.networks.quantization import Quantization
from fheconv.quantizer.rounding.base import IntegerWeight, Rounding
from fheconv.quantizer.rows import IntegerTerms, Rows
from fheconv.quantizer.windows import Budget, width

# How strongly the least-squares fit keeps the trained weights, as a share of the inputs' variance.
RIDGE = 0.01
TINY = float(np.finfo(np.float64).tiny)


def least_squares(moment: Array, target: Array, weights: Array) -> Array:
    """Return the weights (K, n) of least squared error, with a small penalty for leaving `weights`.

    `moment` (n, n) is the covariance of the inputs, `target` (n, K) that of the inputs and the float sums.
    """
    ridge = RIDGE * float(np.trace(moment)) / max(len(moment), 1)
    if not ridge > 0:  # constant inputs do not determine the weights
        return weights
    fitted: Array = scipy.linalg.solve(
        moment + ridge * np.eye(len(moment)), target + ridge * weights.T, assume_a="pos"
    ).T
    return fitted


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
        weights, ranges = map(rows.weights, rows.rows), map(rows.ranges, rows.rows)
        together = method(np.concatenate([*weights])[None], bits, None, np.concatenate([*ranges]), None)
        ends = np.cumsum([rows.weights(row).size for row in rows.rows])[:-1]
        scale = np.full(len(rows.rows), together.scale[0])
        return rows.assemble(np.split(together.values[0], ends), scale, together.range)
    return _in_batches(
        rows, lambda numbers, stacked: method(stacked, bits, None, rows.ranges(rows.rows[numbers[0]]), None)
    )


def round_by_output(
    layer: Layer,
    inputs: Sequence[Quantization],
    shapes: Sequence[Shape],
    floats: Sequence[Array],
    tensors: Sequence[Array],
    bits: int,
    method: Rounding,
    budget: Budget | None,
) -> IntegerTerms:
    """Round by `method` so that the layer's sums on the calibration images change little.

    `floats` holds the tensors of the float network, `tensors` those of the quantized network. The weights are
    first fitted to the quantized tensors by least squares, and then rounded.

    If the `budget` needs no proof, scales are so coarse that the float sums keep to it. The integer sums can
    reach a little further than the float sums.

    Raises `AccumulatorOverflowError` if the `budget` is too small for any weight.
    """
    rows = Rows(layer, inputs, shapes)
    least = min(part.range for part in rows.parts)
    finest = None
    if budget is not None and not budget.proved:
        finest = rows.reach(layer.sums(floats)) / (budget.steps * rows.parts[0].unit)
        budget = None
    if budget is not None and budget.steps < least:
        enough = f"accumulator_bits={width(layer.name, least, budget.rounding_bits)}"
        activations = [q.bits for term, q in zip(layer.terms, inputs, strict=True) if term.source]
        if activations:  # by default, wider accumulators would give them more bits
            enough += f" and activation_bits={max(activations)}"
        raise AccumulatorOverflowError(
            f"Layer {layer.name!r}: a single weight of 1 already lets the accumulator span {least} steps, "
            f"where {budget.steps} are allowed; quantize with {enough}, or use fewer bits for the inputs of "
            "the layer.",
            layer=layer.name,
            value=least,
            limit=budget.steps,
            remedy=enough,
        )
    delivered = rows.windows(tensors, [1.0] * len(inputs), [q.zero_point for q in inputs])
    meant = rows.windows(floats, [q.scale for q in inputs], [0] * len(inputs))

    def fit(numbers: Sequence[int], stacked: Array) -> IntegerWeight:
        batch = [rows.rows[number] for number in numbers]
        # Dividing by the greatest weight keeps the squares from overflowing.
        size = np.abs(stacked).max(axis=1, keepdims=True).astype(np.float64)
        stacked = np.divide(stacked, size, out=np.zeros(stacked.shape), where=size > 0)
        # Pruned weights stay zero, because another value there would need more lookups. So do filters of
        # zeros.
        read = rows.read(batch[0]) | (not stacked.any())
        both, stacked = np.ix_(read, read), stacked[:, read]
        moment = rows.covariance(batch[0], delivered, delivered)[both]
        cross = rows.covariance(batch[0], delivered, meant)[both]
        fitted = least_squares(moment, cross @ stacked.T, stacked)
        rounded = method(
            fitted,
            bits,
            moment,
            rows.ranges(batch[0])[read],
            budget and budget.steps,
            None if finest is None else finest[numbers] / np.maximum(size[:, 0], TINY),
        )
        values = np.zeros((len(batch), len(read)), np.int64)
        values[:, read] = rounded.values
        return rounded._replace(values=values, scale=rounded.scale * size[:, 0])

    return _in_batches(rows, fit)


def _in_batches(rows: Rows, rounded: Callable[[Sequence[int], Array], IntegerWeight]) -> IntegerTerms:
    """Round rows that read the same inputs together."""
    integers: list[Array] = [np.zeros(0, np.int64)] * len(rows.rows)
    scale, ends = np.zeros(len(rows.rows)), (0, 0)
    for numbers in rows.alike():
        batch = [rows.rows[number] for number in numbers]
        result = rounded(numbers, np.stack([rows.weights(row) for row in batch]))
        ends = (min(ends[0], result.range[0]), max(ends[1], result.range[1]))
        scale[numbers] = result.scale
        for number, values in zip(numbers, result.values, strict=True):
            integers[number] = values
    return rows.assemble(integers, scale, ends)
