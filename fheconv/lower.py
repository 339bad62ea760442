"""From the integer network to one function that numpy and Concrete both run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fheconv.arithmetic import OUTSIDE, ConvGeometry, conv, expand
from fheconv.arithmetic.matrix import DENSE_LIMIT, csr_filter_matrix
from fheconv.arrays import Array
from fheconv.bounds import AccumulatorBounds, accumulator_bounds, worst_case_inputs
from fheconv.config import Engine
from fheconv.errors import InvalidArgumentError
from fheconv.network import QuantizedConv, QuantizedNetwork
from fheconv.pruning import Pruned, prune

# Microseconds of one multiply-add, measured by tests/benchmarks/engines.py. Only their ratios matter: they
# choose the engine.
UNIT_COST = {"conv": 1.2, "separable": 2.6, "shifts": 2.7, "matrix": 0.3}


@dataclass(frozen=True, kw_only=True, eq=False)
class Lowered:
    """The circuit's function, and what it takes to feed it and to read its results.

    `function` maps integer images (1, C, *S), numpy array or Concrete tracer, to accumulators in offset
    form (1, K, *Out): never negative, at most `bits` wide, by the proof in `bounds` (which leaves the
    bias out). Only the input channels `channels` and the output channels `filters` take part; the others
    have no weights. `reason` says why `engine` was taken, `multiply_adds` what it costs.

    `lanes` images ride in one: image i is shifted up by i·`lane_bits`, and because every result lies between
    0 and 2^lane_bits − 1, no lane borrows from or carries into another.
    """

    function: Callable[[Any], Any]
    layer: QuantizedConv
    spatial: tuple[int, ...]
    bounds: AccumulatorBounds
    channels: Array
    filters: Array
    engine: str
    reason: str
    multiply_adds: int
    lanes: int

    @property
    def lane_bits(self) -> int:
        """The proved width of one image's results."""
        return max(self.bounds.offset_bits, 1)

    @property
    def bits(self) -> int:
        """The proved width of the function's results, all lanes together."""
        return self.bounds.offset_bits + (self.lanes - 1) * self.lane_bits

    def prepare(self, q: Array) -> Array:
        """Return what the circuit takes for integer images (N, C, *S): (⌈N / lanes⌉, C', *S)."""
        empty = -len(q) % self.lanes
        filler = np.full((empty, *q.shape[1:]), self.layer.input.zero_point)
        by_lane = np.concatenate([q, filler])[:, self.channels].reshape(
            (len(q) + empty) // self.lanes, self.lanes, len(self.channels), *q.shape[2:]
        )
        return np.tensordot(by_lane, _lane_steps(self.lanes, self.lane_bits), axes=(1, 0))

    def worst_cases(self) -> Array:
        """Return inputs of the circuit on which each channel attains its minimum and its maximum."""
        worst = worst_case_inputs(self.layer, self.spatial, self.bounds)
        return self.prepare(np.repeat(worst, self.lanes, axis=0))

    def accumulators(self, results: Array, images: int) -> Array:
        """Return the accumulators (N, K, *Out), bias included, of the function's results for N images."""
        lanes = (
            results[:, None] >> np.arange(self.lanes).reshape(-1, *[1] * (results.ndim - 1)) * self.lane_bits
        )
        if self.lanes > 1:
            lanes &= 2**self.lane_bits - 1
        lanes = lanes.reshape(len(results) * self.lanes, *results.shape[1:])[:images]
        shift = self.layer.bias + self.bounds.channel_minimum
        y = np.zeros((images, len(shift), *results.shape[2:]), np.int64)
        y[:, self.filters] = lanes
        return y + shift.reshape(-1, *[1] * len(self.spatial))


def _lane_steps(lanes: int, lane_bits: int) -> Array:
    """Return what one step of each lane is worth, (lanes,)."""
    return 1 << np.arange(lanes) * lane_bits


