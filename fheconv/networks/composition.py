"""Merges convolutions in a row, with no activation between them, into convolutions.

Two convolutions one after the other read, for each output, a window of the first one's input. Where the
second pads, or where one of them inserts zeros, some outputs see other weights than the rest: those at the
border, or every other one. Outputs that see the same weights form a class, and each class is one convolution.
Without padding between the two there is one class: the product is a convolution.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from string import ascii_lowercase, ascii_uppercase

import numpy as np

from fheconv.arithmetic import OUTSIDE, ConvGeometry, tap_sources
from fheconv.basics.arrays import Array, Shape, frozen
from fheconv.networks.linear import Kernel, Select, Step, Term, blocks

# Positions of an image beyond its border count on, so that its own padding makes no classes. This is none.
_HOLE = np.iinfo(np.int64).min
# More classes than this cost more than they save: each is a convolution of its own in the circuit.
MOST_CLASSES = 64
# The weights that a product may have, and the entries of a matrix on its way to become steps: 200 megabytes.
MOST_ENTRIES = 2**24


@dataclass(frozen=True, kw_only=True, eq=False)
class _Class:
    """Output positions along one axis that see the same weights.

    Output number i of `outputs` reads the window that starts at input position `start` + i·`stride`, with
    `dilation` between its taps. `taps` (window, taps of the second, taps of the first) says which pairs of
    taps meet at each place of the window.
    """

    outputs: Array
    start: int
    stride: int
    dilation: int
    taps: Array


def composed(term: Term, shape: Shape) -> list[Term] | None:
    """Return terms that add up to a term and quantize one convolution each, for a source of `shape`.

    Only convolutions that follow one another directly are merged. None if others are left, or if there are
    more than `MOST_CLASSES` classes, or more than `MOST_ENTRIES` weights.
    """
    first, *_ = term.inexact()
    last = term.inexact()[-1]
    run = [step for step in term.steps[first : last + 1] if isinstance(step, Kernel)]
    if len(run) != last + 1 - first:
        return None
    shapes = term.shapes(shape)[first:]
    pieces: list[tuple[Kernel, Select | None]] = [(run[-1], None)]
    for at in reversed(range(len(run) - 1)):
        merged: list[tuple[Kernel, Select | None]] = []
        if sum(_size(run[at], second, shapes[at]) for second, _ in pieces) > MOST_ENTRIES:
            return None
        for second, scatter in pieces:
            for inner, place in merge(run[at], second, shapes[at]):
                merged.append((inner, _then(place, scatter)))
                if len(merged) > MOST_CLASSES:
                    return None
        pieces = merged
    terms = []
    for kernel, scatter in pieces:
        steps: tuple[Step, ...] = (kernel,) if scatter is None else (kernel, scatter)
        made = Term(source=term.source, steps=(*term.steps[:first], *steps), factor=term.factor)
        for step in term.steps[last + 1 :]:
            made = made.then(step, shape)
        terms.append(made)
    return terms


def _then(first: Select | None, second: Select | None) -> Select | None:
    if first is None or second is None:
        return second if first is None else first
    index = np.where(second.index == OUTSIDE, OUTSIDE, first.index.ravel()[second.index])
    return Select(index=frozen(index))


def merge(first: Kernel, second: Kernel, shape: Shape) -> Iterator[tuple[Kernel, Select | None]]:
    """Yield convolutions that add up to `second` after `first`, on inputs of `shape`.

    Each comes with the selection that puts its results where they belong, None if they are all there is.
    Outputs that read nothing are left out.

    Example:
        >>> three = Kernel(weight=np.ones((1, 1, 3)), geometry=ConvGeometry.of((3,)))
        >>> [(kernel, place)] = merge(three, three, (1, 8))
        >>> kernel.weight, place
        (array([[[1., 2., 3., 2., 1.]]]), None)
    """
    output = second.output_shape(first.output_shape(shape))
    axes = _axes(first, second, shape)
    for classes in product(*axes):
        kernel = _kernel(first, second, classes, shape)
        counts = [len(one.outputs) for one in classes]
        if counts == list(output[1:]):
            yield kernel, None
            continue
        index = np.full(output, OUTSIDE)
        where = np.ix_(np.arange(output[0]), *(one.outputs for one in classes))
        index[where] = np.arange(output[0] * math.prod(counts)).reshape(output[0], *counts)
        yield kernel, Select(index=frozen(index))


def _axes(first: Kernel, second: Kernel, shape: Shape) -> list[list[_Class]]:
    """Return the classes of each axis."""
    middle = first.output_shape(shape)
    output = second.output_shape(middle)
    return [
        _classes(first.geometry, second.geometry, axis, shape[1 + axis], middle[1 + axis], output[1 + axis])
        for axis in range(len(shape) - 1)
    ]


def _size(first: Kernel, second: Kernel, shape: Shape) -> int:
    """Return how many weights the product of two convolutions has, for inputs of `shape`."""
    groups = math.gcd(first.geometry.groups, second.geometry.groups)
    windows = (sum(len(one.taps) for one in classes) for classes in _axes(first, second, shape))
    return len(second.weight) * (shape[0] // groups) * math.prod(windows)


def _classes(
    first: ConvGeometry, second: ConvGeometry, axis: int, size: int, middle: int, outputs: int
) -> list[_Class]:
    """Return the classes of the output positions of one axis, those left out that read nothing."""
    reads = tap_sources(second, axis, middle, outputs)
    sources = np.where((reads == OUTSIDE)[..., None], _HOLE, _sources(first, axis, size, middle)[reads])
    hole = sources == _HOLE
    base = np.where(hole, np.iinfo(np.int64).max, sources).min(axis=(1, 2))
    pattern = np.where(hole, _HOLE, sources - base[:, None, None])
    _, member = np.unique(pattern.reshape(outputs, -1), axis=0, return_inverse=True)
    found = []
    for number in range(int(member.max()) + 1):
        alike = np.flatnonzero(member.ravel() == number)
        own = pattern[alike[0]]
        if (own == _HOLE).all():
            continue
        offsets = own[own != _HOLE]
        dilation = int(np.gcd.reduce(offsets)) or 1
        window = np.arange(int(offsets.max()) // dilation + 1) * dilation
        for run in _progressions(base[alike]):
            starts = base[alike[run]]
            found.append(
                _Class(
                    outputs=alike[run],
                    start=int(starts[0]),
                    stride=int(starts[1] - starts[0]) if len(starts) > 1 else 1,
                    dilation=dilation,
                    taps=(own == window[:, None, None]).astype(np.int64),
                )
            )
    return found


def _sources(geometry: ConvGeometry, axis: int, size: int, outputs: int) -> Array:
    """Return the input position that each (output, tap) reads, also beyond the border, `_HOLE` for none."""
    if geometry.padding_mode != "zeros":
        return tap_sources(geometry, axis, size, outputs)
    start = np.arange(outputs)[:, None] * geometry.stride[axis] - geometry.padding[axis][0]
    place = start + np.arange(geometry.kernel[axis]) * geometry.dilation[axis]
    source, between = np.divmod(place, geometry.input_dilation[axis])
    return np.where(between == 0, source, _HOLE)


def _progressions(starts: Array) -> list[slice]:
    """Return slices of `starts` in each of which they rise by equal steps."""
    found, begin = [], 0
    for end in range(1, len(starts) + 1):
        run = starts[begin : end + 1]
        if end == len(starts) or run[1] <= run[0] or run[-1] - run[-2] != run[1] - run[0]:
            found.append(slice(begin, end))
            begin = end
    return found


def _kernel(first: Kernel, second: Kernel, classes: Sequence[_Class], shape: Shape) -> Kernel:
    """Return the convolution of one class of outputs."""
    groups = math.gcd(first.geometry.groups, second.geometry.groups)
    size = tuple(len(one.taps) for one in classes)
    padding = []
    for one, length, window in zip(classes, shape[1:], size, strict=True):
        extent = (len(one.outputs) - 1) * one.stride + (window - 1) * one.dilation + 1
        padding.append((-one.start, extent - length + one.start))
    axes = len(classes)
    outer, inner, windows = ascii_lowercase[:axes], ascii_uppercase[:axes], ascii_lowercase[axes : 2 * axes]
    taps = ",".join(f"{w}{o}{i}" for w, o, i in zip(windows, outer, inner, strict=True))
    formula = f"YZ{outer},ZX{inner}" + (f",{taps}" if taps else "") + f"->YX{windows}"
    weight = np.concatenate(
        [
            np.einsum(formula, b, a, *(one.taps for one in classes), optimize=True)
            for b, a in zip(blocks(second, groups), blocks(first, groups), strict=True)
        ]
    )
    geometry = ConvGeometry(
        kernel=size,
        stride=tuple(one.stride for one in classes),
        padding=tuple(padding),
        dilation=tuple(one.dilation for one in classes),
        groups=groups,
        padding_mode="zeros",
        input_dilation=(1,) * axes,
    )
    return Kernel(weight=frozen(weight), geometry=geometry)
