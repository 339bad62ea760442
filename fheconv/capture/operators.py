"""Handles the operators of torch.

A handler takes the call and torch's arguments, in which encrypted tensors are values and constants are
tensors. It returns a value, or several as torch does. It raises `Unsupported` for arguments that are not
supported.
"""

import difflib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fheconv.arithmetic.geometry import direct_form
from fheconv.basics.arrays import Array, frozen
from fheconv.capture import elementwise, poolings, products
from fheconv.capture.calls import (
    BATCH,
    Call,
    array,
    constant,
    gathered,
    move,
    plain,
    with_constant,
)
from fheconv.capture.graph import Final, Unsupported, Value
from fheconv.capture.probing import leaves
from fheconv.networks.expression import ELEMENTWISE, Expression, X
from fheconv.networks.linear import Kernel, pointwise

# Convolutions and linear layers.


def _convolution(
    call: Call, x: Value, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Value:  # fmt: skip
    return _conv(call, x, weight, bias, groups, stride=stride, padding=padding, dilation=dilation)


def _conv_transpose(
    call: Call, x: Value, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Value:  # fmt: skip
    options = {"stride": stride, "padding": padding, "dilation": dilation, "output_padding": output_padding}
    return _conv(call, x, weight, bias, groups, transposed=True, **options)


def _conv(
    call: Call, x: Any, weight: Any, bias: Any, groups: int, *, transposed: bool = False,
    output_padding: Any = 0, **options: Any,
) -> Value:  # fmt: skip
    kernel, shift = array(plain(weight, "its weights")), _bias(bias)
    axes = kernel.ndim - 2
    poolings.check_axes(x, axes)
    # Torch writes one number for all axes as a list with one element.
    options = {
        key: list(value) * axes if isinstance(value, list | tuple) and len(value) == 1 else value
        for key, value in {**options, "output_padding": output_padding}.items()
    }
    kernel, geometry = direct_form(
        kernel, transposed=transposed, padding_mode="zeros", groups=groups, **options
    )
    step = Kernel(weight=frozen(kernel), geometry=geometry)
    return call.graph.linear(call.graph.affine(x), step, call.name, bias=shift)


def _linear(call: Call, x: Any, weight: Any, bias: Any = None) -> Value:
    kernel, shift = array(plain(weight, "its weights")), _bias(bias)
    value = call.graph.affine(x)
    # In torch the features are the last axis, here the first.
    value = move(call, value, lambda t: t.movedim(-1, 1))
    value = call.graph.linear(value, pointwise(kernel, len(value.shape) - 1), call.name, bias=shift)
    return move(call, value, lambda t: t.movedim(1, -1))


def _bias(bias: Any) -> Array | None:
    return None if bias is None else array(plain(bias, "its bias"))


def _matmul(call: Call, x: Any, y: Any) -> Value:
    if isinstance(y, torch.Tensor) and y.ndim == 2:
        return _linear(call, x, y.t())
    if isinstance(x, torch.Tensor) and x.ndim == 2 and len(y.shape) > 1:
        rows = move(call, y, lambda t: t.transpose(-1, -2))
        return move(call, call.graph.affine(_linear(call, rows, x)), lambda t: t.transpose(-1, -2))
    raise Unsupported(
        "matrices of encrypted values cannot be multiplied; the nearest that is supported: a Linear layer, "
        "or sums of products of elements, as in (x * y).sum(dim)"
    )


def _addmm(call: Call, bias: Any, x: Any, y: Any, *, beta: float = 1, alpha: float = 1) -> Value:
    shift = beta * plain(bias, "its bias")
    return _linear(call, x, alpha * plain(y, "its weights").t(), shift.reshape(-1))


def _batch_norm(
    call: Call, x: Value, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float,
    eps: float, *_: Any,
) -> Value:  # fmt: skip
    if training or mean is None:
        raise Unsupported("it normalizes by the batch at hand; train it with running statistics")
    gain = 1 / np.sqrt(array(plain(variance, "its variance")) + eps)
    gain = gain if weight is None else gain * array(plain(weight, "its weight"))
    shift = -array(plain(mean, "its mean")) * gain
    shift = shift if bias is None else shift + array(plain(bias, "its bias"))
    across = (-1, *[1] * (len(call.shape) - 1))
    scaled = with_constant(call, "mul", x, gain.reshape(across), call.read_once)
    return with_constant(call, "add", scaled, shift.reshape(across), read_once=True)


def _batch_norm_of_constants(
    call: Call, x: Value, weight: Any, bias: Any, mean: Any, variance: Any, momentum: float, eps: float
) -> tuple[Value]:
    return (_batch_norm(call, x, weight, bias, mean, variance, False, momentum, eps),)


# Operators that only move values.


def _move(call: Call, x: Any, *arguments: Any, **options: Any) -> Any:
    if any(isinstance(leaf, Value) for leaf in leaves((arguments, options))):
        raise Unsupported(
            "the places that it reads depend on the image; the nearest that is supported: constant places"
        )
    return move(call, x, lambda places: call.target(places, *arguments, **options))


def _gather(call: Call, x: Any, y: Any, *arguments: Any) -> Value:
    parts = [_part(call, part) for part in (x, y)]
    return gathered(call, parts, lambda a, b: call.target(a, b, *arguments))


def _cat(call: Call, parts: Any, dim: int = 0) -> Value:
    return gathered(call, [_part(call, p) for p in parts], lambda *places: call.target(places, dim))


def _part(call: Call, part: Any) -> Any:
    """Return a value unchanged, and one image of a constant batch."""
    return part if isinstance(part, Value) else constant(part, part.ndim - 1)


def _pad(call: Call, x: Value, pads: Any, mode: str = "constant", value: float | None = None) -> Value:
    padded: Value = move(call, x, lambda t: torch.nn.functional.pad(t, pads, mode))
    if mode != "constant" or not value:
        return padded
    if not np.isfinite(value):
        raise Unsupported(f"it pads with {value}; the nearest that is supported: the padding of a MaxPool")
    inside = torch.zeros(BATCH, *x.shape, dtype=torch.float64)
    border = torch.nn.functional.pad(inside, pads, value=value)[0].numpy()
    return with_constant(call, "add", padded, border, read_once=True)


def _constant_pad(call: Call, x: Value, pads: Any, value: float = 0) -> Value:
    return _pad(call, x, pads, "constant", value)


def _like(call: Call, x: Value, *arguments: Any, **options: Any) -> torch.Tensor:
    made: torch.Tensor = call.target(torch.zeros(BATCH, *x.shape), *arguments, **options)
    return made.zero_() if "empty" in call.operation else made


# Operators that change no value, and operators that only the client can compute.


def _same(call: Call, x: Value, *_: Any, **__: Any) -> Value:
    return x


def _to(call: Call, x: Value, *_: Any, **__: Any) -> Value:
    before, after = call.node.all_input_nodes[0].meta["val"].dtype, call.node.meta["val"].dtype
    if after == torch.bool and before != torch.bool:
        return call.graph.apply(x, Expression("ne", (X, 0.0)), call.name)
    if before.is_floating_point and not after.is_floating_point:
        if after not in (torch.int32, torch.int64):
            raise Unsupported(f"numbers wrap in {after}; the nearest that is supported: torch.int32")
        return call.graph.apply(x, Expression("trunc", (X,)), call.name)
    return x


def _softmax(call: Call, x: Value, dim: int, *_: Any) -> Final:
    axis = 1 + call.axis(dim, x.shape)
    return Final(call.graph.pending(x), Expression(call.operation, (X,), (("axis", axis),)))


def _argmax(call: Call, x: Value, dim: int | None = None, keepdim: bool = False) -> Final:
    if dim is None:
        raise Unsupported("without dim it runs over the images of a batch; give dim")
    axis = 1 + call.axis(dim, x.shape)
    return Final(call.graph.pending(x), Expression("argmax", (X,), (("axis", axis), ("keepdims", keepdim))))


MOVES = (
    "broadcast_to", "channel_shuffle", "chunk", "diagonal", "expand", "flatten", "flip", "im2col", "index",
    "index_select", "movedim", "narrow", "native_channel_shuffle", "permute", "pixel_shuffle",
    "pixel_unshuffle", "repeat", "repeat_interleave", "reshape", "roll", "rot90", "select", "slice", "split",
    "split_with_sizes", "squeeze", "swapaxes", "t", "tile", "transpose", "tril", "triu", "unbind",
    "unflatten", "unfold", "unsafe_view", "unsqueeze", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "upsample_nearest_exact1d", "upsample_nearest_exact2d", "upsample_nearest_exact3d",
    "view",
)  # fmt: skip
SAME = ("alias", "clone", "contiguous", "detach", "identity", "lift_fresh_copy")


def _each(name: str, handler: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Return entries with the same handler for 1, 2 and 3 spatial axes."""
    return {f"{name}{axes}d": handler for axes in (1, 2, 3)}


HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(ELEMENTWISE, elementwise.apply),
    **dict.fromkeys(MOVES, _move),
    **dict.fromkeys(SAME, _same),
    **dict.fromkeys(("to", "to_copy", "type_as"), _to),
    # Capture has refused those that drop anything.
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), _same),
    **dict.fromkeys(("add", "sub", "rsub"), elementwise.add),
    **dict.fromkeys(("mul", "div"), elementwise.product),
    **dict.fromkeys(("maximum", "minimum"), elementwise.extreme),
    **dict.fromkeys(("max", "min"), elementwise.extreme_or_over_axes),
    **dict.fromkeys(("mean", "sum"), poolings.mean),
    **dict.fromkeys(("softmax", "log_softmax"), _softmax),
    **dict.fromkeys(("matmul", "mm"), _matmul),
    **dict.fromkeys(("cat", "stack"), _cat),
    **dict.fromkeys(("copy", "select_scatter", "slice_scatter"), _gather),
    **dict.fromkeys(
        (
            "empty_like",
            "full_like",
            "ones_like",
            "zeros_like",
            "new_empty",
            "new_full",
            "new_ones",
            "new_zeros",
        ),
        _like,
    ),
    **_each("conv", _convolution),
    **_each("conv_transpose", _conv_transpose),
    **_each("avg_pool", poolings.avg_pool),
    **_each("adaptive_avg_pool", poolings.adaptive_avg_pool),
    **_each("max_pool", poolings.max_pool),
    **_each("adaptive_max_pool", poolings.adaptive_max_pool),
    **{
        f"{name}_with_indices": poolings.max_pool_and_indices
        for name in ("max_pool1d", "max_pool2d", "max_pool3d")
    },
    "addmm": _addmm,
    "amax": poolings.amax,
    "amin": poolings.amin,
    "argmax": _argmax,
    "batch_norm": _batch_norm,
    "dequantize_per_channel": elementwise.quantize_channels,
    "dequantize_per_tensor": elementwise.dequantize,
    "fake_quantize_per_channel_affine": elementwise.quantize_channels,
    "fake_quantize_per_tensor_affine": elementwise.quantize,
    "quantize_per_channel": elementwise.quantize_channels,
    "quantize_per_tensor": elementwise.quantize,
    "constant_pad_nd": _constant_pad,
    "glu": products.glu,
    "linear": _linear,
    "masked_fill": elementwise.masked_fill,
    "native_batch_norm_legit_no_training": _batch_norm_of_constants,
    "neg": elementwise.negative,
    "pad": _pad,
    "prelu": elementwise.prelu,
    "rrelu": elementwise.rrelu,
    "where": elementwise.where,
}
RANDOM = (
    "it draws at random, so that no two runs would agree; call model.eval(), and where dropout is a function "
    "pass training=self.training"
)
NEAREST = {
    "batch_norm_legit": "BatchNorm with running statistics, which are constants",
    "batch_norm_legit_functional": "BatchNorm in evaluation mode, with running statistics",
    "bmm": "a Linear layer, or sums of products of elements, as in (x * y).sum(dim)",
    "choose_qparams_affine": "scales of activations that are constants, and not chosen for each image",
    "embedding": "one-hot images and a Linear layer",
    "grid_sampler": "a convolution with constant weights",
    "group_norm": "BatchNorm, whose statistics are constants",
    "gru": "a convolution (Conv1d) over the sequence",
    "instance_norm": "BatchNorm, whose statistics are constants",
    "item": "operators on whole tensors: a circuit has no branches",
    "layer_norm": "BatchNorm, whose statistics are constants",
    "linalg_vector_norm": "a sum of abs or squares",
    "lstm": "a convolution (Conv1d) over the sequence",
    "norm": "a sum of abs or squares",
    "rms_norm": "BatchNorm, whose statistics are constants",
    "rnn_relu": "a convolution (Conv1d) over the sequence",
    "rnn_tanh": "a convolution (Conv1d) over the sequence",
    "scaled_dot_product_attention": "a convolution with constant weights",
    "sort": "the plain logits; sort them after decryption",
    "std": "BatchNorm, whose statistics are constants",
    "topk": "the plain logits; sort them after decryption",
    "var": "BatchNorm, whose statistics are constants",
}


def nearest(operation: str) -> str:
    """Return a sentence with the supported operators nearest to one that is not supported."""
    plain_name = operation.removeprefix("native_")
    close = NEAREST.get(plain_name) or ", ".join(difflib.get_close_matches(operation, HANDLERS, 3, 0.7))
    return (
        "it is neither linear nor a function of one variable that is known here; the nearest that is "
        "supported: " + (close or "convolutions, linear layers, poolings, and functions of one variable")
    )
