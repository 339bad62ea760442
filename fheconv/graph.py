"""From the graph that `torch.export` makes of a model to a float network.

Each value of the graph is kept as what it is of the activations before it: an affine function of them, or a
function of one variable (an activation, or a chain of them) of an affine function. Linear operators only
change the affine function; a layer with its lookup is made when something linear reads an activation. So
biases, BatchNorm, poolings, residual sums and whatever moves values about cost nothing.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from fheconv.arithmetic import OUTSIDE, ConvGeometry
from fheconv.arithmetic.geometry import direct_form
from fheconv.arrays import Array, frozen
from fheconv.errors import UnsupportedLayerError
from fheconv.expression import ELEMENTWISE, Expression, X
from fheconv.network import Finish, Layer, Maximum, Network
from fheconv.steps import Kernel, Select, Shape, Step, Term, pointwise

# Layers in a row with no activation between them, whose product is no convolution, become one dense matrix of
# at most so many weights.
DENSE_LIMIT = 2**24
# The examples with which the graph is made: two, so that what mixes images shows.
BATCH = 2


@dataclass(eq=False)
class Affine:
    """Σ terms + bias (C, *S)."""

    name: str
    terms: tuple[Term, ...]
    bias: Array


@dataclass(eq=False)
class Pending:
    """A function of one variable of an affine value, of which `view` shows some elements."""

    name: str
    base: Affine
    function: Expression
    view: Select | None = None


@dataclass(eq=False)
class Pooled:
    """The maximum, along one axis after the other, over windows of a pending value."""

    name: str
    inner: Pending
    windows: tuple[Array, ...]


@dataclass(eq=False)
class Final:
    """What only the client can compute, in clear, of a pending value."""

    inner: Pending
    last: Expression


Value = Affine | Pending | Pooled | Final


class Unsupported(Exception):
    """Why an operator cannot be taken; the graph adds where it is."""


class Graph:
    """Walks an exported graph and collects the layers."""

    def __init__(self, input_shape: Shape) -> None:
        self.input_shape = input_shape
        self.layers: list[Layer | Maximum] = []
        self._made: dict[tuple[int, int], tuple[Pending | Pooled, int]] = {}

    @property
    def shapes(self) -> list[Shape]:
        """The shape of each tensor so far."""
        return [self.input_shape, *(layer.shape for layer in self.layers)]

    def source(self, number: int, name: str) -> Affine:
        """Return tensor `number` as an affine value."""
        return Affine(name, (Term(source=number),), np.zeros(self.shapes[number]))

    def affine(self, value: Value) -> Affine:
        """Return a value as an affine one, with a lookup where it is a function's."""
        if isinstance(value, Affine):
            return value
        if isinstance(value, Final):
            raise Unsupported("it can only be the last operation, which the client computes in clear")
        if isinstance(value, Pooled):
            inner = self.affine(value.inner)
            (term,) = inner.terms
            for number, index in enumerate(value.windows):
                select = term.steps[0] if term.steps else None
                if isinstance(select, Select):
                    index = select.index.ravel()[index]
                name = value.name if len(value.windows) == 1 else f"{value.name}.{number}"
                self.layers.append(Maximum(name=self._name(name), source=term.source, index=frozen(index)))
                term = Term(source=len(self.layers))
            return Affine(value.name, (term,), np.zeros(self.shapes[term.source]))
        key = (id(value.base), id(value.function))
        if key not in self._made:
            number = self._layer(value.base, value.function, value.name)
            self._made[key] = (value, number)  # the value too, so that no other gets its id
        made = self.source(self._made[key][1], value.name)
        return made if value.view is None else self.select(made, value.view, made.name)

    def pending(self, value: Value) -> Pending:
        """Return a value as a function of an affine value."""
        if isinstance(value, Pending):
            return value
        if isinstance(value, Affine):
            return Pending(value.name, value, X)
        made = self.affine(value)
        return Pending(made.name, made, X)

    def _layer(self, base: Affine, activation: Expression | None, name: str) -> int:
        terms = tuple(self._quantizable(term, name) for term in base.terms)
        name = self._weighed(base, name)
        layer = Layer(name=self._name(name), terms=terms, bias=frozen(base.bias), activation=activation)
        self.layers.append(layer)
        return len(self.layers)

    @staticmethod
    def _weighed(value: Affine, name: str) -> str:
        """Return the name of the layer that gave a value its weights, or `name` if none has."""
        return value.name if any(term.inexact() for term in value.terms) else name

    def _name(self, name: str) -> str:
        """Return the name, or with a number if it is taken."""
        taken = {layer.name for layer in self.layers}
        numbers = (f"{name}_{n}" for n in range(1, len(taken) + 2))
        return next(candidate for candidate in (name, *numbers) if candidate not in taken)

    def _quantizable(self, term: Term, name: str) -> Term:
        """Return a term with exactly one convolution whose weights are to be quantized."""
        shape = self.shapes[term.source]
        if len(term.inexact()) == 1:
            return term
        output = term.shapes(shape)[-1]
        if not term.inexact():
            ones = pointwise(np.ones((output[0], 1)), len(output) - 1, groups=output[0])
            return replace(term, steps=(*term.steps, ones))
        if math.prod(shape) * math.prod(output) > DENSE_LIMIT:
            raise Unsupported(
                f"several layers with weights in a row and no activation between them (up to {name!r}) would "
                f"have to become a dense matrix of {math.prod(shape):,} × {math.prod(output):,}, more than "
                f"{DENSE_LIMIT:,} weights; put an activation between them, or merge them before training"
            )
        return term.dense(shape)

    def network(self, value: Value) -> Network:
        """Return the network whose output is `value`."""
        last = None
        if isinstance(value, Final):
            value, last = value.inner, value.last
        pending = self.pending(value)
        self._layer(pending.base, None, pending.name)
        plain = pending.function is X and pending.view is None and last is None
        finish = None if plain else Finish(activation=pending.function, view=pending.view, last=last)
        return Network(input_shape=self.input_shape, layers=tuple(self.layers), finish=finish)

    # Operators on values.

    def linear(self, value: Affine, step: Step, name: str, factor: float = 1.0, bias: Any = None) -> Affine:
        """Apply a linear step, then multiply by `factor` and add `bias` (C,)."""
        terms = tuple(term.then(step, self.shapes[term.source], factor) for term in value.terms)
        constant = factor * step.apply(value.bias[None], 0)[0]
        if bias is not None:
            constant = constant + np.reshape(bias, (-1, *[1] * (constant.ndim - 1)))
        return Affine(self._weighed(value, name), terms, constant)

    def select(self, value: Value, step: Select, name: str) -> Value:
        """Move values about."""
        if isinstance(value, Affine):
            terms = tuple(term.then(step, self.shapes[term.source]) for term in value.terms)
            return Affine(self._weighed(value, name), terms, step.apply(value.bias[None], 0)[0])
        if isinstance(value, Pending) and (step.index != OUTSIDE).all():
            index = step.index if value.view is None else value.view.index.ravel()[step.index]
            return Pending(name, value.base, value.function, Select(index=frozen(index)))
        return self.select(self.affine(value), step, name)

    def add(self, a: Affine, b: Affine, name: str, sign: int = 1) -> Affine:
        """Return a + sign · b, of equal shapes."""
        terms = (replace(term, factor=sign * term.factor) for term in b.terms)
        name = self._weighed(a, self._weighed(b, name))
        return Affine(name, (*a.terms, *terms), a.bias + sign * b.bias)

    def scale(self, value: Affine, factors: Array, name: str) -> Affine:
        """Multiply by constants that broadcast to the value's shape."""
        shape = value.bias.shape
        full = np.broadcast_to(factors, shape)
        first = full.reshape(shape[0], -1)[:, :1]
        bias = value.bias * full
        if (full.reshape(shape[0], -1) == first).all():
            terms = tuple(term.scaled(first[:, 0], len(shape) - 1) for term in value.terms)
            return Affine(self._weighed(value, name), terms, bias)
        size = math.prod(shape)
        flatten = Select(index=frozen(np.arange(size)))
        each = pointwise(full.reshape(-1, 1), 0, groups=size)
        back = Select(index=frozen(np.arange(size).reshape(shape)))
        for step in (flatten, each, back):
            value = self.linear(value, step, name)
        return replace(value, bias=bias)

    def apply(self, value: Value, function: Expression, name: str) -> Value:
        """Apply a function of one variable."""
        if isinstance(value, Pooled) and function.operator in _MONOTONE:
            # The maximum of the function is the function of the maximum, and is taken of fewer bits.
            inner = value.inner
            return replace(value, inner=replace(inner, function=function.of(inner.function)))
        pending = self.pending(value)
        if pending.view is not None and _has_arrays(function):
            pending = self.pending(self.affine(pending))
        return replace(pending, name=name, function=function.of(pending.function))


