"""Computes ONNX's operators with torch: the table of those that are supported.

A function takes the node and its inputs. These are tensors, except for those that the table calls `static`:
shapes, places and bounds, which are arrays that may depend on the image's shape, but not on its values. An
input that is left out is None. The function returns a tensor, or several.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fheconv.basics.arrays import Array
from fheconv.capture import onnx_moves as moves
from fheconv.capture import onnx_quantizers as quantizers
from fheconv.capture import onnx_windows as windows
from fheconv.capture.graph import Unsupported
from fheconv.capture.onnx_node import Node


@dataclass(frozen=True)
class Operator:
    """Holds the function of an operator, and the numbers of its inputs that must be constants."""

    function: Callable[..., Any]
    static: tuple[int, ...] = ()


# Layers.


def _gemm(node: Node, x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    x, y = x.t() if node.get("transA", 0) else x, y if node.get("transB", 0) else y.t()
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    y = y if alpha == 1 else alpha * y
    shift = bias if bias is None or beta == 1 else beta * bias
    if shift is None or shift.ndim == 1:
        return functional.linear(x, y, shift)
    return functional.linear(x, y) + shift


def _batch_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if node.get("training_mode", 0):
        raise Unsupported("it normalizes by the batch at hand; export the model in evaluation mode")
    return functional.batch_norm(x, mean, variance, scale, bias, eps=node.get("epsilon", 1e-5))


def _reduce(how: Callable[..., Tensor]) -> Operator:
    """Return the entry of a sum, a mean or an extreme over axes."""

    def function(node: Node, x: Tensor, axes: Array | None = None) -> Tensor:
        wanted = moves.axes_of(node, axes, x.ndim)
        if not wanted:
            if node.get("noop_with_empty_axes", 0):
                return x
            raise Unsupported("without axes it runs over the images of a batch; give axes")
        return how(x, tuple(wanted), keepdim=bool(node.get("keepdims", 1)))

    return Operator(function, (1,))


def _softmax(how: Callable[..., Tensor]) -> Operator:
    def function(node: Node, x: Tensor) -> Tensor:
        if node.opset >= 13:
            return how(x, node.get("axis", -1))
        axis = node.get("axis", 1) % x.ndim  # in old files it runs over this axis and all behind it
        if axis == x.ndim - 1:
            return how(x, axis)
        return how(x.flatten(axis), axis).reshape(x.shape)

    return Operator(function)


def _argmax(node: Node, x: Tensor) -> Tensor:
    if node.get("select_last_index", 0):
        raise Unsupported("select_last_index is not supported; export argmax as torch and Keras have it")
    return x.argmax(node.get("axis", 0), bool(node.get("keepdims", 1)))


# Functions of single values.


def _each(function: Callable[[Tensor], Tensor]) -> Operator:
    """Return the entry of a function without options."""
    return Operator(lambda node, x: function(x))


def _two(function: Callable[[Any, Any], Tensor]) -> Operator:
    """Return the entry of an operator on two tensors."""
    return Operator(lambda node, x, y: function(x, y))


def _many(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """Return the entry of an operator on any number of tensors."""
    return Operator(lambda node, *parts: reduce(function, parts))


def _clip(node: Node, x: Tensor, low: Array | None = None, high: Array | None = None) -> Tensor:
    least, greatest = (
        node.get(name) if bound is None else float(np.asarray(bound).item())
        for name, bound in (("min", low), ("max", high))
    )
    return x if least is None and greatest is None else x.clamp(least, greatest)


def _prelu(node: Node, x: Tensor, slope: Tensor) -> Tensor:
    one_a_channel = slope.ndim == x.ndim - 1 and slope.numel() == slope.shape[0]
    if slope.numel() == 1 or one_a_channel:
        return functional.prelu(x, slope.reshape(-1))
    return torch.where(x > 0, x, slope * x)


def _divide(x: Tensor, y: Tensor) -> Tensor:
    floats = x.is_floating_point() or y.is_floating_point()
    return x / y if floats else torch.div(x, y, rounding_mode="trunc")


def _modulo(node: Node, x: Tensor, y: Tensor) -> Tensor:
    return torch.fmod(x, y) if node.get("fmod", 0) else torch.remainder(x, y)


def _cast(node: Node, x: Tensor) -> Tensor:
    """Change the type. All floats have one type here, so that a cast between them changes nothing."""
    from onnx import TensorProto as P

    match node.get("to"):
        case P.FLOAT | P.FLOAT16 | P.DOUBLE | P.BFLOAT16:
            return x if x.is_floating_point() else x.float()
        case P.INT32 | P.INT64:
            return x.to(torch.int64)
        case P.BOOL:
            return x.bool()
    raise Unsupported("it casts to a type other than float, bool, int32 and int64")


def _dropout(node: Node, x: Tensor, share: Array | None = None, training: Array | None = None) -> Tensor:
    if training is not None and training.any() and (share is None or share.any()):
        raise Unsupported("it draws at random; export the model in evaluation mode")
    return x


def _gelu(node: Node, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=node.get("approximate", b"none").decode())


def _hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    return (x * node.get("alpha", 0.2) + node.get("beta", 0.5)).clamp(0, 1)


def _selu(node: Node, x: Tensor) -> Tensor:
    alpha, gamma = node.get("alpha", 1.67326319217681884765625), node.get("gamma", 1.05070102214813232421875)
    return gamma * functional.elu(x, alpha)


def _shrink(node: Node, x: Tensor) -> Tensor:
    bound, shift = node.get("lambd", 0.5), node.get("bias", 0.0)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return torch.where(x > bound, x - shift, torch.where(x < -bound, x + shift, zero))


OPERATORS: dict[str, Operator] = {
    "Abs": _each(torch.abs),
    "Add": _two(torch.add),
    "And": _two(torch.logical_and),
    "ArgMax": Operator(_argmax),
    "Atan": _each(torch.atan),
    "AveragePool": Operator(windows.average_pool),
    "BatchNormalization": Operator(_batch_norm),
    "Cast": Operator(_cast),
    "Ceil": _each(torch.ceil),
    "Celu": Operator(lambda node, x: functional.celu(x, node.get("alpha", 1.0))),
    "Clip": Operator(_clip, (1, 2)),
    "Concat": Operator(moves.concat),
    "Conv": Operator(windows.conv),
    "ConvTranspose": Operator(windows.conv_transpose),
    "Cos": _each(torch.cos),
    "DequantizeLinear": Operator(quantizers.dequantize),
    "DepthToSpace": Operator(moves.depth_to_space),
    "Div": _two(_divide),
    "Dropout": Operator(_dropout, (1, 2)),
    "Elu": Operator(lambda node, x: functional.elu(x, node.get("alpha", 1.0))),
    "Equal": _two(torch.eq),
    "Erf": _each(torch.erf),
    "Exp": _each(torch.exp),
    "Expand": Operator(moves.expand, (1,)),
    "Flatten": Operator(moves.flatten),
    "Floor": _each(torch.floor),
    "Gather": Operator(moves.gather, (1,)),
    "GatherND": Operator(moves.gather_nd, (1,)),
    "Gelu": Operator(_gelu),
    "Gemm": Operator(_gemm),
    "GlobalAveragePool": Operator(windows.global_average_pool),
    "GlobalMaxPool": Operator(windows.global_max_pool),
    "Greater": _two(torch.gt),
    "GreaterOrEqual": _two(torch.ge),
    "HardSigmoid": Operator(_hard_sigmoid),
    "HardSwish": _each(functional.hardswish),
    "Identity": _each(lambda x: x),
    "LeakyRelu": Operator(lambda node, x: functional.leaky_relu(x, node.get("alpha", 0.01))),
    "Less": _two(torch.lt),
    "LessOrEqual": _two(torch.le),
    "Log": _each(torch.log),
    "LogSoftmax": _softmax(torch.log_softmax),
    "MatMul": _two(torch.matmul),
    "Max": _many(torch.maximum),
    "MaxPool": Operator(windows.max_pool),
    "Mean": Operator(lambda node, *parts: reduce(torch.add, parts) / len(parts)),
    "Min": _many(torch.minimum),
    "Mish": _each(functional.mish),
    "Mod": Operator(_modulo),
    "Mul": _two(torch.mul),
    "Neg": _each(torch.neg),
    "Not": _each(torch.logical_not),
    "Or": _two(torch.logical_or),
    "PRelu": Operator(_prelu),
    "Pad": Operator(moves.pad, (1, 2, 3)),
    "Pow": _two(torch.pow),
    "QuantizeLinear": Operator(quantizers.quantize, (2,)),
    "Reciprocal": _each(torch.reciprocal),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum),
    "Relu": _each(torch.relu),
    "Reshape": Operator(moves.reshape, (1,)),
    "Resize": Operator(moves.resize, (1, 2, 3)),
    "Round": _each(torch.round),
    "Selu": Operator(_selu),
    "Shrink": Operator(_shrink),
    "Sigmoid": _each(torch.sigmoid),
    "Sign": _each(torch.sign),
    "Sin": _each(torch.sin),
    "Slice": Operator(moves.slices, (1, 2, 3, 4)),
    "Softmax": _softmax(torch.softmax),
    "Softplus": _each(functional.softplus),
    "Softsign": _each(functional.softsign),
    "SpaceToDepth": Operator(moves.space_to_depth),
    "Split": Operator(moves.split, (1,)),
    "Sqrt": _each(torch.sqrt),
    "Squeeze": Operator(moves.squeeze, (1,)),
    "Sub": _two(torch.sub),
    "Sum": _many(torch.add),
    "Swish": Operator(lambda node, x: x * torch.sigmoid(node.get("alpha", 1.0) * x)),
    "Tanh": _each(torch.tanh),
    "ThresholdedRelu": Operator(lambda node, x: functional.threshold(x, node.get("alpha", 1.0), 0.0)),
    "Tile": Operator(moves.tile, (1,)),
    "Transpose": Operator(moves.transpose),
    "Unsqueeze": Operator(moves.unsqueeze, (1,)),
    "Upsample": Operator(moves.resize, (1,)),
    "Where": Operator(lambda node, *parts: torch.where(*parts)),
}
_QUANTIZED = "QuantizeLinear and DequantizeLinear around operators of floats, or the float model"
_SEQUENCE = "a convolution over the sequence"
_STATISTICS = "BatchNormalization, whose statistics are constants"
_NEAREST = {
    **dict.fromkeys(
        ("DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"), _QUANTIZED,
    ),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), _SEQUENCE),
    **dict.fromkeys(
        ("GroupNormalization", "InstanceNormalization", "LayerNormalization", "LpNormalization", "LRN",
         "MeanVarianceNormalization", "RMSNormalization"), _STATISTICS,
    ),
    **dict.fromkeys(("If", "Loop", "Scan"), "a model without branches, exported for one image size"),
    **dict.fromkeys(("NonMaxSuppression", "TopK"), "the plain scores; choose among them after decryption"),
    "Attention": "a convolution with constant weights",
    "Einsum": "MatMul with constant weights",
}  # fmt: skip


def nearest(operator: str) -> str:
    """Return what is supported nearest to an operator that is not."""
    close = ", ".join(difflib.get_close_matches(operator, OPERATORS, 3, 0.6))
    return _NEAREST.get(operator) or close or "convolutions, linear layers, poolings and activations"
