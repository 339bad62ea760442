"""Computes convolutions by the classic formulations, with gradients and the transposed convolution."""

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Literal, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from fheconv.arithmetic.exact import exact_dtypes
from fheconv.arithmetic.geometry import (
    ConvGeometry,
    Padding,
    PaddingMode,
    PerAxis,
    conv_output_shape,
    expand,
    transposed_weight,
)
from fheconv.arithmetic.matrix import csr_filter_matrix, flip
from fheconv.basics.arrays import Array, ArrayLike, as_array, channel_vector
from fheconv.basics.errors import InvalidArgumentError

Method: TypeAlias = Literal["torch", "loops", "shifts", "im2col", "tensordot", "matrix"]
Layout: TypeAlias = Literal["NCHW", "NHWC"]


def conv(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
    method: Method | None = None,
    layout: Layout = "NCHW",
    flip_kernel: bool = False,
) -> Array:
    """Return the convolution of a batch, computed by `method`.

    Layout NCHW: `x` (N, C, *S), `weight` (K, C/groups, *k), result (N, K, *Out).
    Layout NHWC: `x` (N, *S, C), `weight` (*k, C/groups, K), result (N, *Out, K).
    `bias` is (K,). `flip_kernel=True` first turns the filter by 180°: this is convolution as mathematicians
    define it.

    Integers give exact int64 results: see `exact_dtypes`. Without a `method`, integers and convolutions of
    four axes or more use "im2col", and other floating-point numbers use "torch".

    | method | where it comes from |
    |---|---|
    | `"torch"` | torch's own convolution of one to three axes |
    | `"loops"` | the definition, seven nested loops for an image; the oracle of small sizes |
    | `"shifts"` | one matrix product a tap over the shifted image (Vasudevan et al. 2017, "kn2row") |
    | `"im2col"` | all windows unrolled into rows, one GEMM (Chellapilla et al. 2006) |
    | `"tensordot"` | the same contraction, computed by numpy |
    | `"matrix"` | the sparse `filter_matrix`, x·B |

    Raises `InvalidArgumentError` for arguments that do not fit together and `AccumulatorOverflowError` for
    integers whose sums may pass 2⁶³.

    Example:
        >>> image = np.arange(9).reshape(1, 1, 3, 3)
        >>> conv(image, np.ones((1, 1, 2, 2), int))
        array([[[[ 8, 12],
                 [20, 24]]]])
    """
    x, weight = as_array(x, "x"), as_array(weight, "weight")
    if x.ndim != weight.ndim or x.ndim < 3:
        raise InvalidArgumentError(
            f"x of shape {x.shape} and weight of shape {weight.shape} must have the same number of "
            "axes: batch, channels and at least one spatial axis."
        )
    if layout not in ("NCHW", "NHWC"):
        raise InvalidArgumentError(f'layout={layout!r}; it must be "NCHW" or "NHWC".')
    if method is not None and method not in _FORMULATIONS:
        raise InvalidArgumentError(f"method={method!r}; it must be one of {list(_FORMULATIONS)}.")
    if method == "torch" and x.ndim - 2 > TORCH_AXES:
        raise InvalidArgumentError(
            f'method="torch" computes convolutions of up to {TORCH_AXES} axes, and x of shape {x.shape} has '
            f'{x.ndim - 2} after its channels; take method="im2col".'
        )
    if layout == "NHWC":
        x, weight = np.moveaxis(x, -1, 1), np.moveaxis(weight, (-1, -2), (0, 1))
    if flip_kernel:
        weight = flip(weight)
    geometry = ConvGeometry.of(
        weight.shape[2:],
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
    )
    geometry.check_channels(x.shape[1], weight.shape)
    geometry.output_size(x.shape[2:])
    bias = None if bias is None else channel_vector(bias, len(weight))
    working, result = exact_dtypes(x, weight, math.prod(weight.shape[1:]), bias)
    if method is None:
        floats = result.kind == "f" and working.itemsize <= 8  # torch has no longer ones
        method = "torch" if floats and x.ndim - 2 <= TORCH_AXES else "im2col"
    elif method == "torch" and result.kind != "f" and working == np.float32:
        working = np.dtype(np.float64)  # in float32, torch may use transforms that round (Winograd)
    y = _FORMULATIONS[method](x.astype(working, copy=False), weight.astype(working, copy=False), geometry)
    if bias is not None:
        y = y + bias.astype(working).reshape(-1, *[1] * len(geometry.kernel))
    y = y.astype(result, copy=False)
    return np.moveaxis(y, 1, -1) if layout == "NHWC" else y


