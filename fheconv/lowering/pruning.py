"""Removes work that nobody reads from a convolution, and weights that are zero."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fheconv.arithmetic import OUTSIDE
from fheconv.basics.arrays import Array, Shape
from fheconv.networks.linear import Kernel


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Positions in a tensor of shape `within`: all combinations of the positions along `axes`.

    A position along an axis may be `OUTSIDE`. Then every combination with it is `OUTSIDE`.
    """

    axes: tuple[Array, ...]
    within: Shape

    @property
    def shape(self) -> Shape:
        """The number of positions along each axis."""
        return tuple(map(len, self.axes))

    @property
    def inside(self) -> bool:
        """True if any position lies in the tensor."""
        return all((axis != OUTSIDE).any() for axis in self.axes)

    @cached_property
    def flat(self) -> Array:
        """The flat positions, an array of `shape`. Where an axis is `OUTSIDE`, so are they.

        The array is made when it is first used.
        """
        grids = np.meshgrid(*self.axes, indexing="ij")
        outside = np.any([grid == OUTSIDE for grid in grids], axis=0)
        position = np.ravel_multi_index(tuple(np.where(outside, 0, grid) for grid in grids), self.within)
        return np.where(outside, OUTSIDE, position)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plain:
    """A convolution without padding that does the remaining work of a kernel.

    `weight` (K', C'/groups, *k') are the remaining weights.
    `inputs` (C', *S') are the values of the kernel's input that it reads, `OUTSIDE` for the padding.
    `outputs` (K', *Out') are the values of the kernel's output that it computes.
    """

    weight: Array
    inputs: Grid
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    outputs: Grid

    def nonzero_taps(self) -> list[tuple[int, ...]]:
        """Return the taps at which some filter has a weight that is not zero."""
        return [tuple(map(int, tap)) for tap in np.argwhere(self.weight.any(axis=(0, 1)))]

    def separated(self) -> tuple[Array, Array] | None:
        """Return integer columns (K', 1, Hf, 1) and rows (K', 1, 1, Wf) whose product is the weight, or None.

        They exist if every filter reads one channel and has rank one.
        """
        weight = self.weight
        if weight.ndim != 4 or weight.shape[1] != 1 or min(weight.shape[2:]) == 1:
            return None
        # The first row that is not zero, in lowest terms. The other rows must be integer multiples of it.
        first = np.argmax(weight[:, 0].any(axis=2), axis=1)
        row = weight[np.arange(len(weight)), 0, first]
        row = row // np.maximum(np.gcd.reduce(row, axis=1), 1)[:, None]
        pivot = np.argmax(row != 0, axis=1)
        at = np.arange(len(weight))
        unit = row[at, pivot]
        column = weight[at, 0, :, pivot] // np.where(unit == 0, 1, unit)[:, None]
        if (column[:, :, None] * row[:, None, :] != weight[:, 0]).any():
            return None
        return column[:, None, :, None], row[:, None, None, :]


def prune(kernel: Kernel, shape: Shape, wanted: Array) -> Plain:
    """Return the part of a kernel that must be computed, on inputs of `shape` padded with 0.

    `wanted` is a mask (K, *Out) of the outputs that are read. Outputs are computed on a grid, so unread
    outputs that lie between read ones on the grid are computed too.
    """
    geometry, weight = kernel.geometry, kernel.weight
    grids, starts, steps, counts, outputs = [], [], [], [], []
    for axis, size in enumerate(shape[1:]):
        others = tuple(a for a in range(wanted.ndim) if a != 1 + axis)
        read = np.flatnonzero(wanted.any(axis=others))
        if not len(read):
            read = np.zeros(1, np.int64)
        step = int(np.gcd.reduce(np.diff(read))) or 1
        outputs.append(np.arange(read[0], read[-1] + 1, step))
        starts.append(int(read[0]) * geometry.stride[axis])
        steps.append(step * geometry.stride[axis])
        counts.append(len(outputs[-1]))
        grids.append(geometry.grid(axis, size))
    # Taps that read nothing but padding add nothing.
    for axis, grid in enumerate(grids):
        places = starts[axis] + np.arange(counts[axis])[:, None] * steps[axis]
        taps = places + np.arange(geometry.kernel[axis]) * geometry.dilation[axis]
        reads = (grid[taps] != OUTSIDE).any(axis=0)
        weight = weight * reads.reshape(-1, *[1] * (len(grids) - 1 - axis))
    groups = geometry.groups
    channels, filters = np.arange(shape[0]), np.arange(len(weight))
    used = weight.reshape(len(weight), -1).any(axis=1) & wanted.reshape(len(weight), -1).any(axis=1)
    if used.any():
        # With several groups only whole groups are removed, because all groups must have the same size.
        # With one group, single channels and filters are removed.
        alive = np.flatnonzero(used.reshape(groups, -1).any(axis=1))
        channels = channels.reshape(groups, -1)[alive].ravel()
        filters = filters.reshape(groups, -1)[alive].ravel()
        weight, groups = weight[filters], len(alive)
        if groups == 1:
            weight, filters = weight[used[filters]], filters[used[filters]]
            read_channels = weight.any(axis=(0, *range(2, weight.ndim)))
            channels, weight = channels[read_channels], weight[:, read_channels]
    # Remove the outer rows, columns… of the kernel in which no filter has a weight.
    for axis, dilation in enumerate(geometry.dilation):
        others = tuple(a for a in range(weight.ndim) if a != 2 + axis)
        taps = np.flatnonzero(weight.any(axis=others)) if weight.any() else np.arange(weight.shape[2 + axis])
        weight = np.take(weight, range(taps[0], taps[-1] + 1), axis=2 + axis)
        begin = starts[axis] + int(taps[0]) * dilation
        extent = (counts[axis] - 1) * steps[axis] + (weight.shape[2 + axis] - 1) * dilation + 1
        grids[axis] = grids[axis][begin : begin + extent]
    return Plain(
        weight=weight,
        inputs=Grid(axes=(channels, *grids), within=shape),
        stride=tuple(steps),
        dilation=geometry.dilation,
        groups=groups,
        outputs=Grid(axes=(filters, *outputs), within=wanted.shape),
    )
