"""Handles averages and maxima over windows."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fheconv.arithmetic import ConvGeometry
from fheconv.basics.arrays import frozen
from fheconv.capture.calls import BATCH, Call, move, with_constant
from fheconv.capture.graph import Affine, Pooled, Unsupported, Value
from fheconv.capture.probing import of_function
from fheconv.networks.linear import Kernel

Windows = list[list[list[int]]]  # for each axis and output position: the input positions that it reads


def check_axes(value: Value, axes: int) -> None:
    """Raise `Unsupported` unless a value has `axes` spatial axes."""
    if len(value.shape) - 1 != axes:
        raise Unsupported(
            f"it takes images of shape (C, *S) with {axes} spatial axes, not {value.shape}; keep the "
            "channel axis"
        )


def per_axis(call: Call, value: Value, *options: Any) -> list[tuple[int, ...]]:
    """Return options of torch with a number for each spatial axis. Raises `Unsupported` for other axes."""
    axes = int(call.operation.partition("pool")[2][0])
    check_axes(value, axes)
    lists = [tuple(option) if isinstance(option, list | tuple) else (option,) for option in options]
    return [numbers * axes if len(numbers) == 1 else numbers for numbers in lists]


def avg_pool(
    call: Call, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Value:  # fmt: skip
    """Average over windows, which is linear."""
    size, step, pads = per_axis(call, x, kernel, stride or kernel, padding)
    value = call.graph.affine(x)
    geometry = ConvGeometry.of(size, stride=step, padding=pads, groups=len(value.bias))
    alike = divisor_override is not None or count_include_pad or not any(pads)
    if alike and geometry.output_size(value.shape[1:]) == call.shape[1:]:
        return _average(call, value, geometry, divisor_override or math.prod(size))
    arguments = (kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return _uneven(call, x, lambda t: call.target(t, *arguments))


def adaptive_avg_pool(call: Call, x: Value, output: Any) -> Value:
    """Average over windows that are chosen for a given number of outputs."""
    (outputs,) = per_axis(call, x, output)
    value = call.graph.affine(x)
    spatial = value.shape[1:]
    if any(size % out for size, out in zip(spatial, call.shape[1:], strict=True)):
        return _uneven(call, x, lambda t: call.target(t, outputs))
    size = tuple(s // out for s, out in zip(spatial, call.shape[1:], strict=True))
    return _average(call, value, ConvGeometry.of(size, stride=size, groups=len(value.bias)), math.prod(size))


def _uneven(call: Call, x: Value, function: Callable[[torch.Tensor], torch.Tensor]) -> Value:
    """Average over windows that differ."""
    made = of_function(call, function, [x])
    if made is None:
        raise Unsupported("torch does not show that its averages are linear; use windows of one size")
    return made


def mean(call: Call, x: Value, dims: Any = None, keepdim: bool = False, **_: Any) -> Value:
    """Average or sum over axes."""
    value = call.graph.affine(x)
    axes = _axes(call, value, dims)
    divisor = math.prod(value.shape[a] for a in axes) if call.operation == "mean" else 1
    if axes == list(range(1, len(value.shape))):
        whole = ConvGeometry.of(value.shape[1:], groups=len(value.bias))
        value = _average(call, value, whole, divisor)
    else:
        kept = [a for a in range(len(value.shape)) if a not in axes]
        count = math.prod(value.shape[a] for a in axes)
        order = (0, *(1 + a for a in (*kept, *axes)))
        rows: Affine = move(call, value, lambda t: t.permute(order).reshape(BATCH, -1, count))
        value = _average(call, rows, ConvGeometry.of((count,), groups=len(rows.bias)), divisor)
    return move(call, value, lambda t: t.reshape(BATCH, *call.shape))


def _axes(call: Call, value: Value, dims: Any) -> list[int]:
    """Return the sorted axes of a value for `dims`. Raises `Unsupported` for the batch axis."""
    if dims is None or dims in ([], ()):
        raise Unsupported("without dim it runs over the images of a batch; give dim")
    return sorted({call.axis(d, value.shape) for d in (dims if isinstance(dims, list | tuple) else [dims])})


def _average(call: Call, value: Affine, geometry: ConvGeometry, divisor: float) -> Affine:
    ones = Kernel(
        weight=frozen(np.ones((len(value.bias), 1, *geometry.kernel), np.int64)),
        geometry=geometry,
        exact=True,
    )
    return call.graph.linear(value, ones, call.name, factor=1 / divisor)


def max_pool(
    call: Call, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> Value:  # fmt: skip
    """Take maxima over windows."""
    options = per_axis(call, x, kernel, stride or kernel, padding, dilation)
    windows = []
    for size, out, (k, s, p, d) in zip(x.shape[1:], call.shape[1:], zip(*options, strict=True), strict=True):
        starts = range(-p, -p + out * s, s)
        windows.append([[at for at in range(b, b + k * d, d) if 0 <= at < size] for b in starts])
    return _maximum(call, x, [[[at] for at in range(x.shape[0])], *windows])


def max_pool_and_indices(call: Call, x: Value, *arguments: Any) -> tuple[Value]:
    """Take maxima over windows. Returns only the first of torch's two results."""
    return (max_pool(call, x, *arguments),)


def adaptive_max_pool(call: Call, x: Value, output: Any) -> tuple[Value]:
    """Take maxima over windows for a given number of outputs. Returns only torch's first result."""
    per_axis(call, x, output)
    windows = [
        [list(range(o * size // out, -(-(o + 1) * size // out))) for o in range(out)]
        for size, out in zip(x.shape[1:], call.shape[1:], strict=True)
    ]
    return (_maximum(call, x, [[[at] for at in range(x.shape[0])], *windows]),)


def amax(call: Call, x: Value, dims: Any = None, keepdim: bool = False) -> Value:
    """Take maxima over whole axes."""
    axes = _axes(call, x, dims)
    windows = [
        [list(range(size))] if axis in axes else [[at] for at in range(size)]
        for axis, size in enumerate(x.shape)
    ]
    pooled = _maximum(call, x, windows)
    return (
        pooled if pooled.shape == call.shape else move(call, pooled, lambda t: t.reshape(BATCH, *call.shape))
    )


def amin(call: Call, x: Value, dims: Any = None, keepdim: bool = False) -> Value:
    """Take minima over whole axes, as −max(−x)."""
    minus = np.asarray(-1.0)
    negative = with_constant(call, "mul", x, minus, call.read_once)
    return with_constant(call, "mul", amax(call, negative, dims, keepdim), minus, read_once=True)


def _maximum(call: Call, x: Value, windows: Windows) -> Pooled:
    """Take maxima along one axis after the other, which needs fewer comparisons than whole windows.

    Raises `Unsupported` if a window reads only padding.
    """
    shape = x.shape
    indices = []
    for axis in reversed(range(len(windows))):
        if windows[axis] == [[at] for at in range(shape[axis])]:
            continue
        if not all(windows[axis]):
            raise Unsupported("some of its windows hold padding alone, whose maximum is −∞; use less padding")
        # A shorter window reads its last position again, which changes no maximum.
        width = max(map(len, windows[axis]))
        table = np.array([w + [w[-1]] * (width - len(w)) for w in windows[axis]]).T
        places = np.arange(math.prod(shape)).reshape(shape)
        index = np.moveaxis(np.take(places, table, axis=axis), axis, 0)
        shape = index.shape[1:]
        indices.append(frozen(index))
    if not indices:
        indices.append(frozen(np.arange(math.prod(shape)).reshape(1, *shape)))
    return Pooled(call.name, call.graph.pending(x), tuple(indices))
