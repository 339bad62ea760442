"""Describes how a kernel moves over an input: shapes, options, and which input each tap reads.

The arithmetic of strides, padding and dilation follows Dumoulin & Visin, "A guide to convolution arithmetic
for deep learning" (2016). Every convolution here, also a transposed one, is a plain one over an *expanded*
input: zeros are inserted between its values (`input_dilation`), then padding is added around it. Negative
padding crops. XLA's `ConvGeneralDilated` has the same form. `grid` tabulates the expansion of one axis.
`tap_sources` tabulates which input each (output, tap) reads; matrix, bounds and circuits use it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from fheconv.basics.arrays import Array
from fheconv.basics.checks import check_integer
from fheconv.basics.errors import InvalidArgumentError

PerAxis: TypeAlias = int | Sequence[int]
Padding: TypeAlias = int | str | Sequence[int | Sequence[int]]
PaddingMode: TypeAlias = Literal["zeros", "reflect", "replicate", "circular"]

OUTSIDE = -1

_NUMPY_MODES: dict[str, Any] = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@dataclass(frozen=True, kw_only=True)
class ConvGeometry:
    """Describes how a kernel moves over an input: one entry an axis, `padding` as (before, after).

    `input_dilation` − 1 zeros are inserted between neighbouring inputs.

    Example:
        >>> ConvGeometry.of((3, 3), padding=1, stride=2).output_size((8, 8))
        (4, 4)
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: PaddingMode
    input_dilation: tuple[int, ...]

    @classmethod
    def of(
        cls,
        kernel: Sequence[int],
        *,
        stride: PerAxis = 1,
        padding: Padding = 0,
        dilation: PerAxis = 1,
        groups: int = 1,
        padding_mode: PaddingMode = "zeros",
    ) -> "ConvGeometry":
        """Normalise torch's arguments (ints, one int an axis, "same", "valid", (before, after) pairs).

        Raises `InvalidArgumentError` for anything that has no meaning.
        """
        axes = len(kernel)
        kernel = per_axis(kernel, axes, "kernel size", 1)
        stride = per_axis(stride, axes, "stride", 1)
        dilation = per_axis(dilation, axes, "dilation", 1)
        if not isinstance(padding_mode, str) or padding_mode not in get_args(PaddingMode):
            raise InvalidArgumentError(
                f"padding_mode={padding_mode!r}; it must be one of {', '.join(get_args(PaddingMode))}."
            )
        return cls(
            kernel=kernel,
            stride=stride,
            padding=_pairs(padding, kernel, stride, dilation),
            dilation=dilation,
            groups=per_axis(groups, 1, "groups", 1)[0],
            padding_mode=padding_mode,
            input_dilation=(1,) * axes,
        )

    @classmethod
    def of_transposed(
        cls,
        kernel: Sequence[int],
        *,
        stride: PerAxis = 1,
        padding: Padding = 0,
        output_padding: PerAxis = 0,
        dilation: PerAxis = 1,
        groups: int = 1,
    ) -> "ConvGeometry":
        """Return the geometry of torch's transposed convolution, for use with a flipped kernel.

        It reads the input with stride − 1 zeros between its values. The padding is dilation·(k − 1) − padding
        on both sides, and `output_padding` more at the end. Beyond torch, `padding` may be (before, after)
        pairs, which cut the two ends differently; words have no meaning. Raises like `of`.
        """
        axes = len(kernel)
        direct = cls.of(kernel, dilation=dilation, groups=groups)
        stride = per_axis(stride, axes, "stride", 1)
        cuts = _numbers(padding, axes)
        extra = per_axis(output_padding, axes, "output_padding", 0)
        for more, step, spread in zip(extra, stride, direct.dilation, strict=True):
            if more >= max(step, spread):
                raise InvalidArgumentError(
                    f"output_padding={more} must be smaller than the stride (={step}) or the dilation "
                    f"(={spread})."
                )
        return cls(
            kernel=direct.kernel,
            stride=(1,) * axes,
            padding=tuple(
                (extent - 1 - before, extent - 1 - after + more)
                for extent, (before, after), more in zip(direct.extent, cuts, extra, strict=True)
            ),
            dilation=direct.dilation,
            groups=direct.groups,
            padding_mode="zeros",
            input_dilation=stride,
        )

    @cached_property
    def extent(self) -> tuple[int, ...]:
        """Return the kernel's size with its dilation, (k − 1)·dilation + 1 an axis."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    @cached_property
    def expands(self) -> bool:
        """Return whether the expanded input differs from the input."""
        return any(map(any, self.padding)) or any(step > 1 for step in self.input_dilation)

    def expanded_size(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Return the sizes of the expanded input."""
        return tuple(
            (size - 1) * step + 1 + before + after
            for size, step, (before, after) in zip(spatial, self.input_dilation, self.padding, strict=True)
        )

    def output_size(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Return the spatial output sizes for an input of sizes `spatial`.

        Raises `InvalidArgumentError` if the expanded input is smaller than the kernel, or if the padding
        reaches further than `padding_mode` allows.
        """
        sizes = []
        for axis, (size, expanded) in enumerate(zip(spatial, self.expanded_size(spatial), strict=True)):
            if size < 1 or expanded < self.extent[axis]:
                padded = sum(self.padding[axis]) >= 0
                remedy = "enlarge the input or its padding" if padded else "reduce the padding, which cuts it"
                raise InvalidArgumentError(
                    f"The input has {size} positions along spatial axis {axis}, {expanded} after padding, "
                    f"but the kernel reaches over {self.extent[axis]}; {remedy}."
                )
            most = max(self.padding[axis])
            needed = {"reflect": most + 1, "circular": most}.get(self.padding_mode, 0)
            if size < needed:
                raise InvalidArgumentError(
                    f"padding={most} with padding_mode={self.padding_mode!r} needs an input of at least "
                    f"{needed} positions along spatial axis {axis}, which has {size}."
                )
            sizes.append((expanded - self.extent[axis]) // self.stride[axis] + 1)
        return tuple(sizes)

    def check_channels(self, channels: int, weight_shape: Sequence[int]) -> None:
        """Raise `InvalidArgumentError` unless a weight (K, C/groups, *k) fits C = `channels`."""
        filters, per_group = weight_shape[:2]
        if filters < 1 or filters % self.groups:
            raise InvalidArgumentError(
                f"out_channels (={filters}) must be a positive multiple of groups (={self.groups})."
            )
        if per_group * self.groups != channels:
            raise InvalidArgumentError(
                f"The input has {channels} channels, the weight of shape {tuple(weight_shape)} with "
                f"groups={self.groups} takes {per_group * self.groups}."
            )

    def grid(self, axis: int, size: int) -> Array:
        """Return the input position that each position of the expanded axis holds, `OUTSIDE` for a zero.

        `size` is the input's length along the axis. The result is int64 and has the expanded length.
        """
        before, after = self.padding[axis]
        if self.padding_mode != "zeros":
            return np.pad(np.arange(size), (before, after), mode=_NUMPY_MODES[self.padding_mode])
        position = np.arange(-before, (size - 1) * self.input_dilation[axis] + 1 + after)
        source, between = np.divmod(position, self.input_dilation[axis])
        return np.where((between == 0) & (source >= 0) & (source < size), source, OUTSIDE)


def conv_output_shape(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
) -> tuple[int, ...]:
    """Return the shape of a convolution's output.

    `(N, C, *S)` with a weight `(K, C/groups, *k)` gives `(N, K, *Out)`; a plain image `(M, N)` with a plain
    filter `(Hf, Wf)` gives `(OutH, OutW)`, where Out = ⌊(S + before + after − dilation·(k − 1) − 1) / stride⌋
    + 1 (Dumoulin & Visin 2016, relation 14).

    Raises `InvalidArgumentError` for shapes or options that do not fit together.

    Example:
        >>> conv_output_shape((1, 3, 8, 8), (16, 3, 3, 3), padding=1, stride=2)
        (1, 16, 4, 4)
    """
    input_shape, weight_shape = shape_of("input_shape", input_shape), shape_of("weight_shape", weight_shape)
    if len(input_shape) != len(weight_shape) or len(input_shape) < 2:
        raise InvalidArgumentError(
            f"input_shape {input_shape} and weight_shape {weight_shape} must both be "
            "(N, C, *S) and (K, C/groups, *k), or both a plain (M, N) and (Hf, Wf)."
        )
    plain = len(input_shape) == 2
    skip = 0 if plain else 2
    geometry = ConvGeometry.of(
        weight_shape[skip:], stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    output = geometry.output_size(input_shape[skip:])
    if plain:
        return output
    geometry.check_channels(input_shape[1], weight_shape)
    return (input_shape[0], weight_shape[0], *output)


def shape_of(name: str, shape: Any) -> tuple[int, ...]:
    """Return a shape as a tuple; raise `InvalidArgumentError` unless all sizes are integers of at least 0."""
    try:
        sizes = tuple(shape)
    except TypeError as error:
        raise InvalidArgumentError(f"{name}={shape!r} must be a sequence of integers.") from error
    for size in sizes:
        check_integer(f"A size in {name}", size, 0)
    return tuple(map(int, sizes))


def tap_sources(geometry: ConvGeometry, axis: int, size: int, outputs: int) -> Array:
    """Return the input position that each (output, tap) of one axis reads, `OUTSIDE` for a zero.

    `size` is the input's length along the axis, `outputs` the number of output positions. The table has the
    shape (outputs, kernel) and the dtype int64.
    """
    start = np.arange(outputs)[:, None] * geometry.stride[axis]
    return geometry.grid(axis, size)[start + np.arange(geometry.kernel[axis]) * geometry.dilation[axis]]


def expand(x: Array, geometry: ConvGeometry, value: int = 0) -> Array:
    """Return the expanded input of `x` (N, C, *S), with `value` in place of the zeros."""
    if not geometry.expands:
        return x
    for axis, size in enumerate(x.shape[2:]):
        grid = geometry.grid(axis, size)
        x = np.take(x, grid, axis=2 + axis)
        np.moveaxis(x, 2 + axis, 0)[grid == OUTSIDE] = value
    return x


def direct_form(
    weight: Array, *, transposed: bool, padding_mode: PaddingMode, output_padding: PerAxis, **options: Any
) -> tuple[Array, ConvGeometry]:
    """Return the weight (K, C/groups, *k) and the geometry of the same convolution in plain form.

    Raises `InvalidArgumentError` for options that do not fit together.
    """
    if not transposed:
        if np.any(output_padding):
            raise InvalidArgumentError("output_padding is an option of transposed convolutions only.")
        return weight, ConvGeometry.of(weight.shape[2:], padding_mode=padding_mode, **options)
    if padding_mode != "zeros":
        raise InvalidArgumentError(
            f'padding_mode={padding_mode!r}; a transposed convolution has "zeros" only, because its padding '
            "cuts the result."
        )
    geometry = ConvGeometry.of_transposed(weight.shape[2:], output_padding=output_padding, **options)
    return transposed_weight(weight, geometry.groups), geometry


def transposed_weight(weight: Array, groups: int) -> Array:
    """Turn torch's transposed weight (C, K/groups, *k) into the flipped (K, C/groups, *k) of the plain form.

    Raises `InvalidArgumentError` if groups do not divide the channels.
    """
    channels, per_group = weight.shape[:2]
    if channels % groups:
        raise InvalidArgumentError(
            f"in_channels (={channels}) must be a multiple of groups (={groups}) for a transposed weight of "
            f"shape {weight.shape}."
        )
    grouped = weight.reshape(groups, channels // groups, *weight.shape[1:]).swapaxes(1, 2)
    plain = grouped.reshape(groups * per_group, channels // groups, *weight.shape[2:])
    return np.flip(plain, tuple(range(2, weight.ndim)))


def _pairs(
    padding: Padding, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    axes = len(kernel)
    if isinstance(padding, str) and padding == "valid":
        padding = 0
    if isinstance(padding, str) and padding == "same":
        if math.prod(stride) != 1:
            raise InvalidArgumentError(
                f'padding="same" is defined for stride 1 only, not stride={tuple(stride)}; give the '
                "padding as numbers."
            )
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = [(t // 2, t - t // 2) for t in total]
    return _numbers(padding, axes)


def _numbers(padding: Padding, axes: int) -> tuple[tuple[int, int], ...]:
    """Turn padding that is not a word into (before, after) pairs."""
    if isinstance(padding, str):
        raise InvalidArgumentError(
            f'padding={padding!r}; the words known are "same" and "valid", of convolutions not transposed.'
        )
    if isinstance(padding, Sequence) and padding and all(isinstance(p, Sequence) for p in padding):
        if len(padding) != axes:
            raise InvalidArgumentError(f"padding={padding} has {len(padding)} pairs for {axes} spatial axes.")
        return tuple((p[0], p[1]) for p in (per_axis(pair, 2, "padding", 0) for pair in padding))
    return tuple((p, p) for p in per_axis(padding, axes, "padding", 0))


def per_axis(value: Any, axes: int, name: str, least: int) -> tuple[int, ...]:
    """Return `value` as one integer of at least `least` for each of `axes` spatial axes.

    `value` is one integer, or one for each axis. Raises `InvalidArgumentError` with `name` otherwise.
    """
    if type(value) is int and value >= least:  # mostly; small convolutions take little longer than the checks
        return (value,) * axes
    several = isinstance(value, Sequence) or (isinstance(value, np.ndarray) and value.ndim > 0)
    values = tuple(value) if several else (value,) * axes
    whole = all(isinstance(v, int | np.integer) and not isinstance(v, bool) for v in values)
    if not whole or len(values) != axes or min(values, default=least) < least:
        raise InvalidArgumentError(
            f"{name}={value!r} must be an integer of at least {least}, or {axes} of them, one a spatial axis."
        )
    return tuple(int(v) for v in values)
