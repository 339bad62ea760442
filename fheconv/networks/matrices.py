"""Turns a sparse matrix, whatever linear operator it is of, into linear steps with few weights.

Each output is a weighted sum of a window of inputs: those with an entry in its column. A selection gathers
the windows, a convolution of one tap weighs them, and another selection puts the sums in place. Outputs whose
windows have the same weights share them. If all weights of a window are equal, the window is a pooling, with
no weights to quantize.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import scipy.sparse

from fheconv.arithmetic import OUTSIDE, ConvGeometry
from fheconv.basics.arrays import Array, Shape, frozen
from fheconv.networks.composition import MOST_CLASSES, MOST_ENTRIES
from fheconv.networks.linear import Kernel, Select, Step, Term, pointwise

# What one more term costs, in multiplications: the selections around it.
TERM_COST = 2000
# Weights are the same if they differ by less than about this share: sums differ in their last bits.
_SAME = 2.0**-40

# Steps, and the factor by which what they give is multiplied.
Chain: TypeAlias = tuple[tuple[Step, ...], float]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Windows:
    """Output positions, the inputs (n, groups, m) that each reads, and the weights (n, K, m).

    `OUTSIDE` among the inputs reads nothing.
    """

    positions: Array
    inputs: Array
    weights: Array

    def part(self, rows: Array) -> "_Windows":
        """Return some of the positions."""
        return _Windows(positions=self.positions[rows], inputs=self.inputs[rows], weights=self.weights[rows])


def matrix_of(terms: Sequence[Term], shape: Shape) -> scipy.sparse.csr_array | None:
    """Return B with `x.reshape(N, -1) @ B` the sum of terms of one source of `shape`, factors included.

    None if it, or a product on the way to it, has more than `MOST_ENTRIES` entries.
    """
    total = None
    for term in terms:
        product = scipy.sparse.csr_array(scipy.sparse.eye_array(math.prod(shape), dtype=np.float64))
        for step, before in zip(term.steps, term.shapes(shape)[:-1], strict=True):
            following = step.matrix(before).astype(np.float64)
            # Each entry meets a row: so many products there are, and no more entries in what they add up to.
            products = int(np.diff(following.indptr)[product.indices].sum())
            if products > 4 * MOST_ENTRIES:
                return None
            product = product @ following
            if product.nnz > MOST_ENTRIES:
                return None
        product = product * term.factor
        total = product if total is None else total + product
    return total


def chains(matrix: scipy.sparse.csr_array, shape: Shape, output: Shape) -> list[Chain]:
    """Return steps from tensors of `shape` to tensors of `output` whose results add up to x·B.

    Example:
        >>> mean = scipy.sparse.csr_array(np.full((4, 1), 0.25))
        >>> [(steps, factor)] = chains(mean, (4,), (1,))
        >>> factor * steps[-1].apply(steps[1].apply(steps[0].apply(np.arange(4.0)[None], 0), 0), 0)
        array([[1.5]])
    """
    channels, filters = shape[0] if shape else 1, output[0] if output else 1
    inner, positions = math.prod(shape[1:]), math.prod(output[1:])
    matrix = scipy.sparse.csr_array(matrix)
    matrix.eliminate_zeros()
    flatten = Select(index=frozen(np.arange(channels * inner)))
    back = Select(index=frozen(np.arange(math.prod(output)).reshape(output)))
    if 2 * matrix.nnz > math.prod(matrix.shape) and not _is_flat(matrix.data):
        # There are no windows to find, and they would take much memory.
        return [((flatten, pointwise(matrix.toarray().T, 0), back), 1.0)]
    if channels == filters:
        first = scipy.sparse.csr_array(matrix[:inner, :positions])
        every = scipy.sparse.kron(scipy.sparse.eye_array(channels), first, format="csr")
        if (abs(matrix - every) - _SAME * abs(every)).max() <= 0:
            return channelwise(first, shape, output)
    groups = _groups(matrix, channels, filters, inner, positions)
    windows = list(_windows(matrix, groups, filters, positions))
    classes = [part for one in windows for part in _classes(one)]
    entries = sum(one.weights.size for one in windows)
    costs = {
        "classes": entries + sum(one.weights[0].size + TERM_COST for one in classes),
        "apart": 2 * entries + TERM_COST * len(windows),
        "dense": 2 * math.prod(matrix.shape) + TERM_COST,
    }
    if len(classes) > MOST_CLASSES:
        del costs["classes"]
    chosen = min(costs, key=lambda name: costs[name])
    if chosen == "dense":
        return [((flatten, pointwise(matrix.toarray().T, 0), back), 1.0)]
    made = _class if chosen == "classes" else _apart
    return [made(one, output) for one in (classes if chosen == "classes" else windows)]


def channelwise(matrix: scipy.sparse.csr_array, shape: Shape, output: Shape) -> list[Chain]:
    """Return steps that do to each channel of tensors of `shape` what x·B does, as in `chains`."""
    channels = shape[0] if shape else 1
    inner, positions = math.prod(shape[1:]), math.prod(output[1:])
    windows = list(_windows(scipy.sparse.csr_array(matrix), 1, 1, positions))
    classes = [part for one in windows for part in _classes(one)]
    entries = sum(one.weights.size for one in windows)
    # Those of poolings are none.
    own = sum(0 if _is_flat(one.weights[0]) else channels * one.weights[0].size for one in classes)
    costs = {
        "classes": channels * entries + own + TERM_COST * len(classes),
        "apart": 2 * channels * entries + TERM_COST * len(windows),
        "dense": (channels + 1) * inner * positions + TERM_COST,
    }
    if len(classes) > MOST_CLASSES:
        del costs["classes"]
    chosen = min(costs, key=lambda name: costs[name])
    if chosen == "classes":
        return [_channelwise_class(one, channels, inner, output) for one in classes]
    if chosen == "dense":
        places = np.arange(channels * inner).reshape(channels, inner).T
        back = np.arange(positions * channels).reshape(positions, channels).T.reshape(output)
        weight = pointwise(matrix.toarray().T, 1)
        return [((Select(index=frozen(places)), weight, Select(index=frozen(back))), 1.0)]
    found = []
    for one in windows:
        inputs = _in_channels(one.inputs[:, 0], channels, inner).reshape(-1, 1, one.inputs.shape[2])
        every = (np.arange(channels)[:, None] * positions + one.positions).ravel()
        weights = np.tile(one.weights, (channels, 1, 1))
        flat = _Windows(positions=every, inputs=inputs, weights=weights)
        found.append(_apart(flat, (1, channels * positions), output))
    return found


def _groups(matrix: scipy.sparse.csr_array, channels: int, filters: int, inner: int, positions: int) -> int:
    """Return the most groups of channels that do not read one another."""
    entries = matrix.tocoo()
    read = entries.coords[0] // inner
    made = entries.coords[1] // positions
    most = math.gcd(channels, filters)
    return max(
        groups
        for groups in range(1, most + 1)
        if most % groups == 0 and (read * groups // channels == made * groups // filters).all()
    )


def _windows(matrix: scipy.sparse.csr_array, groups: int, filters: int, positions: int) -> Iterator[_Windows]:
    """Yield the windows of all output positions that read something, those of about one size together."""
    entries = matrix.tocoo()
    rows, columns = (axis.astype(np.int64) for axis in entries.coords)
    filter_, position = np.divmod(columns, positions)
    window = position * groups + filter_ * groups // filters
    # The place of each entry's input among those that its window reads.
    pairs, inverse = np.unique(window * matrix.shape[0] + rows, return_inverse=True)
    owner = pairs // matrix.shape[0]
    counts = np.bincount(owner, minlength=positions * groups)
    slot = (np.arange(len(pairs)) - (np.cumsum(counts) - counts)[owner])[inverse.ravel()]
    most = counts.reshape(positions, groups).max(axis=1)
    for size in np.unique(np.ceil(np.log2(most[most > 0]))):
        own = np.flatnonzero((most > 0) & (np.ceil(np.log2(np.maximum(most, 1))) == size))
        width = int(most[own].max())
        number = np.full(positions, OUTSIDE)
        number[own] = np.arange(len(own))
        here = number[position] != OUTSIDE
        inputs = np.full((len(own), groups, width), OUTSIDE)
        weights = np.zeros((len(own), filters, width))
        place = number[position[here]], slot[here]
        inputs[place[0], filter_[here] * groups // filters, place[1]] = rows[here]
        weights[place[0], filter_[here], place[1]] = entries.data[here]
        yield _Windows(positions=own, inputs=inputs, weights=weights)


def _classes(windows: _Windows) -> list[_Windows]:
    """Return the windows in parts that have the same weights."""
    flat = windows.weights.reshape(len(windows.positions), -1)
    mantissa, exponent = np.frexp(flat)
    rounded = np.ldexp(np.rint(mantissa / _SAME) * _SAME, exponent) + 0.0  # no negative zeros
    # As bytes, because numpy makes a field of each column otherwise, and there may be millions.
    rows = rounded.view(np.dtype((np.void, rounded.itemsize * rounded.shape[1]))).ravel()
    _, member = np.unique(rows, return_inverse=True)
    order = np.argsort(member.ravel(), kind="stable")
    ends = np.cumsum(np.bincount(member.ravel()))[:-1]
    parts = [windows.part(rows) for rows in np.split(order, ends)]
    return [replace(part, inputs=part.inputs[..., used], weights=part.weights[..., used])
            for part in parts for used in [(part.weights[0] != 0).any(axis=0)]]  # fmt: skip


def _is_flat(weight: Array) -> bool:
    """Return whether all weights that are not zero are the same."""
    values = weight[weight != 0]
    return bool((np.abs(values - values[0]) <= _SAME * np.abs(values[0])).all())


def _class(windows: _Windows, output: Shape) -> Chain:
    """Return the chain of positions that share their weights."""
    count, groups, width = windows.inputs.shape
    gather = Select(index=frozen(windows.inputs.transpose(1, 2, 0).reshape(groups * width, count)))
    weight = pointwise(windows.weights[0], 1, groups=groups)
    return (gather, weight, _scatter(windows.positions, output)), 1.0


def _channelwise_class(windows: _Windows, channels: int, inner: int, output: Shape) -> Chain:
    """Return the chain of positions that share their weights in every channel."""
    inputs = _in_channels(windows.inputs[:, 0], channels, inner)
    weight, width = windows.weights[0], windows.inputs.shape[2]
    flat = _is_flat(weight)
    factor = float(weight.ravel()[0]) if flat else 1.0
    if flat and width == 1:
        places = np.full((channels, math.prod(output[1:])), OUTSIDE)
        places[:, windows.positions] = inputs[..., 0]
        return (Select(index=frozen(places.reshape(output))),), factor
    each = np.ones_like(weight, np.int64) if flat else weight
    kernel = Kernel(
        weight=frozen(np.broadcast_to(each[:, None, None], (channels, 1, 1, width))),
        geometry=ConvGeometry.of((1, width), groups=channels),
        exact=flat,
    )
    return (Select(index=frozen(inputs)), kernel, _scatter(windows.positions, output)), factor


def _apart(windows: _Windows, output: Shape, shaped: Shape | None = None) -> Chain:
    """Return the chain of positions each of which has weights of its own."""
    count, groups, width = windows.inputs.shape
    filters = windows.weights.shape[1]
    gather = Select(index=frozen(windows.inputs.ravel()))
    kernel = pointwise(windows.weights.reshape(count * filters, width), 0, groups=count * groups)
    index = np.full((filters, math.prod(output[1:])), OUTSIDE)
    index[:, windows.positions] = np.arange(count * filters).reshape(count, filters).T
    return (gather, kernel, Select(index=frozen(index.reshape(output if shaped is None else shaped)))), 1.0


def _scatter(positions: Array, output: Shape) -> Select:
    """Return the selection that puts results (K, positions) where they belong."""
    filters = output[0] if output else 1
    index = np.full((filters, math.prod(output[1:])), OUTSIDE)
    index[:, positions] = np.arange(filters * len(positions)).reshape(filters, -1)
    return Select(index=frozen(index.reshape(output)))


def _in_channels(inputs: Array, channels: int, inner: int) -> Array:
    """Return flat positions in one channel as those in each of several."""
    every = np.arange(channels).reshape(-1, *[1] * inputs.ndim) * inner + inputs
    return np.where(inputs == OUTSIDE, OUTSIDE, every)
