"""The integer weights of a layer: which of them share a scale, and what they are rounded to."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np
import scipy.linalg

from fheconv.arithmetic import OUTSIDE, im2col
from fheconv.basics.arrays import Array, Shape, along_channels
from fheconv.basics.errors import AccumulatorOverflowError
from fheconv.networks.floats import Layer
from fheconv.networks.linear import Kernel, Select, Term
from fheconv.networks.quantization import Quantization
from fheconv.quantizer.components import connected
from fheconv.quantizer.rounding.base import IntegerWeight, Rounding
from fheconv.quantizer.tables import Budget, width

# On so many windows of the calibration images the second moment of what a layer reads is measured.
MOST_WINDOWS = 20_000

# How much the fit to what is delivered holds on to the trained weights, as a share of the inputs' variance.
RIDGE = 0.01

# The filters, as (number of the term, output channel), that make one row: they share a scale.
Row: TypeAlias = tuple[tuple[int, int], ...]


class IntegerTerms(NamedTuple):
    """A layer's terms with integer weights, and the real size of an accumulator step, of the layer's shape.

    A step of 0 says that all weights are zero. `range` is that of the weights' data type.
    """

    terms: tuple[Term, ...]
    step: Array
    range: tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """One term: the convolution with its weights, and what surrounds it.

    `unit` is the real size of one step of its input; `range` how much the accumulator's range grows with one
    step of a weight; `channels` (C, *S) the filter from which each of the layer's values comes, and `tied`
    pairs of filters (2, n) that are added up later. `aligned` says that the convolution's outputs are the
    layer's.
    """

    term: Term
    at: int
    kernel: Kernel
    unit: float
    range: int
    channels: Array
    tied: Array
    aligned: bool


class Rows:
    """The filters of a layer in rows: those that meet in one accumulator share a scale, and are one row."""

    def __init__(self, layer: Layer, inputs: Sequence[Quantization], shapes: Sequence[Shape]) -> None:
        self.layer = layer
        self.parts = [
            _part(term, quantization, shapes[term.source])
            for term, quantization in zip(layer.terms, inputs, strict=True)
        ]
        counts = [len(part.kernel.weight) for part in self.parts]
        first = np.concatenate([[0], np.cumsum(counts)])
        nodes = np.stack(
            [np.where(p.channels == OUTSIDE, OUTSIDE, p.channels + f).ravel()
             for p, f in zip(self.parts, first[:-1], strict=True)]
        )  # fmt: skip
        lead = np.take_along_axis(nodes, (nodes != OUTSIDE).argmax(axis=0)[None], axis=0)[0]
        meets = [np.stack([lead, other])[:, (other != OUTSIDE)] for other in nodes]
        ties = [part.tied + start for part, start in zip(self.parts, first[:-1], strict=True)]
        labels = connected(np.concatenate([*meets, *ties], axis=1), int(first[-1]))
        members: dict[int, list[tuple[int, int]]] = {}
        for node, label in enumerate(labels.tolist()):
            part = int(np.searchsorted(first, node, side="right")) - 1
            members.setdefault(label, []).append((part, node - int(first[part])))
        self.rows: list[Row] = [tuple(one) for one in members.values()]
        number = {label: at for at, label in enumerate(members)}
        of_node = np.array([number[label] for label in labels.tolist()])
        # The row of each of the layer's values; where nothing comes from anywhere, any will do.
        self.of_value = np.where(lead == OUTSIDE, 0, of_node[lead]).reshape(layer.shape)
        by_channel = self.of_value.reshape(layer.shape[0], -1)
        # Whether some channel, whose values start from one minimum, has values of several filters.
        self.mixed = bool((by_channel != by_channel[:, :1]).any())
        if self.mixed:  # one of these filters may reach down and another up
            self.parts = [replace(part, range=2 * part.range) for part in self.parts]

    def weights(self, row: Row) -> Array:
        """Return the float weights of a row, relative to the first term's unit; a lone term's unchanged."""
        unit = self.parts[0].unit
        filters = ((self.parts[p], c) for p, c in row)
        return np.concatenate(
            [
                _flat(p.kernel.weight[c] if p.unit == unit else p.kernel.weight[c] * (p.unit / unit))
                for p, c in filters
            ]
        )

    def alike(self) -> list[list[int]]:
        """Return the numbers of the rows in lists of those that read the same inputs."""
        batches: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for number, row in enumerate(self.rows):
            batches.setdefault(tuple((p, self._group(p, c)) for p, c in row), []).append(number)
        return list(batches.values())

    def _group(self, part: int, channel: int) -> int:
        kernel = self.parts[part].kernel
        return channel // (len(kernel.weight) // kernel.geometry.groups)

    def read(self, row: Row) -> Array:
        """Return, as a mask of a row's weights, those whose input the trained filters read."""
        parts = ((self.parts[p].kernel, c) for p, c in row)
        return np.concatenate([_flat(read_taps(kernel)[c]) for kernel, c in parts])

    def ranges(self, row: Row) -> Array:
        """Return by how much the accumulator's range grows with one step of each weight of a row."""
        return np.concatenate(
            [np.full(self.parts[p].kernel.weight[c].size, self.parts[p].range) for p, c in row]
        )

    def covariance(self, row: Row, a: Sequence[Array], b: Sequence[Array]) -> Array:
        """Return the covariance of two kinds of `windows` that the weights of a row meet."""
        blocks = [[windows[p][self._group(p, c)] for p, c in row] for windows in (a, b)]
        if all(self.parts[p].aligned for p, _ in row) and len({p for p, _ in row}) == len(row):
            blocks = [[np.concatenate(parts, axis=1)] for parts in blocks]
        return scipy.linalg.block_diag(*(_covariance(x, y) for x, y in zip(*blocks, strict=True)))

    def windows(self, tensors: Sequence[Array], units: Sequence[float], zeros: Sequence[int]) -> list[Array]:
        """Return what each term's convolution reads on some images, (groups, windows, taps).

        Each term's tensor counts from its own of `zeros` in its own of `units`.
        """
        found = []
        for part, unit, zero in zip(self.parts, units, zeros, strict=True):
            values = tensors[part.term.source]
            positions = math.prod(self.layer.shape[1:])
            x = (values[:: -(-len(values) * positions // MOST_WINDOWS)] - zero) / unit
            x = replace(part.term, steps=part.term.steps[: part.at]).apply(x)
            geometry = part.kernel.geometry
            if not geometry.kernel:
                groups = geometry.groups
                found.append(np.moveaxis(x.reshape(len(x), groups, -1), 1, 0).astype(np.float64))
            else:
                found.append(im2col(x.astype(np.float64), geometry))
        return found

    @np.errstate(over="ignore")  # a step that overflows is refused where the bias is counted in it
    def assemble(self, integers: Sequence[Array], scale: Array, ends: tuple[int, int]) -> IntegerTerms:
        """Return the terms with the integers and the scale of each row."""
        terms = tuple(replace(term, factor=1.0) for term in self.terms(integers))
        return IntegerTerms(terms, scale[self.of_value] * self.parts[0].unit, ends)

    def terms(self, values: Sequence[Array]) -> tuple[Term, ...]:
        """Return the terms with other weights, those of each row relative to the first term's unit."""
        weights = [np.zeros(part.kernel.weight.shape, values[0].dtype) for part in self.parts]
        for row, own_values in zip(self.rows, values, strict=True):
            sizes = [self.parts[p].kernel.weight[c].size for p, c in row]
            for (p, c), own in zip(row, np.split(own_values, np.cumsum(sizes)[:-1]), strict=True):
                shape = weights[p][c].shape
                weights[p][c] = np.moveaxis(own.reshape(*shape[1:], shape[0]), -1, 0)
        return tuple(
            replace(part.term.with_weight(weight), factor=self.parts[0].unit)
            for part, weight in zip(self.parts, weights, strict=True)
        )


def _part(term: Term, quantization: Quantization, shape: Shape) -> _Part:
    at, kernel = term.weighted()
    shapes = term.shapes(shape)
    channels = np.broadcast_to(
        along_channels(np.arange(len(kernel.weight)), len(shapes[at + 1])), shapes[at + 1]
    )
    pooled = 1
    for place, step in enumerate(term.steps):
        if isinstance(step, Kernel) and place != at:
            pooled *= int(np.abs(step.weight).reshape(len(step.weight), -1).sum(axis=1).max())
    tied = np.zeros((2, 0), np.int64)
    for step, after in zip(term.steps[at + 1 :], shapes[at + 2 :], strict=True):
        if isinstance(step, Select):
            channels = np.where(step.index == OUTSIDE, OUTSIDE, channels.ravel()[step.index])
        else:
            by_channel = channels.reshape(len(channels), -1)
            lead = by_channel.max(axis=1, initial=OUTSIDE)
            together = np.stack([np.broadcast_to(lead[:, None], by_channel.shape), by_channel])
            tied = np.concatenate([tied, together[:, by_channel != OUTSIDE]], axis=1)
            channels = np.broadcast_to(along_channels(lead, len(after)), after)
    return _Part(
        term=term,
        at=at,
        kernel=kernel,
        unit=term.factor * quantization.scale,
        range=(quantization.maximum - quantization.minimum) * pooled,
        channels=channels,
        tied=tied,
        aligned=at == len(term.steps) - 1,
    )


def read_taps(kernel: Kernel) -> Array:
    """Return, as a mask of the kernel's weights, those whose input some filter of their group reads."""
    weight, groups = kernel.weight, kernel.geometry.groups
    by_group = weight.reshape(groups, len(weight) // groups, *weight.shape[1:])
    read = (by_group != 0).any(axis=1, keepdims=True)
    return np.broadcast_to(read, by_group.shape).reshape(weight.shape)


def _flat(weight: Array) -> Array:
    """Return one filter (C/groups, *k) as a row, channels last as in the rows of im2col."""
    return np.moveaxis(weight, 0, -1).ravel()


def _covariance(x: Array, y: Array) -> Array:
    # The mean is not the weights' business: what it costs goes into the bias.
    return (x - x.mean(axis=0)).T @ (y - y.mean(axis=0)) / len(x)


def least_squares(moment: Array, target: Array, weights: Array) -> Array:
    """Return the weights (K, n) of least squared error that hold on to `weights` a little.

    `moment` (n, n) is the covariance of the inputs, `target` (n, K) that of the inputs and the sums that are
    meant.
    """
    ridge = RIDGE * float(np.trace(moment)) / max(len(moment), 1)
    if not ridge > 0:  # inputs that are constant tell nothing of the weights
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
    """Round each row by `method`, which looks at the weights alone; without `per_channel` all rows as one."""
    rows = Rows(layer, inputs, shapes)
    if not per_channel:
        weights, ranges = map(rows.weights, rows.rows), map(rows.ranges, rows.rows)
        together = method(np.concatenate([*weights])[None], bits, None, np.concatenate([*ranges]), None)
        ends = np.cumsum([rows.weights(row).size for row in rows.rows])[:-1]
        scale = np.full(len(rows.rows), together.scale[0])
        return rows.assemble(np.split(together.values[0], ends), scale, together.range)
    return _in_batches(rows, lambda batch, stacked: method(stacked, bits, None, rows.ranges(batch[0]), None))


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

    `floats` are the network's tensors, `tensors` the integers that the quantized network delivers in their
    place: what is rounded are the weights that make the best of these, by least squares. Raises
    `AccumulatorOverflowError` where the `budget` is too small for any weight.
    """
    rows = Rows(layer, inputs, shapes)
    least = min(part.range for part in rows.parts)
    if budget is not None and budget.steps < least:
        enough = f"accumulator_bits={width(layer.name, least, budget.rounding_bits)}"
        activations = [q.bits for term, q in zip(layer.terms, inputs, strict=True) if term.source]
        if activations:  # by default they would get more bits where accumulators have more
            enough += f" and activation_bits={max(activations)}"
        raise AccumulatorOverflowError(
            f"Layer {layer.name!r}: a single weight of 1 already lets the accumulator span {least} steps, "
            f"where {budget.steps} are allowed; quantize with {enough}, or give what the layer reads fewer "
            "bits.",
            layer=layer.name,
            value=least,
            limit=budget.steps,
            remedy=enough,
        )
    delivered = rows.windows(tensors, [1.0] * len(inputs), [q.zero_point for q in inputs])
    meant = rows.windows(floats, [q.scale for q in inputs], [0] * len(inputs))

    def fit(batch: Sequence[Row], stacked: Array) -> IntegerWeight:
        # Filters of any size, none of whose squares overflow.
        size = np.abs(stacked).max(axis=1, keepdims=True).astype(np.float64)
        stacked = np.divide(stacked, size, out=np.zeros(stacked.shape), where=size > 0)
        # What is pruned stays pruned: a weight there would ask for lookups. Filters of zeros stay zeros.
        read = rows.read(batch[0]) | (not stacked.any())
        both, stacked = np.ix_(read, read), stacked[:, read]
        moment = rows.covariance(batch[0], delivered, delivered)[both]
        cross = rows.covariance(batch[0], delivered, meant)[both]
        fitted = least_squares(moment, cross @ stacked.T, stacked)
        rounded = method(fitted, bits, moment, rows.ranges(batch[0])[read], budget and budget.steps)
        values = np.zeros((len(batch), len(read)), np.int64)
        values[:, read] = rounded.values
        return rounded._replace(values=values, scale=rounded.scale * size[:, 0])

    return _in_batches(rows, fit)


def _in_batches(rows: Rows, rounded: Callable[[Sequence[Row], Array], IntegerWeight]) -> IntegerTerms:
    """Round rows that read the same inputs together."""
    integers: list[Array] = [np.zeros(0, np.int64)] * len(rows.rows)
    scale, ends = np.zeros(len(rows.rows)), (0, 0)
    for numbers in rows.alike():
        batch = [rows.rows[number] for number in numbers]
        result = rounded(batch, np.stack([rows.weights(row) for row in batch]))
        ends = (min(ends[0], result.range[0]), max(ends[1], result.range[1]))
        scale[numbers] = result.scale
        for number, values in zip(numbers, result.values, strict=True):
            integers[number] = values
    return rows.assemble(integers, scale, ends)
