"""Describes one call of an operator in a model's graph, and helps the handlers of operators."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from fheconv.arithmetic import OUTSIDE
from fheconv.basics.arrays import Array, Shape, along_channels, frozen
from fheconv.capture.graph import Affine, Graph, Pending, Unsupported, Value
from fheconv.networks.expression import Expression, X
from fheconv.networks.linear import Select

# The graph is made with a batch of two images, so that operators that mix images can be found.
BATCH = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """Holds what a handler needs besides the arguments of its operator.

    `read_once` says that only this call reads the encrypted arguments. `real` says that each of these, and
    the result, is one tensor of floats or complex numbers. `given` is the shape of the result where torch's
    is another.
    """

    graph: Graph
    node: Node
    name: str
    operation: str
    read_once: bool
    real: bool
    given: Shape | None = None

    @property
    def target(self) -> Callable[..., Any]:
        """The operator itself, a function of tensors."""
        target: Any = self.node.target
        return target

    @property
    def shape(self) -> Shape:
        """The shape of the (first) result without the batch axis. Raises `Unsupported` if it has none."""
        if self.given is not None:
            return self.given
        example = self.node.meta["val"]
        return image_shape((example if isinstance(example, torch.Tensor) else example[0]).shape)

    def axis(self, dim: int, shape: Shape) -> int:
        """Return torch's axis `dim` as one of `shape`. Raises `Unsupported` for the batch axis."""
        axis = dim % (len(shape) + 1)
        if axis == 0:
            raise Unsupported("it runs over the images of a batch")
        return axis - 1


def image_shape(shape: Sequence[int]) -> Shape:
    """Return the shape of one element of a batch. Raises `Unsupported` for no batch, or an empty shape."""
    if not len(shape) or shape[0] != BATCH:
        raise Unsupported("it mixes the images of a batch, or drops the batch axis")
    if 0 in shape:
        raise Unsupported(f"its result of shape {tuple(shape)} has no elements")
    return tuple(map(int, shape[1:]))


# Constants.


def plain(value: Any, what: str) -> torch.Tensor:
    """Return a tensor of the model. Raises `Unsupported` if it is an encrypted value."""
    if isinstance(value, Value):
        raise Unsupported(
            f"{what} would be encrypted values; the nearest that is supported: constant ones, or products of "
            "elements"
        )
    return value


def array(value: Any) -> Array:
    """Return a tensor or number as float64. Raises `Unsupported` if it is complex."""
    if isinstance(value, torch.Tensor) and not value.is_complex():
        return value.detach().cpu().double().numpy()
    if isinstance(value, bool | int | float):
        return np.asarray(value, np.float64)
    raise Unsupported(f"{value!r} is not a real number")


def constant(value: Any, axes: int) -> Array:
    """Return a constant operand without its batch axis, to broadcast to a tensor (C, *S) of `axes` axes.

    Raises `Unsupported` if it differs between images.
    """
    values = array(value)
    if values.ndim <= axes:
        return values
    if (values != values[:1]).any():
        raise Unsupported("its constants differ between the images of a batch")
    return values[0]


def per_channel(values: Array, shape: Shape) -> float | Array | None:
    """Return constants for a tensor of `shape` as a number or (C, *1); None if they vary in a channel."""
    if values.size == 1:
        return float(values.item())
    rows = np.broadcast_to(values, shape).reshape(shape[0], -1)
    if (rows != rows[:, :1]).any():
        return None
    return along_channels(rows[:, 0], len(shape))


# Operators that only move values.


def gathered(call: Call, parts: Sequence[Any], move: Callable[..., Any]) -> Any:
    """Apply `move` to parts, which are values or constants (C, *S).

    `move` gets batches of numbered places, one for each part, and shows where the places go. Returns a value,
    or a list of values if `move` returns several.

    Raises `Unsupported` if it mixes images.
    """
    numbered, start = [], 1  # place 0 means that the element is zero
    for part in parts:
        places = torch.arange(start, start + BATCH * math.prod(part.shape), dtype=torch.float64)
        numbered.append(places.reshape(BATCH, *part.shape))
        start += places.numel()
    results = move(*numbered)
    if not isinstance(results, torch.Tensor):
        return [_taken(call, parts, numbered, result) for result in results]
    return _taken(call, parts, numbered, results)


def _taken(call: Call, parts: Sequence[Any], numbered: Sequence[torch.Tensor], result: torch.Tensor) -> Value:
    """Return the value whose elements come from the numbered places of the parts."""
    image_shape(result.shape)
    first, second = result.numpy().astype(np.int64)
    total: Value | None = None
    for part, places in zip(parts, numbered, strict=True):
        start, size = int(places.flatten()[0]), math.prod(part.shape)
        here = (first >= start) & (first < start + BATCH * size)
        if (first[here] >= start + size).any() or (first + size)[here].tolist() != second[here].tolist():
            raise Unsupported("it mixes the images of a batch")
        step = Select(index=frozen(np.where(here, first - start, OUTSIDE)))
        if isinstance(part, np.ndarray):
            value: Value = Affine(call.name, (), step.apply(part[None], 0)[0])
        elif not here.any():
            continue
        else:
            value = call.graph.select(part, step, call.name)
        if total is None:
            total = value
        else:
            total = call.graph.add(call.graph.affine(total), call.graph.affine(value), call.name)
    return Affine(call.name, (), np.zeros(first.shape)) if total is None else total


def move(call: Call, value: Value, how: Callable[[torch.Tensor], Any]) -> Any:
    """Apply `how` to one value, as `gathered` does."""
    return gathered(call, (value,), how)


def broadcast(call: Call, value: Value, shape: Shape) -> Value:
    """Repeat a value to `shape`."""
    if value.shape == shape:
        return value
    return move(call, value, lambda t: t.broadcast_to((BATCH, *shape)))


# Multiplication and addition of constants, and other linear operators.


def with_constant(call: Call, operation: str, value: Value, values: Array, read_once: bool) -> Value:
    """Apply "add", "mul" or "div" with constants that broadcast to the value's shape.

    If the value is an activation that nothing else reads, its table includes them, which is exact and costs
    nothing.
    """
    operand = per_channel(values, value.shape)
    function = Expression(operation, (X, operand))
    if isinstance(value, Pending) and read_once and operand is not None and (
        value.view is None or np.ndim(operand) == 0
    ):  # fmt: skip
        return call.graph.apply(value, function, call.name)
    affine = call.graph.affine(value)
    full = np.broadcast_to(values, affine.shape)
    if operation == "add":
        made = replace(affine, bias=affine.bias + full)
    else:
        with np.errstate(divide="ignore", invalid="ignore"):  # `capture` refuses what is not finite
            made = call.graph.scale(affine, 1 / full if operation == "div" else full, call.name)
    return replace(made, origin=None if operand is None else (affine, function))
