"""Groups the filters of a layer into rows: filters that must share a scale."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import scipy.linalg

from fheconv.arithmetic import OUTSIDE, im2col
from fheconv.basics.arrays import Array, Shape, along_channels
from fheconv.networks.floats import Layer
from fheconv.networks.linear import Kernel, Select, Term
from fheconv.networks.quantization import Quantization
from fheconv.quantizer.components import connected

# The covariance of a layer's inputs is measured on at most about this many windows of the calibration images.
MOST_WINDOWS = 10_000

# A row is a set of filters that share a scale. Each filter is (number of the term, output channel).
Row: TypeAlias = tuple[tuple[int, int], ...]
# What filters read: for each of them (number of the term, group of channels).
Inputs: TypeAlias = tuple[tuple[int, int], ...]


class IntegerTerms(NamedTuple):
    """Holds a layer's terms with integer weights, and the real size of an accumulator step.

    `step` has the layer's shape; a step of 0 says that all weights are zero. `range` is the range of the
    weights' data type. `evidence` counts the independent images that each term was fitted to; it is empty if
    images were not used.
    """

    terms: tuple[Term, ...]
    step: Array
    range: tuple[int, int]
    evidence: tuple[float, ...] = ()


class Batch(NamedTuple):
    """Lists K rows that are fitted together: `numbers` are theirs, and `inputs` is all that they read.

    `size` is the number n of these inputs, and `joint` says that they covary. `places` (K, m) says which of
    them each of the m weights of a row multiplies.
    """

    numbers: list[int]
    inputs: Inputs
    joint: bool
    size: int
    places: Array

    def over_inputs(self, values: Array) -> Array:
        """Return the values (K, m) of weights in the places of their inputs (K, n), and 0 elsewhere."""
        found = np.zeros((len(values), self.size), values.dtype)
        np.put_along_axis(found, self.places, values, axis=1)
        return found

    def of_weights(self, values: Array) -> Array:
        """Return the values (K, m) of the rows' weights, from those of all inputs (K, n)."""
        return np.take_along_axis(values, self.places, axis=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """Describes one term: its convolution, and how this reaches the accumulators.

    `unit` is the real size of one step of its input. `range` is the growth of the accumulator's span for one
    step of a weight. `channels` (C, *S) is the filter that each value of the layer comes from. `tied` holds
    pairs of filters (2, n) whose results are added later. `aligned` says that no step follows the
    convolution.
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
    """Groups the filters of a layer into rows: filters of one accumulator share a scale, and form a row."""

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
        # The row of each value of the layer; a value that comes from no filter takes the first row.
        self.of_value = np.where(lead == OUTSIDE, 0, of_node[lead]).reshape(layer.shape)
        by_channel = self.of_value.reshape(layer.shape[0], -1)
        # Whether a channel has values of several filters, although its values share one minimum.
        self.mixed = bool((by_channel != by_channel[:, :1]).any())
        if self.mixed:  # one of these filters can go down and another up
            self.parts = [replace(part, range=2 * part.range) for part in self.parts]

    def weights(self, row: Row) -> Array:
        """Return the float weights of a row, in the unit of the first term."""
        unit = self.parts[0].unit
        filters = ((self.parts[p], c) for p, c in row)
        return np.concatenate(
            [
                _flat(p.kernel.weight[c] if p.unit == unit else p.kernel.weight[c] * (p.unit / unit))
                for p, c in filters
            ]
        )

    def stacked(self, numbers: Sequence[int]) -> Array:
        """Return the float weights (K, m) of some rows that have as many, in the unit of the first term."""
        return np.stack([self.weights(self.rows[number]) for number in numbers])

    def inputs(self, row: Row) -> Inputs:
        """Return what each filter of a row reads."""
        kernels = ((p, c, self.parts[p].kernel) for p, c in row)
        return tuple((p, c // (len(kernel.weight) // kernel.geometry.groups)) for p, c, kernel in kernels)

    def alike(self) -> list[list[int]]:
        """Return lists of the numbers of rows that read the same inputs."""
        batches: dict[Inputs, list[int]] = {}
        for number, row in enumerate(self.rows):
            batches.setdefault(self.inputs(row), []).append(number)
        return list(batches.values())

    def together(self) -> list[Batch]:
        """Return the rows in batches: they read the same inputs, or each has a few inputs of its own besides.

        Where a layer adds a skip, each filter reads all channels of one tensor, and its own channel of
        another. Then one covariance of all these inputs is smaller than those of all filters.
        """
        candidates: dict[tuple[Any, ...], list[list[int]]] = {}
        for numbers in self.alike():
            inputs = self.inputs(row := self.rows[numbers[0]])
            most = max(inputs, key=self._taps)
            terms = tuple(p for p, _ in inputs)
            candidates.setdefault((most, terms) if self.joint(row) else (inputs,), []).append(numbers)
        found = []
        for alike in candidates.values():
            own = [self.inputs(self.rows[numbers[0]]) for numbers in alike]
            union = own[0] if len(own) == 1 else tuple(dict.fromkeys(one for some in own for one in some))
            if self._count(union) ** 2 <= sum(self._count(inputs) ** 2 for inputs in own):
                found.append(self._batch([number for numbers in alike for number in numbers], union))
            else:
                found += [self._batch(numbers, inputs) for numbers, inputs in zip(alike, own, strict=True)]
        return found

    def _batch(self, numbers: list[int], inputs: Inputs) -> Batch:
        """Return the batch of some rows that read nothing but `inputs`."""
        own, count = [self.inputs(self.rows[number]) for number in numbers], self._count(inputs)
        if own[0] == inputs:  # a row may read one input several times
            places = np.broadcast_to(np.arange(count), (len(own), count))
        else:
            parts = np.split(np.arange(count), np.cumsum([self._taps(one) for one in inputs])[:-1])
            place = dict(zip(inputs, parts, strict=True))
            places = np.stack([np.concatenate([place[one] for one in some]) for some in own])
        return Batch(numbers, inputs, self.joint(self.rows[numbers[0]]), count, places)

    def _taps(self, one: tuple[int, int]) -> int:
        """Return the number of weights of each filter that reads one of a layer's inputs."""
        return int(self.parts[one[0]].kernel.weight[0].size)

    def _count(self, inputs: Inputs) -> int:
        return sum(map(self._taps, inputs))

    def read(self, row: Row) -> Array:
        """Return a mask of a row's weights: those whose input the trained filters read."""
        parts = ((self.parts[p].kernel, c) for p, c in row)
        return np.concatenate([_flat(read_taps(kernel)[c]) for kernel, c in parts])

    def ranges(self, inputs: Inputs) -> Array:
        """Return the growth (n,) of the accumulator's span for one step of a weight of each input."""
        return np.concatenate([np.full(self._taps(one), self.parts[one[0]].range) for one in inputs])

    def greatest(self, numbers: Array) -> Array:
        """Return for each row the greatest of the `numbers` (C,) of the channels that hold its values."""
        found = np.zeros(len(self.rows))
        by_value = np.broadcast_to(along_channels(numbers, self.of_value.ndim), self.of_value.shape)
        np.maximum.at(found, self.of_value, by_value)
        return found

    def joint(self, row: Row) -> bool:
        """Return whether all weights of a row meet in the same windows, so that their inputs covary."""
        return all(self.parts[p].aligned for p, _ in row) and len({p for p, _ in row}) == len(row)

    def covariances(
        self, batch: Batch, windows: Sequence[Array], meant: Sequence[Array], weights: Array
    ) -> tuple[Array, Array]:
        """Return the covariance (n, n) of the inputs of a batch, and theirs with float sums (n, K).

        The inputs are in `windows`. The sums are those of `weights` (K, n) times the inputs in `meant`.
        """
        blocks = _centred(batch, windows)
        ends = np.cumsum([x.shape[1] for x in blocks])[:-1]
        own = np.split(weights, ends, axis=1)
        sums = (y @ w.T for y, w in zip(_centred(batch, meant), own, strict=True))
        with_sums = [x.T @ total / len(x) for x, total in zip(blocks, sums, strict=True)]
        return scipy.linalg.block_diag(*(x.T @ x / len(x) for x in blocks)), np.concatenate(with_sums)

    def of_inputs(self, inputs: Inputs, values: Sequence[Array]) -> Array:
        """Return the values (n,) of some inputs, from those (groups, taps) of each term."""
        return np.concatenate([values[p][group] for p, group in inputs])

    def spread(self, values: Sequence[float], shapes: Sequence[Shape]) -> list[Array]:
        """Return what reaches each term's weights (groups, taps), if its tensor has one value everywhere.

        Steps before the weights only copy, add or drop values. So this turns the mean of independent inputs
        into means, and their variance into variances.
        """
        ones = [np.ones((1, *shape)) for shape in shapes]
        windows = self.windows(ones, [1.0] * len(values), [0] * len(values))
        return [value * found.mean(axis=1) for value, found in zip(values, windows, strict=True)]

    def windows(self, tensors: Sequence[Array], units: Sequence[float], zeros: Sequence[int]) -> list[Array]:
        """Return the inputs of each term's convolution on some images, (groups, windows, taps).

        `zeros` and `units` hold the zero and the unit of each term's tensor.
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

    @np.errstate(over="ignore")  # a step that overflows is refused later, when the bias is divided by it
    def assemble(self, integers: Sequence[Array], scale: Array, ends: tuple[int, int]) -> IntegerTerms:
        """Return the terms with the integers and the scale of each row."""
        terms = tuple(replace(term, factor=1.0) for term in self.terms(integers))
        return IntegerTerms(terms, scale[self.of_value] * self.parts[0].unit, ends)

    def terms(self, values: Sequence[Array]) -> tuple[Term, ...]:
        """Return the terms with other weights, in the first term's unit."""
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
    """Return a mask of the kernel's weights: those whose input some filter of their group reads."""
    weight, groups = kernel.weight, kernel.geometry.groups
    by_group = weight.reshape(groups, len(weight) // groups, *weight.shape[1:])
    read = (by_group != 0).any(axis=1, keepdims=True)
    return np.broadcast_to(read, by_group.shape).reshape(weight.shape)


def _flat(weight: Array) -> Array:
    """Return one filter (C/groups, *k) flat, with channels last as in the rows of im2col."""
    return np.moveaxis(weight, 0, -1).ravel()


def _centred(batch: Batch, windows: Sequence[Array]) -> list[Array]:
    """Return the inputs of a batch that covary (windows, taps), without their means.

    The bias corrects the mean error.
    """
    blocks = [windows[p][group] for p, group in batch.inputs]
    if batch.joint:
        blocks = [np.concatenate(blocks, axis=1)]
    return [x - x.mean(axis=0) for x in blocks]