def lower(network: QuantizedNetwork, engine: Engine = "auto", lanes: int = 1) -> Lowered:
    """Return the function of a network, by the engine named or by the one that is predicted cheapest.

    `lanes` images ride in one (see `Lowered`); the caller checks that so many bits can be held.

    What has no weights is left out first: input and output channels, and rows and columns around the
    kernel. The offset (minus each channel's attainable minimum) goes into the convolution's own bias,
    because a separate addition is one more node whose width Concrete measures.

    Raises `InvalidArgumentError` if the engine named cannot run the layer.
    """
    (layer,) = network.layers
    spatial = network.input_shape[1:]
    bounds = accumulator_bounds(
        layer.weight,
        layer.geometry,
        spatial,
        (layer.input.minimum, layer.input.maximum),
        pad_value=layer.input.zero_point,
    )
    pruned = prune(layer, spatial, bounds)
    counts = pruned.multiply_adds(spatial)
    if engine == "auto":
        predicted = {name: counts[name] * UNIT_COST[name] / 1000 for name in counts}
        chosen = min(predicted, key=predicted.__getitem__)
        shown = ", ".join(f"{name} {ms:,.3g}" for name, ms in sorted(predicted.items(), key=lambda p: p[1]))
        reason = f"cheapest predicted, in ms: {shown}"
    else:
        chosen, reason = engine, "asked for"
    if chosen not in counts:
        raise InvalidArgumentError(
            f"engine={chosen!r} cannot run layer {layer.name!r}; those that can are {', '.join(counts)}. "
            + _WHY[chosen]
        )
    # What is the same for every lane is there in each of them.
    every = int(_lane_steps(lanes, max(bounds.offset_bits, 1)).sum())
    pruned = replace(pruned, offset=pruned.offset * every)
    return Lowered(
        function=_MAKERS[chosen](pruned, spatial, layer.input.zero_point * every),
        layer=layer,
        spatial=spatial,
        bounds=bounds,
        channels=pruned.channels,
        filters=pruned.filters,
        engine=chosen,
        reason=reason,
        multiply_adds=counts[chosen],
        lanes=lanes,
    )


def _conv_function(pruned: Pruned, spatial: tuple[int, ...], zero: int) -> Callable[[Any], Any]:
    def function(x: Any) -> Any:
        return _conv(_expand(x, pruned.geometry, zero), pruned.weight, pruned.offset, pruned.geometry)

    return function


def _separable_function(pruned: Pruned, spatial: tuple[int, ...], zero: int) -> Callable[[Any], Any]:
    separated = pruned.separated()
    if separated is None:
        raise InvalidArgumentError(_WHY["separable"])
    columns, rows = separated
    geometry = pruned.geometry
    down, across = (
        replace(
            geometry,
            kernel=kernel.shape[2:],
            stride=(geometry.stride[0], 1) if axis == 0 else (1, geometry.stride[1]),
            dilation=(geometry.dilation[0], 1) if axis == 0 else (1, geometry.dilation[1]),
            groups=geometry.groups if axis == 0 else len(pruned.weight),
        )
        for axis, kernel in enumerate((columns, rows))
    )

    def function(x: Any) -> Any:
        half = _conv(_expand(x, geometry, zero), columns, np.zeros_like(pruned.offset), down)
        return _conv(half, rows, pruned.offset, across)

    return function


def _shifts_function(pruned: Pruned, spatial: tuple[int, ...], zero: int) -> Callable[[Any], Any]:
    geometry = pruned.geometry
    output = geometry.output_size(spatial)
    taps = pruned.nonzero_taps()
    one = replace(
        geometry,
        kernel=(1,) * len(spatial),
        stride=(1,) * len(spatial),
        dilation=(1,) * len(spatial),
    )

    def function(x: Any) -> Any:
        x = _expand(x, geometry, zero)
        y = None
        for tap in taps:
            shifted = x[
                (
                    slice(None),
                    slice(None),
                    *(
                        slice(t * d, t * d + (o - 1) * s + 1, s)
                        for t, o, s, d in zip(tap, output, geometry.stride, geometry.dilation, strict=True)
                    ),
                )
            ]
            weight = pruned.weight[(slice(None), slice(None), *(slice(t, t + 1) for t in tap))]
            offset = pruned.offset if y is None else np.zeros_like(pruned.offset)
            term = _conv(shifted, weight, offset, one)
            y = term if y is None else y + term
        return y

    return function


