"""Rounds the weights of a layer to integers."""

from collections.abc import Callable, Sequence

import numpy as np

from fheconv.basics.arrays import Array, Shape
from fheconv.basics.errors import AccumulatorOverflowError
from fheconv.networks.floats import Layer
from fheconv.networks.quantization import Quantization
from fheconv.quantizer.evidence import least_squares
from fheconv.quantizer.moments import Moments
from fheconv.quantizer.rounding.base import IntegerWeight, Rounding
from fheconv.quantizer.rows import IntegerTerms, Rows
from fheconv.quantizer.windows import Budget, width

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
    first fitted to the quantized tensors by least squares, and then rounded. As far as the calibration images
    are few or alike, inputs of any kind count too (`Moments`).

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
    moments = Moments(rows, inputs, shapes, tensors, floats)

    def fit(numbers: Sequence[int], stacked: Array) -> IntegerWeight:
        batch = [rows.rows[number] for number in numbers]
        # Dividing by the greatest weight keeps the squares from overflowing.
        size = np.abs(stacked).max(axis=1, keepdims=True).astype(np.float64)
        stacked = np.divide(stacked, size, out=np.zeros(stacked.shape), where=size > 0)
        # Pruned weights stay zero, because another value there would need more lookups. So do filters of
        # zeros.
        read = rows.read(batch[0]) | (not stacked.any())
        stacked = stacked[:, read]
        moment, cross = moments.of_row(batch[0], read)
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

    return _in_batches(rows, fit)._replace(evidence=moments.evidence)


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
