"""ONNX's QuantizeLinear and DequantizeLinear, with which training for integers leaves its scales in a file.

Integers are kept as floats, so that a network with them is captured like any other.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fheconv.basics.arrays import Array
from fheconv.capture.graph import Unsupported
from fheconv.capture.onnx_node import Node

# ONNX's numbers of types, for files that name the type of the integers.
_TYPES = {2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16}


def quantize(node: Node, x: Tensor, scale: Tensor, zero_point: Array | None = None) -> Tensor:
    """Return round(x / scale) + zero_point, within the type of the zero-point."""
    named = node.get("output_dtype", 0)
    if named and named not in _TYPES:
        raise Unsupported("its integers have no type of 8 or 16 bits")
    dtype: Any = np.dtype(_TYPES.get(named, np.uint8)) if zero_point is None else zero_point.dtype
    if dtype not in (np.uint8, np.int8, np.uint16, np.int16):
        raise Unsupported(f"its integers have the type {dtype}; the nearest that is supported: int8 or uint8")
    ends = np.iinfo(dtype)
    zero = torch.tensor(0.0 if zero_point is None else zero_point.astype(np.float64)).to(x)
    steps = torch.round(x / _along(node, scale, x)) + _along(node, zero, x)
    return torch.clamp(steps, int(ends.min), int(ends.max))


def dequantize(node: Node, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Return the real numbers that integers stand for."""
    steps = x.to(scale.dtype)
    if zero_point is not None:
        steps = steps - _along(node, zero_point.to(scale.dtype), x)
    return steps * _along(node, scale, x)


def _along(node: Node, numbers: Tensor, x: Tensor) -> Tensor:
    """Return numbers that are one for the tensor, or one for each place of the node's axis."""
    if node.get("block_size", 0):
        raise Unsupported("it has a scale for each block; the nearest that is supported: one for each filter")
    if numbers.numel() == 1:
        return numbers.reshape(())
    sizes = [1] * x.ndim
    sizes[node.get("axis", 1)] = -1
    return numbers.reshape(sizes)
