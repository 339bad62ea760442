"""Computes ONNX's convolutions and poolings with torch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fheconv.capture import onnx_moves as moves
from fheconv.capture.graph import Unsupported
from fheconv.capture.onnx_node import Node

Pair = tuple[int, int]


def _options(node: Node, kernel: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Return strides, dilations and how far a kernel reaches, an axis each."""
    axes = len(kernel)
    given = node.get("kernel_shape", kernel)
    if list(given) != list(kernel):
        raise Unsupported(f"its kernel_shape {list(given)} is not that of its weights, {list(kernel)}")
    dilations = list(node.get("dilations", [1] * axes))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    return list(node.get("strides", [1] * axes)), dilations, reach


def _halves(node: Node, totals: Sequence[int]) -> list[Pair]:
    """Return paddings before and after from their sums; the odd one comes last for SAME_UPPER."""
    last = node.get("auto_pad") == b"SAME_UPPER"
    return [(t // 2, t - t // 2) if last else (t - t // 2, t // 2) for t in totals]


def _paddings(node: Node, sizes: Sequence[int], strides: Sequence[int], reach: Sequence[int]) -> list[Pair]:
    """Return the padding before and after each axis."""
    if node.get("auto_pad", b"NOTSET").startswith(b"SAME"):
        rows = zip(sizes, strides, reach, strict=True)
        return _halves(node, [max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in rows])
    axes = len(sizes)
    pads = node.get("pads", [0] * 2 * axes)
    return list(zip(pads[:axes], pads[axes:], strict=True))


def _same_on_both_sides(paddings: Sequence[Pair]) -> bool:
    return all(before == after >= 0 for before, after in paddings)


def _as_torch_pads(paddings: Sequence[Pair], reach: Sequence[int]) -> bool:
    """Return whether torch's poolings can pad so: both sides alike, by at most half of a window."""
    halves = all(2 * before <= r for (before, _), r in zip(paddings, reach, strict=True))
    return _same_on_both_sides(paddings) and halves


def _flat(paddings: Sequence[Pair]) -> list[int]:
    """Return paddings as torch's `pad` takes them, the last axis first."""
    return [size for pair in reversed(paddings) for size in pair]


def conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute Conv with constant weights."""
    strides, dilations, reach = _options(node, weight.shape[2:])
    paddings = _paddings(node, x.shape[2:], strides, reach)
    padding = [before for before, _ in paddings]
    if not _same_on_both_sides(paddings):
        x, padding = functional.pad(x, _flat(paddings)), [0] * len(padding)
    function = _of_axes(weight, functional.conv1d, functional.conv2d, functional.conv3d)
    made: Tensor = function(x, weight, bias, strides, padding, dilations, node.get("group", 1))
    return made


def conv_transpose(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ConvTranspose with constant weights."""
    strides, dilations, reach = _options(node, weight.shape[2:])
    extra = list(node.get("output_padding", [0] * len(strides)))
    sizes = node.get("output_shape")
    if sizes is None and node.get("auto_pad", b"NOTSET").startswith(b"SAME"):
        sizes = [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
    if sizes is None:
        pads = node.get("pads", [0] * 2 * len(strides))
        paddings = list(zip(pads[: len(strides)], pads[len(strides) :], strict=True))
    else:
        rows = zip(x.shape[2:], strides, extra, reach, sizes, strict=True)
        paddings = _halves(node, [(n - 1) * s + more + r - size for n, s, more, r, size in rows])
    function = _of_axes(
        weight, functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d
    )
    groups = node.get("group", 1)
    made: Tensor
    if _same_on_both_sides(paddings):
        padding = [before for before, _ in paddings]
        made = function(x, weight, bias, strides, padding, extra, groups, dilations)
        return made
    made = function(x, weight, None, strides, 0, extra, groups, dilations)
    made = functional.pad(made, [-size for size in _flat(paddings)])
    return made if bias is None else made + bias.reshape(-1, *[1] * len(strides))


def _of_axes(like: Tensor, *functions: Any) -> Any:
    """Return the function for as many spatial axes as a tensor has: one of 1, 2 or 3."""
    axes = like.ndim - 2
    if not 1 <= axes <= len(functions):
        raise Unsupported(f"it has {axes} spatial axes, and 1 to {len(functions)} are supported")
    return functions[axes - 1]


def max_pool(node: Node, x: Tensor) -> Tensor:
    """Compute MaxPool. Padding never wins, as in ONNX."""
    kernel = list(node.get("kernel_shape"))
    strides, dilations, reach = _options(node, kernel)
    paddings, ceil = _paddings(node, x.shape[2:], strides, reach), bool(node.get("ceil_mode", 0))
    function = _of_axes(x, functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)
    made: Tensor
    if _as_torch_pads(paddings, reach):
        made = function(x, kernel, strides, [before for before, _ in paddings], dilations, ceil)
        return made
    if ceil or set(dilations) != {1} or any(max(pair) >= r for pair, r in zip(paddings, reach, strict=True)):
        raise Unsupported(f"with ceil_mode or dilations it cannot pad by {paddings}; pad both ends alike")
    # A window that reaches over an edge contains the pixel there, and may see it more than once.
    for axis, pair in enumerate(paddings, 2):
        x = moves.padded(x, axis, pair, "edge")
    made = function(x, kernel, strides)
    return made


def average_pool(node: Node, x: Tensor) -> Tensor:
    """Compute AveragePool."""
    kernel = list(node.get("kernel_shape"))
    strides, dilations, reach = _options(node, kernel)
    if set(dilations) != {1}:
        raise Unsupported(f"its dilations are {dilations}; only 1 is supported")
    paddings = _paddings(node, x.shape[2:], strides, reach)
    counts_all, ceil = bool(node.get("count_include_pad", 0)), bool(node.get("ceil_mode", 0))
    function = _of_axes(x, functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)
    made: Tensor
    if _as_torch_pads(paddings, reach):
        made = function(x, kernel, strides, [before for before, _ in paddings], ceil, counts_all)
        return made
    if ceil:
        raise Unsupported(f"with ceil_mode it cannot pad by {paddings}; pad both ends alike")
    made = function(functional.pad(x, _flat(paddings)), kernel, strides)
    if counts_all:
        return made
    ones = torch.ones(1, *x.shape[1:], dtype=x.dtype, device=x.device)
    return made / function(functional.pad(ones, _flat(paddings)), kernel, strides)


def global_average_pool(node: Node, x: Tensor) -> Tensor:
    """Compute the mean over the spatial axes, which stay with size 1."""
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


def global_max_pool(node: Node, x: Tensor) -> Tensor:
    """Compute the maximum over the spatial axes, which stay with size 1."""
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)
