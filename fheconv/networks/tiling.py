"""Cuts images into tiles for a network of one convolution, and puts together what comes of the tiles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from fheconv.arithmetic.geometry import PerAxis, expand, per_axis
from fheconv.basics.arrays import Array
from fheconv.basics.errors import InvalidArgumentError
from fheconv.networks.floats import Conv, Network
from fheconv.networks.integers import IntegerNetwork
from fheconv.networks.linear import Kernel, Term

N = TypeVar("N", bound=IntegerNetwork)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tiling:
    """Says how images of any size are cut for a convolution, `kernel`.

    A tile gives `tile` outputs along each axis, and reads `window` pixels. The next one begins `step` pixels
    later. `zero` is the integer of padding.
    """

    kernel: Kernel
    zero: int
    tile: tuple[int, ...]
    window: tuple[int, ...]
    step: tuple[int, ...]

    @classmethod
    def of(cls, network: IntegerNetwork, tile: PerAxis) -> "Tiling":
        """Return the tiling for a network. Raises `InvalidArgumentError` if it is no single convolution."""
        kernel = network.last.convolution
        if kernel is None or len(network.layers) > 1:
            raise InvalidArgumentError(
                "Tiles are for networks of a single convolution; fheconv.compile takes others."
            )
        geometry = kernel.geometry
        sizes = per_axis(tile, len(geometry.kernel), "tile", 1)
        window = tuple(
            (size - 1) * step + extent
            for size, step, extent in zip(sizes, geometry.stride, geometry.extent, strict=True)
        )
        step = tuple(size * step for size, step in zip(sizes, geometry.stride, strict=True))
        return cls(kernel=kernel, zero=network.input.zero_point, tile=sizes, window=window, step=step)

    def network_of_tile(self, network: N) -> N:
        """Return the network for one tile."""
        geometry, axes = self.kernel.geometry, len(self.tile)
        plain = replace(geometry, padding=((0, 0),) * axes, padding_mode="zeros", input_dilation=(1,) * axes)
        window = (network.input_shape[0], *self.window)
        conv = Conv(name=network.last.name, weight=self.kernel.weight, bias=None, geometry=plain)
        term = Term(source=0, steps=(replace(self.kernel, geometry=plain),))
        layer = replace(network.last, shape=(len(self.kernel.weight), *self.tile), terms=(term,))
        return replace(network, layers=(layer,), observed=(None,), source=Network.of(conv, window))

    def counts(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Return how many tiles an image of sizes `spatial` has along each axis.

        Raises `InvalidArgumentError` for sizes from which there is no output.
        """
        sizes = per_axis(spatial, len(self.tile), "spatial", 1)
        output = self.kernel.geometry.output_size(sizes)
        return tuple(-(-size // tile) for size, tile in zip(output, self.tile, strict=True))

    def windows(self, q: Array) -> Array:
        """Return a view of the tiles of an integer image (C, *S): (*counts, C, *window)."""
        counts = self.counts(q.shape[1:])
        expanded = expand(q[None], self.kernel.geometry, self.zero)[0]
        ends = [(n - 1) * step + size for n, step, size in zip(counts, self.step, self.window, strict=True)]
        # Cut off pixels that no output reads, and fill up the last tiles.
        cropped = expanded[(slice(None), *map(slice, ends))]
        missing = [(0, end - size) for end, size in zip(ends, cropped.shape[1:], strict=True)]
        full = np.pad(cropped, [(0, 0), *missing], constant_values=self.zero)
        views: Array = np.lib.stride_tricks.sliding_window_view(  # type: ignore[call-overload]
            full, self.window, axis=tuple(range(1, full.ndim))
        )
        views = views[(slice(None), *(slice(None, None, step) for step in self.step))]
        return np.moveaxis(views, 0, len(counts))

    def assembled(self, tiles: Mapping[int, Array], spatial: Sequence[int]) -> Array:
        """Return the outputs (K, *Out) of an image of sizes `spatial` from those of its tiles, by number."""
        counts = self.counts(spatial)
        output = self.kernel.geometry.output_size(spatial)
        y = np.empty((len(self.kernel.weight), *output), np.int64)
        for number, tile in tiles.items():
            at = np.unravel_index(number, counts)
            where = tuple(
                slice(int(n) * size, min((int(n) + 1) * size, end))
                for n, size, end in zip(at, self.tile, output, strict=True)
            )
            y[(slice(None), *where)] = tile[(slice(None), *(slice(w.stop - w.start) for w in where))]
        return y