def _matrix_function(pruned: Pruned, spatial: tuple[int, ...], zero: int) -> Callable[[Any], Any]:
    geometry = pruned.geometry
    output = geometry.output_size(spatial)
    matrix = csr_filter_matrix(pruned.weight, geometry, spatial, output).toarray()
    # The matrix reads no padding: what a zero-point there would have added is a constant.
    border = expand(np.zeros((1, len(pruned.channels), *spatial), np.int64), geometry, zero)
    constant = _conv(border, pruned.weight, pruned.offset, geometry).reshape(1, -1)

    def function(x: Any) -> Any:
        y = x.reshape((x.shape[0], len(matrix))) @ matrix + constant
        return y.reshape((x.shape[0], len(pruned.weight), *output))

    return function


_MAKERS = {
    "conv": _conv_function,
    "separable": _separable_function,
    "shifts": _shifts_function,
    "matrix": _matrix_function,
}
_WHY = {
    "conv": "It has no weights, or reads nothing but padding.",
    "shifts": "It has no weights, or reads nothing but padding.",
    "matrix": f"The dense matrix would take more than {DENSE_LIMIT / 2**30:.0f} GiB.",
    "separable": "Two passes need 2-d filters that read one channel each and have rank one.",
}


# The operations that numpy and Concrete spell differently.


def _expand(x: Any, geometry: ConvGeometry, value: int) -> Any:
    if isinstance(x, np.ndarray) or not geometry.expands:
        return expand(x, geometry, value)
    from concrete import fhe

    grids = [geometry.grid(axis, size) for axis, size in enumerate(x.shape[2:])]
    if geometry.padding_mode != "zeros":
        for axis, grid in enumerate(grids):
            x = x[(*(slice(None),) * (2 + axis), grid.tolist())]
        return x
    filled = [np.flatnonzero(grid != OUTSIDE) for grid in grids]
    read = tuple(slice(int(g[f[0]]), int(g[f[-1]]) + 1) for g, f in zip(grids, filled, strict=True))
    x = x[(slice(None), slice(None), *read)]
    if all(len(f) == len(g) for f, g in zip(filled, grids, strict=True)):
        return x
    written = tuple(
        slice(int(f[0]), int(f[-1]) + 1, step)
        for f, step in zip(filled, geometry.input_dilation, strict=True)
    )
    shape = (*x.shape[:2], *map(len, grids))
    expanded = fhe.zeros(shape) if value == 0 else value * fhe.ones(shape)
    expanded[(slice(None), slice(None), *written)] = x
    return expanded


def _conv(expanded: Any, weight: Array, bias: Array, geometry: ConvGeometry) -> Any:
    if isinstance(expanded, np.ndarray):
        return conv(
            expanded, weight, bias, stride=geometry.stride, dilation=geometry.dilation, groups=geometry.groups
        )
    from concrete import fhe

    stride, dilation = geometry.stride, geometry.dilation
    images, channels, *sizes = expanded.shape
    if len(sizes) == 1:  # as an image of one row
        y = fhe.conv(
            expanded.reshape((images, channels, 1, *sizes)),
            weight[:, :, None],
            bias,
            strides=(1, *stride),
            dilations=(1, *dilation),
            group=geometry.groups,
        )
        return y.reshape((images, len(weight), y.shape[-1]))
    if len(sizes) == 2:
        return fhe.conv(expanded, weight, bias, strides=stride, dilations=dilation, group=geometry.groups)
    # The taps along the depth become channels, and the output's depth the batch: one 2-d convolution.
    outputs = (sizes[0] - (weight.shape[2] - 1) * dilation[0] - 1) // stride[0] + 1
    taps = np.flatnonzero(weight.any(axis=(0, 1, 3, 4)))
    flat = fhe.zeros((outputs, channels * len(taps), *sizes[1:]))
    for number, tap in enumerate(taps.tolist()):
        start = tap * dilation[0]
        slab = expanded[0, :, start : start + (outputs - 1) * stride[0] + 1 : stride[0]]
        flat[:, number :: len(taps)] = slab.transpose((1, 0, 2, 3))
    y = fhe.conv(
        flat,
        weight[:, :, taps].reshape(len(weight), -1, *weight.shape[3:]),
        bias,
        strides=stride[1:],
        dilations=dilation[1:],
        group=geometry.groups,
    )
    return y.transpose((1, 0, 2, 3)).reshape((1, len(weight), outputs, *y.shape[2:]))
