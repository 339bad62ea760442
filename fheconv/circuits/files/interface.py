"""Writes a circuit's interface as plain data, and reads it back from a file that is not trusted."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from fheconv.arithmetic import OUTSIDE
from fheconv.basics.arrays import Array, Shape, frozen
from fheconv.basics.errors import ArtifactError
from fheconv.lowering.interface import Interface
from fheconv.lowering.lanes import Lanes
from fheconv.networks.expression import FUNCTIONS, Expression
from fheconv.networks.floats import Finish
from fheconv.networks.linear import Select
from fheconv.networks.quantization import Quantization

# Limits for data from a file: the greatest integer; the most values of an image or a result, such as those of
# 2048 × 2048 pixels; the most operators that the client computes in clear, and of those inside each other.
GREATEST = 2**62
MOST_VALUES = 2**22
MOST_OPERATORS, MOST_DEPTH = 1000, 100
MOST_AXES = 8
# The most images in a ciphertext, and the most bits of all their lanes together.
MOST_LANES, LANE_BITS = 64, 62


def interface_text(interface: Interface) -> bytes:
    """Return the text of `interface.json`. Two interfaces with one text do the same."""
    return json.dumps(interface_to_dict(interface)).encode()


def interface_to_dict(interface: Interface) -> dict[str, Any]:
    """Return everything as plain data, ready for JSON. `interface_from_dict` reads it."""
    finish, lanes = interface.finish, interface.lanes
    return {
        # Files of versions that clipped nothing have no slack, and nothing that clips.
        "input": {
            name: one
            for name, one in asdict(interface.input).items()
            if one or name not in ("slack", "clips")
        },
        "input_shape": list(interface.input_shape),
        "inputs": _plain(interface.inputs),
        "shape": list(interface.shape),
        "outputs": _plain(interface.outputs),
        "start": _plain(interface.start),
        "factors": _plain(interface.factors),
        "bias": _plain(interface.bias),
        "scale": _plain(interface.scale),
        "finish": finish
        and {
            "activation": _plain(finish.activation),
            "view": None if finish.view is None else _plain(finish.view.index),
            "last": _plain(finish.last),
        },
        # One image in each ciphertext is what files of earlier versions hold, without a word of it.
        **({"lanes": asdict(lanes)} if lanes.count > 1 else {}),
    }


def interface_from_dict(data: Any) -> Interface:
    """Return the interface from data that `interface_to_dict` made.

    Nothing larger than the data is made of it, whatever sizes it declares.

    Raises `ArtifactError` for data that `interface_to_dict` cannot make, such as positions outside the image.
    """
    try:
        return _interface(data)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ArtifactError(f"The circuit's interface is altered: {error!r:.200}.") from error


def _plain(value: Any) -> Any:
    """Return an array, an expression or a part of one as plain data."""
    if isinstance(value, np.ndarray):
        return {"shape": list(value.shape), "values": value.ravel().tolist()}
    if isinstance(value, Expression):
        return {
            "operator": value.operator,
            "arguments": [_plain(part) for part in value.arguments],
            "options": {name: _plain(part) for name, part in value.options},
        }
    return value.item() if isinstance(value, np.generic) else value


# Data that `_plain` cannot make raises one of the errors that `interface_from_dict` expects.


def _interface(data: Any) -> Interface:
    names = {"input", "input_shape", "inputs", "shape", "outputs"}
    names |= {"start", "factors", "bias", "scale", "finish"}
    whole = isinstance(data, dict) and set(data) - {"lanes"} == names
    _require(whole, f"it must be an object of {sorted(names)}")
    input_shape, shape = _shape(data["input_shape"]), _shape(data["shape"])
    _require(len(input_shape) <= 4 and 1 <= len(shape) <= 4, "images and results have at most 3 axes")
    factors = _integers(data["factors"])
    planes = math.prod(shape) * factors.size
    interface = Interface(
        input=_quantization(data["input"]),
        input_shape=input_shape,
        inputs=_positions(data["inputs"], math.prod(input_shape)),
        shape=shape,
        outputs=_positions(data["outputs"], planes),
        start=_integers(data["start"]),
        factors=factors,
        bias=_integers(data["bias"]),
        scale=_reals(data["scale"]),
        finish=None if data["finish"] is None else _finish(data["finish"], shape),
        lanes=_lanes(data["lanes"]) if "lanes" in data else Lanes.of(1, 1),
    )
    width = interface.lanes.width(max(interface.lanes.bits, interface.input.integer_bits))
    _require(width <= LANE_BITS, f"lanes of {width} bits together")
    _require(factors.shape == (factors.size,) and 0 < planes <= MOST_VALUES, "factors are p numbers")
    _require(interface.start.shape == (shape[0] * factors.size,), "start is a number for each plane")
    for name in ("bias", "scale"):
        _check_broadcast(getattr(interface, name), shape, name)
    _require(bool(np.isfinite(interface.scale).all()), "scale is finite")
    _require(len(interface.output_shape) > 0, "a model's outputs have an axis")  # and they can be computed
    return interface


def _lanes(data: Any) -> Lanes:
    _require(set(data) == {"count", "bits"}, "lanes have a count and bits")
    count, bits = data["count"], data["bits"]
    _require(type(count) is int and 2 <= count <= MOST_LANES, f"there are 2 to {MOST_LANES} lanes")
    _require(type(bits) is int and 1 <= bits <= LANE_BITS, "a lane has bits")
    return Lanes(count=count, bits=bits)


def _quantization(data: Any) -> Quantization:
    _require(type(data["integral"]) is bool, "integral is true or false")
    _require(type(data.get("clips", False)) is bool, "clips is true or false")
    for name in ("zero_point", "minimum", "maximum"):
        _require(type(data[name]) is int and abs(data[name]) < 2**32, f"{name} is an integer")
    _require(type(data["scale"]) in (int, float), "the scale is a number")
    quantization = Quantization(**{**data, "scale": float(data["scale"])})  # numpy has no large integers
    _require(0 < quantization.scale < math.inf, "the scale is above 0")
    slack = data.get("slack", 0)
    _require(type(slack) in (int, float) and 0 <= slack <= 1, "the slack is from 0 to 1")
    _require(quantization.minimum <= quantization.maximum, "integers have a range")
    return quantization


def _finish(data: Any, shape: Shape) -> Finish:
    _require(set(data) == {"activation", "view", "last"}, "a finish has an activation, a view and a last")
    activation, view, last = _function(data["activation"]), data["view"], data["last"]
    _check_constants(activation, shape)
    select = None
    if view is not None:
        index = _integers(view)
        inside = (index >= 0) & (index < math.prod(shape))
        _require(bool((inside | (index == OUTSIDE)).all()), "a view shows what there is")
        _require(0 < index.size <= MOST_VALUES, "a view shows something")
        select = Select(index=index)
        shape = index.shape
    if last is not None:
        last = _function(last)
        _check_constants(last, shape)
    return Finish(activation=activation, view=select, last=last)


def _function(data: Any) -> Expression:
    """Return an expression. What it costs to compute is checked before anything of it is made."""
    count = sum(1 for _ in _operators(data, 0))
    _require(count <= MOST_OPERATORS, f"there are {count:,} operators, and at most {MOST_OPERATORS:,} fit")
    return _expression(data)


def _operators(data: Any, depth: int) -> Iterator[Any]:
    """Yield the operators of an expression, each with at least one that it is applied to, down to x."""
    _require(depth <= MOST_DEPTH, f"there are more than {MOST_DEPTH} operators inside each other")
    inner = [part for part in data["arguments"] if isinstance(part, dict) and "operator" in part]
    # So the shape of what is computed is everywhere that of x, and not one that constants make up.
    _require(bool(inner) == (data["operator"] != "x"), "operators are applied to x")
    yield data
    for part in inner:
        yield from _operators(part, depth + 1)


def _expression(data: Any) -> Expression:
    operator = data["operator"]
    _require(operator == "x" or operator in FUNCTIONS, f"{operator!r:.50} is no function")
    arguments = tuple(_argument(part) for part in data["arguments"])
    options = tuple((name, _constant(value)) for name, value in data["options"].items())
    return Expression(operator, arguments, options)


def _argument(data: Any) -> Any:
    if isinstance(data, dict):
        return _expression(data) if "operator" in data else _reals(data)
    return _constant(data)


def _constant(data: Any) -> Any:
    _require(data is None or isinstance(data, bool | int | float | str), "constants are numbers or words")
    _require(not isinstance(data, int) or abs(data) < GREATEST, "constants are not that large")
    return data


def _check_constants(expression: Expression, shape: Shape) -> None:
    for array in expression.arrays():
        _check_broadcast(array, shape, "an array among constants")


def _check_broadcast(array: Array, shape: Shape, name: str) -> None:
    _require(np.broadcast_shapes(array.shape, shape) == shape, f"{name} goes with results of shape {shape}")


def _shape(data: Any) -> Shape:
    _require(isinstance(data, list) and len(data) <= MOST_AXES, f"a shape has at most {MOST_AXES} sizes")
    _require(all(type(n) is int and 0 < n <= MOST_VALUES for n in data), "sizes are above 0")
    _require(math.prod(data) <= MOST_VALUES, f"there are at most {MOST_VALUES:,} values")
    return tuple(data)


def _positions(data: Any, size: int) -> Array:
    positions = _integers(data)
    ends = np.concatenate([[-1], positions.ravel(), [size]])
    _require(bool((np.diff(ends) > 0).all()), f"positions ascend within {size:,} values")
    _require(positions.ndim == 1, "positions are numbers in a row")
    return positions


def _integers(data: Any) -> Array:
    values = data["values"]
    _require(all(type(v) is int and abs(v) < GREATEST for v in values), "values are integers")
    return _array(values, data["shape"], np.int64)


def _reals(data: Any) -> Array:
    values = data["values"]
    _require(all(type(v) in (int, float) for v in values), "values are numbers")
    return _array(values, data["shape"], np.float64)


def _array(values: Any, shape: Any, kind: type[np.number[Any]]) -> Array:
    _require(isinstance(values, list) and isinstance(shape, list), "values and their shape are lists")
    _require(len(shape) <= MOST_AXES and all(type(n) is int and n >= 0 for n in shape), "sizes are numbers")
    return frozen(np.array(values, kind).reshape(shape))


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
