"""Builds the filter matrix B, which makes a convolution one product x·B."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import scipy.sparse

from fheconv.arithmetic.exact import exact_dtypes
from fheconv.arithmetic.geometry import (
    OUTSIDE,
    ConvGeometry,
    Padding,
    PaddingMode,
    PerAxis,
    direct_form,
    shape_of,
    tap_sources,
)
from fheconv.basics.arrays import Array, ArrayLike, as_array
from fheconv.basics.checks import check_integer
from fheconv.basics.errors import InvalidArgumentError

DENSE_LIMIT = 2 * 2**30


def filter_matrix(
    weight: ArrayLike,
    input_shape: Sequence[int],
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
    transposed: bool = False,
    output_padding: PerAxis = 0,
    format: Literal["dense", "csr"] = "dense",  # noqa: A002 - scipy.sparse's own word
    flip_kernel: bool = False,
    memory_limit: int = DENSE_LIMIT,
) -> Any:
    """Return the matrix B with `x.reshape(n, -1) @ B` = the flattened convolution.

    `weight` is `(K, C/groups, *k)` with `input_shape` `(C, *S)`, or a plain `(Hf, Wf)` with `(M, N)`. B has
    the shape `(C·ΠS, K·ΠOut)` and the dtype of the weight, with three exceptions. Unsigned and boolean
    weights become int64, because their products would wrap. Half precision becomes float32, because
    scipy.sparse has no products for it. B is also int64 if the weights of one pixel add up to more than their
    dtype holds. `format="csr"` gives a `scipy.sparse.csr_array`. B is the doubly blocked Toeplitz matrix of
    the filter (Gray, "Toeplitz and circulant matrices", 2006). Its columns are the shifted filters. If
    padding repeats a pixel, the pixel's weights are added up.

    `transposed=True` makes the matrix of torch's transposed convolution, from a weight `(C, K/groups, *k)`.
    It is the transpose of the matrix of the matching direct convolution.

    Raises `InvalidArgumentError` if shapes do not fit together, or if a dense B would take more than
    `memory_limit` bytes.

    Example:
        >>> filter_matrix([[1, 2]], (1, 3))
        array([[1, 0],
               [2, 1],
               [0, 2]])
    """
    weight, spatial, channels = _matrix_arguments(weight, input_shape)
    if flip_kernel:
        weight = flip(weight)
    weight, geometry = direct_form(
        weight,
        transposed=transposed,
        padding_mode=padding_mode,
        output_padding=output_padding,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    geometry.check_channels(channels, weight.shape)
    output = geometry.output_size(spatial)
    if not isinstance(format, str) or format not in ("dense", "csr"):
        raise InvalidArgumentError(f'format={format!r}; it must be "dense" or "csr".')
    check_integer("memory_limit", memory_limit, 0)
    if format == "csr":
        return csr_filter_matrix(weight, geometry, spatial, output)
    shape = (channels * math.prod(spatial), len(weight) * math.prod(output))
    size = math.prod(shape) * weight.dtype.itemsize
    if size > memory_limit:
        raise InvalidArgumentError(
            f"The dense filter matrix of shape {shape} would take {size / 2**30:.1f} GiB, the limit is "
            f'{memory_limit / 2**30:.1f} GiB; use format="csr" or raise memory_limit.'
        )
    return csr_filter_matrix(weight, geometry, spatial, output).toarray()


def csr_filter_matrix(
    weight: Array, geometry: ConvGeometry, spatial: Sequence[int], output: Sequence[int]
) -> scipy.sparse.csr_array:
    """Build B from index arithmetic. The rows of Bᵀ are the outputs in order, so nothing is sorted."""
    axes = len(geometry.kernel)
    position = np.zeros((1,) * (2 * axes), np.int64)
    inside = np.ones((1,) * (2 * axes), bool)
    for axis in range(axes):
        table = tap_sources(geometry, axis, spatial[axis], output[axis])
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = table.shape
        position = position * spatial[axis] + table.reshape(shape)
        inside = inside & (table != OUTSIDE).reshape(shape)
    outputs, taps = math.prod(output), math.prod(geometry.kernel)
    filters, per_group = weight.shape[:2]
    channels, pixels = per_group * geometry.groups, math.prod(spatial)
    entries = filters * per_group * outputs * taps
    index = np.int32 if max(entries, channels * pixels, filters * outputs) < 2**31 else np.int64

    full = (filters, outputs, per_group, taps)
    inside = np.broadcast_to(inside.reshape(1, outputs, 1, taps), full)
    first = np.arange(filters) // (filters // geometry.groups) * per_group
    channel = (first[:, None] + np.arange(per_group)) * pixels
    source = np.add(
        channel.astype(index).reshape(filters, 1, per_group, 1),
        position.astype(index).reshape(1, outputs, 1, taps),
    )[inside]
    data = np.broadcast_to(weight.reshape(filters, 1, per_group, taps), full)[inside]
    ends = np.cumsum(inside.sum(axis=(2, 3), dtype=index), dtype=index)
    if geometry.padding_mode != "zeros" and weight.dtype.kind == "i":
        data = data.astype(np.int64)  # weights of a pixel that padding repeats are added up below
    transposed = scipy.sparse.csr_array(
        (data, source, np.concatenate([np.zeros(1, index), ends])),
        shape=(filters * outputs, channels * pixels),
    )
    matrix = transposed.T.tocsr()
    matrix.sum_duplicates()
    holds = np.iinfo(weight.dtype) if weight.dtype.kind == "i" else None
    fits = holds is None or not matrix.nnz or (holds.min <= matrix.min() and matrix.max() <= holds.max)
    return matrix.astype(weight.dtype, copy=False) if fits else matrix


def _matrix_arguments(weight: ArrayLike, input_shape: Sequence[int]) -> tuple[Array, tuple[int, ...], int]:
    weight = as_array(weight, "weight")
    if weight.dtype.kind in "ub":
        exact_dtypes(weight, weight.reshape(-1)[:0], 1, None)
        weight = weight.astype(np.int64)
    elif weight.dtype == np.float16:  # scipy.sparse has no half precision
        weight = weight.astype(np.float32)
    shape = shape_of("input_shape", input_shape)
    if weight.ndim >= 3 and len(shape) == weight.ndim - 1:
        return weight, shape[1:], shape[0]
    if weight.ndim == len(shape) == 2:
        return weight[None, None], shape, 1
    raise InvalidArgumentError(
        f"weight of shape {weight.shape} does not go with input_shape {shape}: a weight "
        "(K, C/groups, *k) takes (C, *S), a plain (Hf, Wf) takes (M, N)."
    )


def flip(weight: Array) -> Array:
    """Return `weight` (K, C/groups, *k) turned by 180°."""
    return np.flip(weight, tuple(range(2, weight.ndim)))
