"""What the owner of the keys has to know of a circuit: how images become its integers, and results numbers.

It holds no weight of the network's but the last layer's biases, and is plain data: `to_dict` is what
`client.zip` keeps of it.
"""

import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fheconv.arithmetic import OUTSIDE
from fheconv.arrays import Array, along_channels, as_array, frozen
from fheconv.errors import ArtifactError, InputRangeError, InvalidArgumentError
from fheconv.expression import FUNCTIONS, Expression
from fheconv.lanes import Lanes
from fheconv.network import Finish, Quantization
from fheconv.steps import Select, Shape

# Of what is read from a file: the greatest integer, and the most values of an image or a result.
GREATEST = 2**62
MOST_VALUES = 2**27


@dataclass(frozen=True, kw_only=True, eq=False)
class Interface:
    """Images (N, *`input_shape`) to what a circuit takes, and its results to real numbers.

    `inputs` (n,) are the flat positions of what is encrypted of an image, `outputs` (m,) those of the results
    in the last accumulators' planes (K·p, *Out), p of them a channel. Results count from `start` (K·p,), and
    accumulators (K, *Out) are Σ `factors` (p,) · plane + `bias`. They stand for the real numbers
    accumulator · `scale`, of which `finish` makes the model's outputs. `bias` and `scale` broadcast to
    `shape`, (K, *Out).
    """

    input: Quantization
    input_shape: Shape
    inputs: Array
    shape: Shape
    outputs: Array
    start: Array
    factors: Array
    bias: Array
    scale: Array
    finish: Finish | None
    lanes: Lanes = field(default_factory=lambda: Lanes.of(1, 1))

    @cached_property
    def output_shape(self) -> Shape:
        """The shape of the float results of one image, that of torch's."""
        return self.dequantize(np.zeros((1, *self.shape), np.int64)).shape[1:]

    def quantize_input(self, x: Any) -> tuple[Array, bool]:
        """Return the images as an int64 batch (N, *input_shape), and whether `x` was a batch.

        Raises `InputRangeError` for a wrong shape or a value that cannot be represented, naming it.
        """
        return integer_images(x, self.input, self.input_shape)

    def prepare(self, q: Array) -> Array:
        """Return what the circuit takes for integer images (N, C, *S): (⌈N / lanes⌉, n)."""
        read = q.reshape(len(q), math.prod(self.input_shape))[:, self.inputs]
        return self.lanes.pack(read, self.input.zero_point)

    def accumulators(self, results: Array, images: int) -> Array:
        """Return the accumulators (N, K, *Out), bias included, of the circuit's results for N images."""
        channels, *size = self.shape
        shape = (channels * len(self.factors), *size)
        y = np.zeros((images, math.prod(shape)), np.int64)
        y[:, self.outputs] = self.lanes.unpack(results, images)
        parts = y.reshape(images, *shape) + along_channels(self.start, len(shape))
        return recombined(parts, self.factors) + self.bias

    def dequantize(self, accumulators: Array) -> Array:
        """Return the model's outputs (float64) that accumulators (N, K, *Out) stand for."""
        return real_results(accumulators, self.scale, self.finish)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the lanes as plain data, ready for JSON; `from_dict` reads it."""
        finish = self.finish
        return {
            "input": asdict(self.input),
            "input_shape": list(self.input_shape),
            "inputs": _plain(self.inputs),
            "shape": list(self.shape),
            "outputs": _plain(self.outputs),
            "start": _plain(self.start),
            "factors": _plain(self.factors),
            "bias": _plain(self.bias),
            "scale": _plain(self.scale),
            "finish": finish
            and {
                "activation": _plain(finish.activation),
                "view": None if finish.view is None else _plain(finish.view.index),
                "last": _plain(finish.last),
            },
        }

    @classmethod
    def from_dict(cls, data: Any) -> "Interface":
        """Return the interface that `to_dict` made `data` of, with one lane.

        Raises `ArtifactError` for data that `to_dict` does not make, such as positions outside the image.
        """
        try:
            return _interface(data)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise ArtifactError(f"The circuit's interface is altered: {error!r:.200}.") from error


def integer_images(x: Any, quantization: Quantization, shape: Shape) -> tuple[Array, bool]:
    """Return images of such a shape as an int64 batch (N, *shape), and whether `x` was a batch.

    Raises `InputRangeError` for a wrong shape or a value that cannot be represented, naming it.
    """
    try:
        x = as_array(x, "The image")
    except InvalidArgumentError as error:
        raise InputRangeError(str(error)) from error
    batched = x.ndim == len(shape) + 1
    if x.shape[int(batched) :] != shape:
        raise InputRangeError(
            f"The images have shape {x.shape}; this network takes (n, {', '.join(map(str, shape))}), or one "
            "image without n. For another image size, quantize with calibration images of it."
        )
    q = quantization.integers(x)
    return (q if batched else q[None]), batched


def real_results(accumulators: Array, scale: Array, finish: Finish | None) -> Array:
    """Return the model's outputs (float64) that the last accumulators (N, K, *Out) stand for."""
    y = accumulators * scale
    return y if finish is None else finish(y)


def recombined(planes: Array, factors: Array) -> Array:
    """Return Σ factors[p] · plane p, (N, K, *S), of a batch's planes (N, K·p, *S)."""
    images, channels, *size = planes.shape
    count = len(factors)
    return np.tensordot(planes.reshape(images, channels // count, count, *size), factors, axes=(2, 0))


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


# Back from plain data that may come from anywhere. What is not as `_plain` makes it raises one of the errors
# that `from_dict` expects.


def _interface(data: Any) -> Interface:
    names = {"input", "input_shape", "inputs", "shape", "outputs"}
    names |= {"start", "factors", "bias", "scale", "finish"}
    _require(isinstance(data, dict) and set(data) == names, f"it must be an object of {sorted(names)}")
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
    )
    _require(factors.shape == (factors.size,) and 0 < planes <= MOST_VALUES, "factors are p numbers")
    _require(interface.start.shape == (shape[0] * factors.size,), "start is a number for each plane")
    for name in ("bias", "scale"):
        _check_broadcast(getattr(interface, name), shape, name)
    _require(bool(np.isfinite(interface.scale).all()), "scale is finite")
    _require(len(interface.output_shape) > 0, "a model's outputs have an axis")  # and they can be computed
    return interface


def _quantization(data: Any) -> Quantization:
    _require(type(data["integral"]) is bool, "integral is true or false")
    for name in ("zero_point", "minimum", "maximum"):
        _require(type(data[name]) is int and abs(data[name]) < 2**32, f"{name} is an integer")
    quantization = Quantization(**data)
    scale = data["scale"]
    _require(type(scale) in (int, float) and 0 < scale < math.inf, "the scale is above 0")
    _require(quantization.minimum <= quantization.maximum, "integers have a range")
    return quantization


def _finish(data: Any, shape: Shape) -> Finish:
    activation, view, last = _expression(data["activation"]), data["view"], data["last"]
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
        last = _expression(last)
        _check_constants(last, shape)
    return Finish(activation=activation, view=select, last=last)


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
    _require(isinstance(data, list) and all(type(n) is int and n > 0 for n in data), "sizes are above 0")
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
    return frozen(np.array(values, np.int64).reshape(data["shape"]))


def _reals(data: Any) -> Array:
    values = data["values"]
    _require(all(type(v) in (int, float) for v in values), "values are numbers")
    return frozen(np.array(values, np.float64).reshape(data["shape"]))


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
