"""What of a layer has to be computed: weights that are zero, or read only padding, cost nothing."""

import math
from dataclasses import dataclass, replace

import numpy as np

from fheconv.arithmetic import OUTSIDE, ConvGeometry, tap_sources
from fheconv.arithmetic.matrix import DENSE_LIMIT
from fheconv.arrays import Array
from fheconv.bounds import AccumulatorBounds
from fheconv.network import QuantizedConv


@dataclass(frozen=True, kw_only=True, eq=False)
class Pruned:
    """A convolution without what has no weights: `weight` (K', C'/groups, *k'), and what is left of which."""

    weight: Array
    offset: Array
    geometry: ConvGeometry
    channels: Array
    filters: Array

    def multiply_adds(self, spatial: tuple[int, ...]) -> dict[str, int]:
        """Return the number of multiplications of each engine that can run it."""
        outputs = math.prod(self.geometry.output_size(spatial))
        inputs = len(self.channels) * math.prod(spatial)
        filters = len(self.weight)
        counts = {}
        grids = (self.geometry.grid(axis, size) for axis, size in enumerate(spatial))
        reads = all((grid != OUTSIDE).any() for grid in grids)
        reads = reads and bool(self.weight.any())
        if reads:  # Concrete builds no convolution from nothing but zeros
            counts["conv"] = self.weight.size * outputs
            counts["shifts"] = filters * self.weight.shape[1] * len(self.nonzero_taps()) * outputs
        if 8 * inputs * filters * outputs <= DENSE_LIMIT:
            counts["matrix"] = inputs * filters * outputs
        if reads and self.separated() is not None:
            height, width = self.geometry.kernel
            half = self.geometry.output_size(spatial)[0] * self.geometry.expanded_size(spatial)[1]
            counts["separable"] = filters * (height * half + width * outputs)
        return counts

    def nonzero_taps(self) -> list[tuple[int, ...]]:
        """Return the taps at which some filter has a weight."""
        return [tuple(map(int, tap)) for tap in np.argwhere(self.weight.any(axis=(0, 1)))]

    def separated(self) -> tuple[Array, Array] | None:
        """Return integer columns (K, 1, Hf, 1) and rows (K, 1, 1, Wf) whose product is the weight, or None.

        That is, if every filter reads one channel and has rank one.
        """
        weight = self.weight
        if weight.ndim != 4 or weight.shape[1] != 1 or min(weight.shape[2:]) == 1:
            return None
        # The first row that is not zero, in lowest terms: the other rows must be integer multiples of it.
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


def prune(layer: QuantizedConv, spatial: tuple[int, ...], bounds: AccumulatorBounds) -> Pruned:
    """Leave out of a layer, on inputs of sizes `spatial`, what has no weights or reads no pixel."""
    weight, geometry = layer.weight, layer.geometry
    # Taps that read nothing but padding, wherever the kernel stands, contribute a constant.
    output = geometry.output_size(spatial)
    for axis, size in enumerate(spatial):
        reads = (tap_sources(geometry, axis, size, output[axis]) != OUTSIDE).any(axis=0)
        weight = weight * reads.reshape(-1, *[1] * (len(spatial) - 1 - axis))
    constant = (layer.weight - weight).reshape(len(weight), -1).sum(axis=1) * layer.input.zero_point
    offset = constant - bounds.channel_minimum
    channels, filters = np.arange(weight.shape[1] * geometry.groups), np.arange(len(weight))
    if weight.any():
        # Whole groups, because those that stay must be alike; channels and filters if there is one group.
        by_group = weight.reshape(geometry.groups, -1, *weight.shape[1:])
        groups = np.flatnonzero(by_group.any(axis=tuple(range(1, by_group.ndim))))
        channels = channels.reshape(geometry.groups, -1)[groups].ravel()
        filters = filters.reshape(geometry.groups, -1)[groups].ravel()
        weight = weight[filters]
        if len(groups) == 1:
            read = weight.any(axis=(0, *range(2, weight.ndim)))
            used = weight.any(axis=tuple(range(1, weight.ndim)))
            channels, filters, weight = channels[read], filters[used], weight[used][:, read]
        weight, geometry = _crop(weight, geometry, len(groups))
    return Pruned(
        weight=weight, offset=offset[filters], geometry=geometry, channels=channels, filters=filters
    )


def _crop(weight: Array, geometry: ConvGeometry, groups: int) -> tuple[Array, ConvGeometry]:
    """Cut off the rows, columns… around the kernel in which no filter has a weight."""
    kernel, padding = list(geometry.kernel), list(geometry.padding)
    if geometry.padding_mode == "zeros":  # other paddings cannot be cut
        for axis, dilation in enumerate(geometry.dilation):
            others = tuple(a for a in range(weight.ndim) if a != 2 + axis)
            used = np.flatnonzero(weight.any(axis=others))
            before, after = int(used[0]), int(kernel[axis] - 1 - used[-1])
            kernel[axis] -= before + after
            weight = np.take(weight, range(before, before + kernel[axis]), axis=2 + axis)
            padding[axis] = (padding[axis][0] - before * dilation, padding[axis][1] - after * dilation)
    return weight, replace(geometry, kernel=tuple(kernel), padding=tuple(padding), groups=groups)