_MONOTONE = {
    "celu", "clamp", "elu", "hardsigmoid", "hardtanh", "leaky_relu", "log_sigmoid", "relu", "relu6", "selu",
    "sigmoid", "sign", "softplus", "softsign", "tanh",
}  # fmt: skip


def _has_arrays(function: Expression) -> bool:
    return any(
        _has_arrays(part) if isinstance(part, Expression) else np.ndim(part) > 0
        for part in function.arguments
    )


def network_of(program: Any, input_shape: Shape) -> Network:
    """Return the float network of a `torch.export.ExportedProgram` for a batch of `BATCH` images.

    Raises `UnsupportedLayerError` naming the layer and the operator that cannot be taken.
    """
    graph = Graph(input_shape)
    constants = _constants(program)
    values: dict[Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in constants:
                values[node] = constants[node.name]
            elif any(isinstance(value, Affine) for value in values.values()):
                raise UnsupportedLayerError(
                    "The model takes more than one input; a circuit takes one batch of images."
                )
            else:
                values[node] = graph.source(0, node.name)
        elif node.op == "output":
            outputs = node.args[0]
            if len(outputs) != 1 or not isinstance(values.get(outputs[0]), Value):
                raise UnsupportedLayerError(
                    f"The model returns {len(outputs)} values; a circuit has one result. Wrap the model so "
                    "that it returns the tensor you need, concatenated if there are several."
                )
            try:
                return graph.network(values[outputs[0]])
            except Unsupported as error:
                raise UnsupportedLayerError(f"The model's output: {error}.") from error
        else:
            values[node] = _call(graph, node, values)
    raise UnsupportedLayerError("The model returns nothing.")


def _constants(program: Any) -> dict[str, torch.Tensor]:
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    found = {name: program.state_dict.get(target) for name, target in named.items()}
    found.update(
        {
            name: program.constants[name_of]
            for name, name_of in signature.inputs_to_lifted_tensor_constants.items()
        }
    )
    missing = {name: program.constants[named[name]] for name, value in found.items() if value is None}
    return {**found, **missing}


def _call(graph: Graph, node: Node, values: dict[Node, Any]) -> Any:
    """Return the value of an operator's node."""
    name, kind = _where(node)
    if node.target is operator.getitem:
        return values[node.args[0]] if node.args[1] == 0 else None
    operation = node.target.__name__.split(".")[0].removesuffix("_").strip("_")  # type: ignore[union-attr]
    arguments = torch.fx.map_arg(node.args, lambda n: values[n])
    options = torch.fx.map_arg(dict(node.kwargs), lambda n: values[n])
    encrypted = [v for v in _flat((arguments, options)) if isinstance(v, Value)]
    if not encrypted:
        if any(v is None for v in _flat(arguments)) and operation == "":
            return None
        return node.target(*arguments, **options)  # type: ignore[operator]
    try:
        handler = _HANDLERS.get(operation)
        if handler is None:
            raise Unsupported(_nearest(operation))
        shape = _shape(node)
        return handler(Call(graph, node, name, operation, shape), *arguments, **options)
    except Unsupported as error:
        raise UnsupportedLayerError(
            f"Layer {name!r}{f' ({kind})' if kind else ''}, operator {operation!r}, cannot be compiled: {error}."
        ) from error


def _where(node: Node) -> tuple[str, str]:
    """Return the name and the kind of the module in the user's model that a node belongs to."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack or not stack[-1][0]:
        return node.name, ""
    return stack[-1][0], str(stack[-1][1]).rpartition(".")[2].rstrip("'>")


def _flat(arguments: Any) -> list[Any]:
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
    if isinstance(arguments, list | tuple):
        return [leaf for part in arguments for leaf in _flat(part)]
    return [arguments]


def _shape(node: Node) -> Shape:
    """Return the shape of a node's (first) result without the batch axis."""
    value = node.meta["val"]
    value = value[0] if isinstance(value, tuple | list) else value
    if not value.ndim or value.shape[0] != BATCH:
        raise Unsupported("it mixes the images of a batch, or drops the batch axis")
    return tuple(map(int, value.shape[1:]))


@dataclass(eq=False)
class Call:
    """One call in the graph: what the handlers of operators need besides its arguments."""

    graph: Graph
    node: Node
    name: str
    operation: str
    shape: Shape


def _array(value: Any) -> Array:
    return (
        value.detach().cpu().double().numpy() if isinstance(value, torch.Tensor) else np.asarray(value, float)
    )


def _constant(value: Any, axes: int) -> Array:
    """Return a constant operand without its batch axis, to broadcast to a tensor (C, *S) of so many axes."""
    array = _array(value)
    if array.ndim == axes + 1:
        if len(array) != 1:
            raise Unsupported(
                "it adds or multiplies with constants that differ between the images of a batch"
            )
        array = array[0]
    return array


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
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    return _conv(call, x, weight, bias, groups, transposed=True, output_padding=output_padding, **options)


def _conv(
    call: Call, x: Value, weight: Any, bias: Any, groups: int, *, transposed: bool = False,
    output_padding: Any = 0, **options: Any,
) -> Value:  # fmt: skip
    kernel = _array(_plain(weight, "weights"))
    axes = kernel.ndim - 2
    # torch writes one number for all axes as a list of one.
    options = {
        key: list(value) * axes if isinstance(value, list | tuple) and len(value) == 1 else value
        for key, value in {**options, "output_padding": output_padding}.items()
    }
    kernel, geometry = direct_form(
        kernel, transposed=transposed, padding_mode="zeros", groups=groups, **options
    )
    step = Kernel(weight=frozen(kernel), geometry=geometry)
    return call.graph.linear(
        call.graph.affine(x), step, call.name, bias=None if bias is None else _array(bias)
    )


def _linear(call: Call, x: Value, weight: Any, bias: Any = None) -> Value:
    value = call.graph.affine(x)
    kernel = _array(_plain(weight, "weights"))
    spatial = value.bias.ndim - 1
    # torch's features are the last axis, ours the first.
    value = _moved(call, value, lambda t: t.movedim(-1, 1))
    value = call.graph.linear(
        value, pointwise(kernel, spatial), call.name, bias=None if bias is None else _array(bias)
    )
    return _moved(call, value, lambda t: t.movedim(1, -1))


def _matmul(call: Call, x: Value, y: Any) -> Value:
    if isinstance(x, Value) and isinstance(y, torch.Tensor) and y.ndim == 2:
        return _linear(call, x, y.t())
    raise Unsupported("only products with a constant matrix on the right are linear; write it as a Linear")


def _addmm(call: Call, bias: Any, x: Value, y: Any, *, beta: float = 1, alpha: float = 1) -> Value:
    return _linear(call, x, alpha * _plain(y, "weights").t(), beta * _plain(bias, "the bias"))


def _plain(value: Any, what: str) -> torch.Tensor:
    if isinstance(value, Value):
        raise Unsupported(f"{what} would be encrypted values, and two encrypted values cannot be multiplied")
    return value


def _batch_norm(
    call: Call, x: Value, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float,
    eps: float, *_: Any,
) -> Value:  # fmt: skip
    if training or mean is None:
        raise Unsupported("it normalizes by the batch at hand; call model.eval(), with running statistics")
    gain = 1 / np.sqrt(_array(variance) + eps)
    gain = gain if weight is None else gain * _array(weight)
    shift = -_array(mean) * gain
    shift = shift if bias is None else shift + _array(bias)
    across = (-1, *[1] * (len(call.shape) - 1))
    scaled = _binary_constant(call, "mul", x, gain.reshape(across))
    return _binary_constant(call, "add", scaled, shift.reshape(across))


# What moves values about.


def _moved(call: Call, value: Value, move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply to a value whatever `move` does to the places of a batch of tensors."""
    shape = _shape_of(value)
    size = math.prod(shape)
    places = torch.arange(1, BATCH * size + 1, dtype=torch.float64).reshape(BATCH, *shape)
    moved = move(places).numpy().astype(np.int64)  # 0: from nowhere, a zero
    first, second = moved[0], moved[1]
    if (np.where(first == 0, 0, first + size) != second).any() or (first > size).any():
        raise Unsupported("it mixes the images of a batch")
    return call.graph.select(value, Select(index=frozen(first - 1)), call.name)


def _shape_of(value: Value) -> Shape:
    if isinstance(value, Affine):
        return value.bias.shape
    if isinstance(value, Pending):
        return value.base.bias.shape if value.view is None else value.view.index.shape
    return value.windows[-1].shape[1:] if isinstance(value, Pooled) else ()


def _move(call: Call, x: Value, *arguments: Any, **options: Any) -> Value:
    target: Any = call.node.target
    return _moved(call, x, lambda places: target(places, *arguments, **options))


def _pad(call: Call, x: Value, pads: Any, mode: str = "constant", value: float | None = None) -> Value:
    if mode == "constant" and value:
        padded = call.graph.affine(_moved(call, x, lambda t: torch.nn.functional.pad(t, pads)))
        inside = np.zeros(_shape_of(x))
        border = torch.nn.functional.pad(torch.tensor(inside)[None], pads, value=value)[0].numpy()
        return Affine(call.name, padded.terms, padded.bias + border)
    return _moved(call, x, lambda t: torch.nn.functional.pad(t, pads, mode))


def _cat(call: Call, parts: Any, dim: int = 0) -> Value:
    if dim % (len(call.shape) + 1) == 0:
        raise Unsupported("it concatenates along the batch axis")
    axis, start, total = dim % (len(call.shape) + 1), 0, None
    for part in parts:
        if not isinstance(part, Value):
            block: Any = _constant(part, len(call.shape))
            affine = Affine(call.name, (), np.array(block))
        else:
            affine = call.graph.affine(part)
        shape = _shape_of(affine)
        places = np.full(call.shape, OUTSIDE)
        where = [slice(None)] * len(call.shape)
        where[axis - 1] = slice(start, start + shape[axis - 1])
        places[tuple(where)] = np.arange(math.prod(shape)).reshape(shape)
        placed = call.graph.select(affine, Select(index=frozen(places)), call.name)
        total = placed if total is None else call.graph.add(total, placed, call.name)
        start += shape[axis - 1]
    return total


# Averages and maxima.


def _avg_pool(
    call: Call, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Value:  # fmt: skip
    value = call.graph.affine(x)
    axes = value.bias.ndim - 1
    size, step, pads = (_per_axis(v, axes) for v in (kernel, stride or kernel, padding))
    whole = not ceil_mode and (count_include_pad or not any(pads))
    if not whole and divisor_override is None:
        return _spatial(call, value)
    geometry = ConvGeometry.of(size, stride=step, padding=list(pads))
    if geometry.output_size(value.bias.shape[1:]) != call.shape[1:]:
        return _spatial(call, value)
    return _average(call, value, size, step, pads, divisor_override or math.prod(size))


def _average(call: Call, value: Affine, size: Any, step: Any, pads: Any, divisor: float) -> Affine:
    channels = len(value.bias)
    geometry = ConvGeometry.of(size, stride=step, padding=list(pads), groups=channels)
    ones = Kernel(weight=frozen(np.ones((channels, 1, *size), np.int64)), geometry=geometry, exact=True)
    return call.graph.linear(value, ones, call.name, factor=1 / divisor)


def _adaptive_avg_pool(call: Call, x: Value, output: Any) -> Value:
    value = call.graph.affine(x)
    spatial = value.bias.shape[1:]
    if any(size % out for size, out in zip(spatial, call.shape[1:], strict=True)):
        return _spatial(call, value)
    size = tuple(s // out for s, out in zip(spatial, call.shape[1:], strict=True))
    return _average(call, value, size, size, (0,) * len(size), math.prod(size))


def _mean(call: Call, x: Value, dims: Any = None, keepdim: bool = False, **_: Any) -> Value:
    value = call.graph.affine(x)
    shape = _shape_of(value)
    dims = range(1, len(shape) + 1) if dims is None else [d % (len(shape) + 1) for d in np.atleast_1d(dims)]
    if 0 in dims:
        raise Unsupported("it averages over the images of a batch")
    kept = [d for d in range(1, len(shape) + 1) if d not in dims]
    count = math.prod(shape[d - 1] for d in dims)
    value = _moved(call, value, lambda t: t.permute(0, *kept, *dims).reshape(BATCH, -1, count))
    value = _average(call, value, (count,), (1,), (0,), count if call.operation == "mean" else 1)
    return _moved(call, value, lambda t: t.reshape(BATCH, *call.shape))


def _spatial(call: Call, value: Affine) -> Affine:
    """Apply an operator that does the same linear thing to each channel, whatever it is."""
    spatial = value.bias.shape[1:]
    size, channels = math.prod(spatial), len(value.bias)
    target: Any = call.node.target
    arguments = [a for a in call.node.args[1:]]
    basis = torch.eye(size, dtype=torch.float64).reshape(size, 1, *spatial)
    matrix = target(basis, *arguments, **call.node.kwargs).reshape(size, -1).numpy().T
    value = _moved(call, value, lambda t: t.reshape(BATCH, channels, size).transpose(1, 2))
    value = call.graph.linear(value, pointwise(matrix, 1), call.name)
    return _moved(call, value, lambda t: t.transpose(1, 2).reshape(BATCH, *call.shape))


def _max_pool(
    call: Call, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> Value:  # fmt: skip
    spatial, output = _shape_of(x)[1:], call.shape[1:]
    axes = len(spatial)
    options = (_per_axis(v, axes) for v in (kernel, stride or kernel, padding, dilation))
    windows = []
    for size, out, (k, s, p, d) in zip(spatial, output, zip(*options, strict=True), strict=True):
        starts = range(-p, -p + out * s, s)
        windows.append([[at for at in range(b, b + k * d, d) if 0 <= at < size] for b in starts])
    return _maximum_over(call, x, windows)


def _adaptive_max_pool(call: Call, x: Value, output: Any) -> Value:
    sizes = zip(_shape_of(x)[1:], call.shape[1:], strict=True)
    return _maximum_over(
        call, x, [[list(range(o * s // n, -(-(o + 1) * s // n))) for o in range(n)] for s, n in sizes]
    )


def _amax(call: Call, x: Value, dims: Any = (), keepdim: bool = False) -> Value:
    shape = _shape_of(x)
    chosen = [d % (len(shape) + 1) for d in np.atleast_1d(dims)] or list(range(1, len(shape) + 1))
    if 0 in chosen or 1 in chosen:
        raise Unsupported("maxima are taken over spatial axes only")
    windows = [
        [list(range(size))] if 1 + axis in chosen else [[at] for at in range(size)]
        for axis, size in enumerate(shape)
    ][1:]
    pooled = _maximum_over(call, x, windows)
    return pooled if keepdim else _moved(call, pooled, lambda t: t.reshape(BATCH, *call.shape))


def _maximum_over(call: Call, x: Value, windows: list[list[list[int]]]) -> Pooled:
    """Take maxima axis by axis; a window gives the places it reads along its axis."""
    if isinstance(x, Pooled):
        x = call.graph.affine(x)
    shape = _shape_of(x)
    indices = []
    for axis in reversed(range(len(windows))):
        width = max(map(len, windows[axis]))
        if width == 1 and [w[0] for w in windows[axis]] == list(range(shape[1 + axis])):
            continue
        # Where a window reads less, it reads the last again: that changes no maximum.
        table = np.array([w + [w[-1]] * (width - len(w)) for w in windows[axis]]).T
        places = np.arange(math.prod(shape)).reshape(shape)
        index = np.moveaxis(np.take(places, table, axis=1 + axis), 1 + axis, 0)
        shape = index.shape[1:]
        indices.append(frozen(index))
    if not indices:
        indices.append(frozen(np.arange(math.prod(shape)).reshape(1, *shape)))
    return Pooled(call.name, call.graph.pending(x), tuple(indices))


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * axes if len(values) == 1 else values


# Functions of one variable, and sums.


def _function(call: Call, x: Any, *arguments: Any, **options: Any) -> Value:
    parts = (x, *arguments)
    if sum(isinstance(part, Value) for part in parts) > 1:
        return _of_two(call, parts, options)
    constants = [part if isinstance(part, str | None) else part for part in parts]
    expression_parts = []
    value = None
    for part in constants:
        if isinstance(part, Value):
            value = part
            expression_parts.append(X)
        elif isinstance(part, torch.Tensor):
            expression_parts.append(_operand(call, part))
        else:
            expression_parts.append(part)
    function = Expression(call.operation, tuple(expression_parts), tuple(sorted(options.items())))
    return call.graph.apply(value, function, call.name)


def _operand(call: Call, part: torch.Tensor) -> Any:
    array = _constant(part, len(call.shape))
    if call.operation == "prelu" and array.ndim == 1:
        array = array.reshape(-1, *[1] * (len(call.shape) - 1))
    return array.item() if array.size == 1 else array


def _of_two(call: Call, parts: Any, options: Any) -> Value:
    """Apply an operator to two values that are functions of one and the same."""
    pending = [call.graph.pending(part) if isinstance(part, Value) else part for part in parts]
    values = [part for part in pending if isinstance(part, Pending)]
    first = values[0]
    alike = all(v.base is first.base and _same_view(v.view, first.view) for v in values)
    if not alike:
        raise Unsupported(
            "two encrypted values cannot be multiplied or compared, unless both are functions of the same one "
            "value; sums, differences, and maxima of two are possible"
        )
    arguments = tuple(
        part.function if isinstance(part, Pending) else _operand(call, part)
        if isinstance(part, torch.Tensor) else part for part in pending
    )  # fmt: skip
    function = Expression(call.operation, arguments, tuple(sorted(options.items())))
    return replace(first, name=call.name, function=function)


def _same_view(a: Select | None, b: Select | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.index.shape == b.index.shape and bool((a.index == b.index).all())


def _sum(call: Call, x: Any, y: Any, *, alpha: float = 1, **_: Any) -> Value:
    """Add or subtract, where `alpha` is what the second is multiplied by."""
    if call.operation == "rsub":
        x, y = y, x
        if alpha != 1:
            raise Unsupported("rsub with alpha; write it as a difference")
    sign = (1 if call.operation == "add" else -1) * alpha
    if not (isinstance(x, Value) and isinstance(y, Value)):
        if isinstance(y, Value):  # constant ± value
            negative = y if sign == 1 else _binary_constant(call, "mul", y, np.asarray(float(sign)))
            return _binary_constant(call, "add", negative, _constant(x, len(call.shape)))
        return _binary_constant(call, "add", x, sign * _constant(y, len(call.shape)))
    if _functions_of_one(x, y):
        return _of_two(call, (x, y), {"alpha": alpha} if alpha != 1 else {})
    a, b = (call.graph.affine(_broadcast(call, value)) for value in (x, y))
    return call.graph.add(a, b, call.name, sign)


def _functions_of_one(x: Value, y: Value) -> bool:
    """Whether the two are functions of one value, and not both the value itself."""
    bases = [(v.base, v.view) if isinstance(v, Pending) else (v, None) for v in (x, y)]
    functions = any(isinstance(v, Pending) for v in (x, y))
    return functions and bases[0][0] is bases[1][0] and _same_view(bases[0][1], bases[1][1])  # type: ignore[arg-type]


def _broadcast(call: Call, value: Value) -> Value:
    if _shape_of(value) == call.shape:
        return value
    return _moved(call, value, lambda t: t.broadcast_to((BATCH, *call.shape)))


def _product(call: Call, x: Any, y: Any, **options: Any) -> Value:
    if isinstance(x, Value) and isinstance(y, Value):
        return _of_two(call, (_broadcast(call, x), _broadcast(call, y)), options)
    if isinstance(y, Value):
        if call.operation == "div":
            return _function(call, x, y, **options)
        x, y = y, x
    if options.get("rounding_mode"):
        return _function(call, x, y, **options)
    factor = _constant(y, len(call.shape))
    return _binary_constant(call, "mul", x, 1 / factor if call.operation == "div" else factor)


def _binary_constant(call: Call, operation: str, value: Value, constant: Array) -> Value:
    """Add or multiply with constants that broadcast to the value's shape."""
    if _shape_of(value) != call.shape:
        value = _broadcast(call, value)
    users = len(call.node.args[0].users) if isinstance(call.node.args[0], Node) else 1  # type: ignore[union-attr]
    if isinstance(value, Pending) and users == 1 and (value.view is None or constant.size == 1):
        # Into the table of the activation, where only this reads it: exact, and free.
        operand = constant.item() if constant.size == 1 else constant
        return replace(value, name=call.name, function=Expression(operation, (value.function, operand)))
    affine = call.graph.affine(value)
    if operation == "mul":
        return call.graph.scale(affine, constant, call.name)
    return replace(affine, bias=affine.bias + np.broadcast_to(constant, affine.bias.shape))


def _extreme(call: Call, x: Any, y: Any) -> Value:
    """Return the maximum or minimum of two: max(a, b) = b + relu(a − b)."""
    if not (isinstance(x, Value) and isinstance(y, Value)) or _functions_of_one(x, y):
        return _function(call, x, y)
    a, b = (call.graph.affine(_broadcast(call, value)) for value in (x, y))
    if call.operation == "minimum":  # min(a, b) = a − relu(a − b)
        difference = Pending(call.name, call.graph.add(a, b, call.name, -1), Expression("relu", (X,)))
        return call.graph.add(a, call.graph.affine(difference), call.name, -1)
    difference = Pending(call.name, call.graph.add(a, b, call.name, -1), Expression("relu", (X,)))
    return call.graph.add(b, call.graph.affine(difference), call.name)


def _negative(call: Call, x: Value) -> Value:
    return _binary_constant(call, "mul", x, np.asarray(-1.0))


def _same(call: Call, x: Value, *_: Any, **__: Any) -> Value:
    return x


def _dropout(call: Call, x: Value, p: float = 0.5, train: bool = False) -> Value:
    if train:
        raise Unsupported("it drops at random; call model.eval()")
    return x


def _final(call: Call, x: Value, dim: int, *_: Any) -> Value:
    pending = call.graph.pending(x)
    axis = dim % (len(call.shape) + 1)
    if axis == 0:
        raise Unsupported("it runs over the images of a batch")
    return Final(pending, Expression(call.operation, (X,), (("axis", axis),)))


def _argmax(call: Call, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    if dim is None:
        raise Unsupported("without dim it runs over the images of a batch; give dim")
    axis = dim % (len(_shape_of(x)) + 1)
    if axis == 0:
        raise Unsupported("it runs over the images of a batch")
    return Final(call.graph.pending(x), Expression("argmax", (X,), (("axis", axis), ("keepdims", keepdim))))


_MOVES = (
    "channel_shuffle", "chunk", "expand", "flatten", "flip", "narrow", "permute", "pixel_shuffle",
    "pixel_unshuffle", "repeat", "reshape", "roll", "select", "slice", "squeeze", "t", "transpose",
    "unflatten", "unsqueeze", "view", "movedim", "index_select", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "repeat_interleave", "unsafe_view", "swapaxes", "expand_as", "view_as",
)  # fmt: skip
_HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(ELEMENTWISE, _function),
    **dict.fromkeys(_MOVES, _move),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv_transpose),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _avg_pool),
    **dict.fromkeys(
        ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), _adaptive_avg_pool
    ),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), _max_pool),
    **dict.fromkeys(
        ("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"), _adaptive_max_pool
    ),
    **dict.fromkeys(("add", "sub", "rsub"), _sum),
    **dict.fromkeys(("mul", "div"), _product),
    **dict.fromkeys(("maximum", "minimum"), _extreme),
    **dict.fromkeys(("mean", "sum"), _mean),
    **dict.fromkeys(
        (
            "alias",
            "clone",
            "contiguous",
            "detach",
            "to",
            "lift_fresh_copy",
            "type_as",
            "_to_copy",
            "identity",
        ),
        _same,
    ),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), _dropout),
    **dict.fromkeys(("softmax", "log_softmax"), _final),
    "addmm": _addmm,
    "amax": _amax,
    "argmax": _argmax,
    "batch_norm": _batch_norm,
    "cat": _cat,
    "constant_pad_nd": lambda call, x, pads, value=0: _pad(call, x, pads, "constant", value),
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "neg": _negative,
    "pad": _pad,
}
_NEAREST = {
    "layer_norm": "BatchNorm, whose statistics are constants",
    "group_norm": "BatchNorm, whose statistics are constants",
    "instance_norm": "BatchNorm, whose statistics are constants",
    "bmm": "Linear or convolution with constant weights",
    "scaled_dot_product_attention": "convolution with constant weights",
    "lstm": "convolution (Conv1d) over the sequence",
    "gru": "convolution (Conv1d) over the sequence",
    "embedding": "one-hot images and a Linear layer",
    "upsample_bilinear2d": "nearest upsampling, or ConvTranspose2d with the bilinear weights",
    "grid_sampler": "convolution with constant weights",
    "norm": "a sum of abs or squares",
    "topk": "the plain logits; sort them after decryption",
    "sort": "the plain logits; sort them after decryption",
}


def _nearest(operation: str) -> str:
    import difflib

    close = _NEAREST.get(operation) or ", ".join(difflib.get_close_matches(operation, _HANDLERS, 3, 0.5))
    return "it is neither linear nor a function of one variable that is known here" + (
        f"; the nearest that is supported: {close}" if close else ""
    )