def conv_gradients(
    grad_output: ArrayLike,
    x: ArrayLike,
    weight: ArrayLike,
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
) -> tuple[Array, Array, Array]:
    """Return the gradients of a convolution for its input, its weight and its bias.

    `grad_output` is (N, K, *Out), `x` (N, C, *S), `weight` (K, C/groups, *k). The gradient of the input is
    `grad_output · Bᵀ` (col2im). The gradient of the weight is the GEMM of `grad_output` with the im2col rows.
    Raises like `conv`.

    Example:
        >>> x, weight = np.array([[[1, 2, 3]]]), np.array([[[1, -1]]])
        >>> conv_gradients(np.ones((1, 1, 2), int), x, weight)
        (array([[[ 1,  0, -1]]]), array([[[3, 5]]]), array([2]))
    """
    x, weight = as_array(x, "x"), as_array(weight, "weight")
    grad = as_array(grad_output, "grad_output")
    expected = conv_output_shape(
        x.shape, weight.shape, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    if grad.shape != expected:
        raise InvalidArgumentError(
            f"grad_output has shape {grad.shape}, this convolution's output has {expected}."
        )
    geometry = ConvGeometry.of(
        weight.shape[2:], stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    working, result = exact_dtypes(grad, weight, math.prod(weight.shape) // groups, None)
    matrix = csr_filter_matrix(weight.astype(working), geometry, x.shape[2:], grad.shape[2:])
    grad_x = (_flat(grad).astype(working) @ matrix.T).reshape(x.shape).astype(result)

    working, result = exact_dtypes(grad, x, grad.size // grad.shape[1], None)
    positions = grad.size // len(weight)
    by_group = np.moveaxis(grad, 1, -1).reshape(positions, groups, len(weight) // groups).astype(working)
    rows = im2col(x.astype(working), geometry)
    grad_weight = (by_group.transpose(1, 2, 0) @ rows).reshape(
        len(weight), *weight.shape[2:], weight.shape[1]
    )
    grad_weight = np.moveaxis(grad_weight, -1, 1).astype(result)
    exact_dtypes(grad, np.ones(1, np.int64), grad.size // grad.shape[1], None)
    grad_bias = grad.sum(axis=(0, *range(2, grad.ndim)))
    return grad_x, grad_weight, grad_bias


def conv_transpose(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    output_padding: PerAxis = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
) -> Array:
    """Return the transposed convolution of a batch: the product with Bᵀ, where B belongs to the direct one.

    `x` is (N, C, *S), `weight` (C, K/groups, *k) in torch's layout. The result is (N, K, *Out) with Out = (S
    − 1)·stride − 2·padding + dilation·(k − 1) + output_padding + 1. `padding` may also be (before, after)
    pairs, as in ONNX; their sum then replaces 2·padding. Raises like `conv`.

    Example:
        >>> conv_transpose(np.array([[[1, 2]]]), np.array([[[1, 1]]]), stride=2)
        array([[[1, 1, 2, 2]]])
    """
    x, weight = as_array(x, "x"), as_array(weight, "weight")
    if x.ndim != weight.ndim or x.ndim < 3 or x.shape[1] != len(weight):
        raise InvalidArgumentError(
            f"x of shape {x.shape} does not go with a transposed weight of shape {weight.shape}, "
            "which must be (in_channels, out_channels/groups, *kernel)."
        )
    geometry = ConvGeometry.of_transposed(
        weight.shape[2:],
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        dilation=dilation,
        groups=groups,
    )
    weight = transposed_weight(weight, geometry.groups)
    output = geometry.output_size(x.shape[2:])
    bias = None if bias is None else channel_vector(bias, len(weight))
    working, result = exact_dtypes(x, weight, math.prod(weight.shape[1:]), bias)
    matrix = csr_filter_matrix(weight.astype(working), geometry, x.shape[2:], output)
    y = np.asarray(_flat(x).astype(working) @ matrix).reshape(len(x), len(weight), *output)
    if bias is not None:
        y = y + bias.astype(working).reshape(-1, *[1] * len(geometry.kernel))
    return y.astype(result, copy=False)


# torch has convolutions of one to so many axes.
TORCH_AXES = 3

# The formulations. They take x (N, C, *S) and weight (K, C/groups, *k) in one working dtype.


def _torch(x: Array, weight: Array, geometry: ConvGeometry) -> Array:
    import torch  # takes seconds, and the other formulations do without

    functions = torch.conv1d, torch.conv2d, torch.conv3d
    x, weight = expand(x, geometry), np.ascontiguousarray(weight)
    if x.dtype != np.float32:  # channels may come last in memory only where torch has a library for it
        x = np.ascontiguousarray(x)
    # torch takes no steps backwards, and nothing that is read-only.
    x, weight = (one if one.flags.writeable and min(one.strides) >= 0 else one.copy() for one in (x, weight))
    y = functions[x.ndim - 3](
        torch.from_numpy(x),
        torch.from_numpy(weight),
        stride=geometry.stride,
        dilation=geometry.dilation,
        groups=geometry.groups,
    )
    return y.numpy()


def _loops(x: Array, weight: Array, geometry: ConvGeometry) -> Array:
    output = geometry.output_size(x.shape[2:])
    x = expand(x, geometry)
    filters, per_group = weight.shape[:2]
    y = np.zeros((len(x), filters, *output), x.dtype)
    for n, k in product(range(len(x)), range(filters)):
        first = k // (filters // geometry.groups) * per_group
        for position in np.ndindex(*output):
            for c in range(per_group):
                for tap in np.ndindex(*geometry.kernel):
                    source = tuple(
                        o * s + t * d
                        for o, s, t, d in zip(position, geometry.stride, tap, geometry.dilation, strict=True)
                    )
                    y[n, k, *position] += x[n, first + c, *source] * weight[k, c, *tap]
    return y


def _shifts(x: Array, weight: Array, geometry: ConvGeometry) -> Array:
    output = geometry.output_size(x.shape[2:])
    x = np.moveaxis(expand(x, geometry), 1, -1)
    filters, per_group = weight.shape[0] // geometry.groups, weight.shape[1]
    y = np.zeros((len(x), *output, len(weight)), x.dtype)
    taps = weight.reshape(*weight.shape[:2], -1)
    for number, tap in enumerate(np.ndindex(*geometry.kernel)):
        shifted = x[(slice(None), *tap_slices(tap, output, geometry.stride, geometry.dilation))]
        for group in range(geometry.groups):
            ins = slice(group * per_group, (group + 1) * per_group)
            outs = slice(group * filters, (group + 1) * filters)
            y[..., outs] += shifted[..., ins] @ taps[outs, :, number].T
    return np.moveaxis(y, -1, 1)


def _im2col(x: Array, weight: Array, geometry: ConvGeometry) -> Array:
    output = geometry.output_size(x.shape[2:])
    rows = im2col(x, geometry)
    columns = np.moveaxis(weight, 1, -1).reshape(geometry.groups, -1, rows.shape[-1])
    y = rows @ columns.swapaxes(-1, -2)
    return _channels_first(y.reshape(geometry.groups, len(x), *output, len(weight) // geometry.groups))


def _tensordot(x: Array, weight: Array, geometry: ConvGeometry) -> Array:
    axes = len(geometry.kernel)
    windows = _windows(x, geometry)
    windows = windows.reshape(len(x), geometry.groups, weight.shape[1], *windows.shape[2:])
    contracted = [1, *range(2 + axes, 2 + 2 * axes)]
    y = [
        np.tensordot(windows[:, group], filters, axes=(contracted, range(1, filters.ndim)))
        for group, filters in enumerate(np.split(weight, geometry.groups))
    ]
    return _channels_first(np.stack(y))


def _matrix(x: Array, weight: Array, geometry: ConvGeometry) -> Array:
    spatial = x.shape[2:]
    output = geometry.output_size(spatial)
    matrix = csr_filter_matrix(weight, geometry, spatial, output)
    return np.asarray(_flat(x) @ matrix).reshape(len(x), len(weight), *output)


_FORMULATIONS: dict[str, Callable[[Array, Array, ConvGeometry], Array]] = {
    "torch": _torch,
    "loops": _loops,
    "shifts": _shifts,
    "im2col": _im2col,
    "tensordot": _tensordot,
    "matrix": _matrix,
}


def _windows(x: Array, geometry: ConvGeometry) -> Array:
    """Return a view (N, C, *Out, *k) of all windows of the padded input."""
    axes = range(2, x.ndim)
    windows: Array = sliding_window_view(  # type: ignore[call-overload]  # numpy's stub knows one axis only
        expand(x, geometry), geometry.extent, axis=tuple(axes)
    )
    steps = [slice(None, None, step) for step in (*geometry.stride, *geometry.dilation)]
    return windows[(slice(None), slice(None), *steps)]


def im2col(x: Array, geometry: ConvGeometry) -> Array:
    """Return the windows as rows, (groups, N·ΠOut, Πk·C/groups).

    Channels come last, in memory too. So whole runs of channels are copied. On 10×32×32×8 with 3×3 this is
    four times faster than copying single pixels.
    """
    x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    windows = _windows(x, geometry)
    axes = len(geometry.kernel)
    groups = geometry.groups
    rows = np.moveaxis(windows, 1, -1)
    rows = rows.reshape(*rows.shape[:-1], groups, rows.shape[-1] // groups)
    return np.moveaxis(rows, -2, 0).reshape(
        groups, math.prod(rows.shape[: 1 + axes]), math.prod(geometry.kernel) * rows.shape[-1]
    )


def _channels_first(y: Array) -> Array:
    """Turn (groups, N, *Out, K/groups) into (N, K, *Out)."""
    y = np.moveaxis(y, (0, -1), (1, 2))
    return y.reshape(len(y), y.shape[1] * y.shape[2], *y.shape[3:])


def _flat(x: Array) -> Array:
    """Return one row for each image. The width is computed, because -1 has no meaning in an empty batch."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def tap_slices(
    tap: Sequence[int], output: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[slice, ...]:
    """Return, for one tap, the slice of each axis of the padded input that all outputs read."""
    return tuple(
        slice(t * d, t * d + (o - 1) * s + 1, s)
        for t, o, s, d in zip(tap, output, stride, dilation, strict=True)
    )
