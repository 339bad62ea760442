"""Handles functions of one variable, and operators on the elements of two tensors."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fheconv.basics.arrays import Array, along_channels
from fheconv.capture import poolings
from fheconv.capture.calls import (
    Call,
    array,
    broadcast,
    constant,
    gathered,
    per_channel,
    plain,
    with_constant,
)
from fheconv.capture.graph import Affine, Pending, Unsupported, Value
from fheconv.capture.products import divided, multiplied
from fheconv.networks.expression import Expression, X


def apply(call: Call, *parts: Any, **options: Any) -> Value:
    """Apply an operator to constants and to values that are functions of the same value."""
    parts = tuple(broadcast(call, part, call.shape) if isinstance(part, Value) else part for part in parts)
    values = [part for part in parts if isinstance(part, Value)]
    common = (values[0], [X]) if len(values) == 1 else call.graph.common(values)
    if common is None:
        raise Unsupported(
            "two encrypted values cannot be compared or chosen from, unless both are functions of the same "
            "one value; the nearest that is supported: sums, products, and the maximum or minimum of two"
        )
    value, functions = common
    variables = iter(functions)
    arguments = tuple(next(variables) if isinstance(part, Value) else _operand(call, part) for part in parts)
    function = Expression(call.operation, arguments, tuple(sorted(options.items())))
    function(np.zeros((1, *call.shape[:1], *[1] * len(call.shape[1:]))))  # fails for an unknown option
    return call.graph.apply(value, function, call.name, call.read_once)


def _operand(call: Call, part: Any) -> Any:
    if not isinstance(part, torch.Tensor | complex):
        return part
    operand = per_channel(constant(part, len(call.shape)), call.shape)
    if operand is None:
        raise Unsupported(
            "its constants differ from place to place; the nearest that is supported: one a channel, or to "
            "multiply with, add or take the maximum of such constants"
        )
    return operand


def prelu(call: Call, x: Value, slope: Any) -> Value:
    """Apply PReLU, with one slope for each channel."""
    slope = plain(slope, "its slope")
    return apply(call, x, along_channels(slope, len(call.shape)))


def rrelu(call: Call, x: Value, low: float = 1 / 8, high: float = 1 / 3, training: bool = False) -> Value:
    """Apply RReLU with the mean slope, which it has in evaluation mode."""
    if training:
        raise Unsupported("it draws at random; call model.eval()")
    return call.graph.apply(x, Expression("leaky_relu", (X, (low + high) / 2)), call.name, call.read_once)


def add(call: Call, x: Any, y: Any, *, alpha: float = 1) -> Value:
    """Add or subtract; the second argument is multiplied by `alpha`."""
    if call.node.meta["val"].dtype == torch.bool:
        raise Unsupported(
            "it adds truth values; the nearest that is supported: logical_or, or sums of floats"
        )
    if call.operation == "rsub":  # y − alpha · x
        x, y = y, x
        if alpha != 1:
            raise Unsupported("rsub with alpha; the nearest that is supported: a difference")
    factor = alpha if call.operation == "add" else -alpha
    axes = len(call.shape)
    if not isinstance(y, Value):
        return _broadcast_constant(call, "add", x, factor * constant(y, axes), call.read_once)
    if not isinstance(x, Value):
        scaled = (
            _broadcast_constant(call, "mul", y, np.asarray(float(factor)), call.read_once)
            if factor != 1
            else y
        )
        return _broadcast_constant(call, "add", scaled, constant(x, axes), call.read_once or factor != 1)
    pair = [broadcast(call, value, call.shape) for value in (x, y)]
    common = call.graph.common(pair) if any(isinstance(value, Pending) for value in pair) else None
    options = (("alpha", factor),) if factor != 1 else ()
    function = None if common is None else Expression("add", tuple(common[1]), options)
    if common is not None and function is not None and call.read_once:
        return call.graph.apply(common[0], function, call.name)
    # Other operators read the functions too. A function that includes the sum would cost one more lookup.
    a, b = (call.graph.affine(value) for value in pair)
    total = call.graph.add(a, b, call.name, factor)
    if common is not None and function is not None and common[0].view is None:
        total.origin = (common[0].base, function)
    return total


def product(call: Call, x: Any, y: Any, *, rounding_mode: str | None = None) -> Value:
    """Multiply or divide."""
    axes = len(call.shape)
    if rounding_mode is not None:
        return apply(call, x, y, rounding_mode=rounding_mode)
    if isinstance(x, Value) and not isinstance(y, Value):
        return _broadcast_constant(call, call.operation, x, constant(y, axes), call.read_once)
    if isinstance(y, Value) and not isinstance(x, Value) and call.operation == "mul":
        return _broadcast_constant(call, "mul", y, constant(x, axes), call.read_once)
    if isinstance(x, Value) and isinstance(y, Value):
        pair = [broadcast(call, value, call.shape) for value in (x, y)]
        if call.graph.common(pair) is None:
            return (multiplied if call.operation == "mul" else divided)(call, x, y)
    return apply(call, x, y)


def _broadcast_constant(call: Call, operation: str, value: Value, values: Array, read_once: bool) -> Value:
    return with_constant(call, operation, broadcast(call, value, call.shape), values, read_once)


def negative(call: Call, x: Value) -> Value:
    """Multiply by −1."""
    return with_constant(call, "mul", x, np.asarray(-1.0), call.read_once)


def extreme(call: Call, x: Any, y: Any) -> Value:
    """Return the maximum b + relu(a − b), or the minimum a − relu(a − b), of two."""
    pair = []
    for part in (x, y):
        if isinstance(part, Value):
            pair.append(broadcast(call, part, call.shape))
            continue
        values = constant(part, len(call.shape))
        if per_channel(values, call.shape) is not None:
            return apply(call, x, y)
        pair.append(Affine(call.name, (), np.broadcast_to(values, call.shape)))
    if isinstance(x, Value) and isinstance(y, Value) and call.graph.common(pair) is not None:
        return apply(call, x, y)
    a, b = (call.graph.affine(value) for value in pair)
    difference = call.graph.add(a, b, call.name, -1)
    excess = call.graph.affine(Pending(call.name, difference, Expression("relu", (X,))))
    if call.operation == "minimum":
        return call.graph.add(a, excess, call.name, -1)
    return call.graph.add(b, excess, call.name)


def extreme_or_over_axes(call: Call, x: Any, y: Any = None, *more: Any) -> Any:
    """Apply torch.max or torch.min, to two tensors or over an axis."""
    least = call.operation == "min"
    if isinstance(y, Value | torch.Tensor):
        return extreme(replace(call, operation="minimum" if least else "maximum"), x, y)
    return ((poolings.amin if least else poolings.amax)(call, x, y, *more),)


def where(call: Call, condition: Any, x: Any, y: Any) -> Value:
    """Choose elements by a constant mask, or by a comparison of the same value."""
    if isinstance(condition, Value):
        return apply(call, condition, x, y)
    mask = torch.as_tensor(constant(condition, len(call.shape)).astype(bool))
    parts = [
        broadcast(call, part, call.shape)
        if isinstance(part, Value)
        else np.broadcast_to(constant(part, len(call.shape)), call.shape)
        for part in (x, y)
    ]
    return gathered(call, parts, lambda a, b: torch.where(mask, a, b))


def masked_fill(call: Call, x: Any, mask: Any, value: Any) -> Value:
    """Set a number where a mask holds."""
    return where(replace(call, operation="where"), mask, value, x)


def quantize(
    call: Call, x: Value, scale: Any, zero_point: Any, low: Any = None, high: Any = None, *_: Any, **__: Any
) -> Value:
    """Round to integers times a scale, as training for integers does, or to the integers themselves."""
    if high is None:
        raise Unsupported(
            f"{call.operation} makes torch's own quantized tensors, which torch.export does not follow; the "
            "nearest that is supported: fake_quantize_per_tensor_affine"
        )
    return apply(call, x, _number(scale, "scale"), _number(zero_point, "zero-point"), int(low), int(high))


def dequantize(call: Call, x: Value, scale: Any, zero_point: Any, *_: Any, **__: Any) -> Value:
    """Return the real numbers that integers stand for."""
    return apply(call, x, _number(scale, "scale"), _number(zero_point, "zero-point"))


def _number(value: Any, what: str) -> float:
    """Return the one scale or zero-point of a tensor."""
    numbers = array(plain(value, f"its {what}"))
    if numbers.size != 1:
        raise Unsupported(
            f"it has {numbers.size} numbers for its {what}; the nearest that is supported: one for the whole "
            "activation (per_tensor). Weights may have one for each channel"
        )
    return float(numbers.item())


def quantize_channels(call: Call, x: Any, scale: Any, *_: Any, **__: Any) -> Value:
    """Refuse activations with a scale for each channel."""
    _number(scale, "scale")
    raise Unsupported(f"{call.operation}; the nearest that is supported: per_tensor instead of per_channel")
