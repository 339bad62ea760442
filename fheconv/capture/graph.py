"""Represents the values of a model's graph, and makes layers of them.

Each value is kept as a function of the activations before it. It is an affine function of them, or a function
of one variable (an activation, or a chain of activations) of an affine function. Linear operators only change
the affine function. A layer with its lookup is made when a linear operator reads an activation. Therefore
biases, BatchNorm, average poolings, residual sums and moved values need no lookup.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fheconv.arithmetic import OUTSIDE
from fheconv.basics.arrays import Array, Shape, frozen
from fheconv.capture.merging import MOST_PRODUCTS, before, cheapest_cut, merged, summed
from fheconv.networks.expression import Expression, X
from fheconv.networks.floats import Finish, Layer, Maximum, Network
from fheconv.networks.linear import Select, Step, Term, pointwise

# Functions that never decrease, with any constants; and functions that need constants that are not negative.
_INCREASING = {
    "atan", "ceil", "clamp", "clamp_max", "clamp_min", "erf", "exp", "expm1",
    "dequantize_per_tensor", "fake_quantize_per_tensor_affine", "floor", "hardsigmoid",
    "hardtanh", "log_sigmoid", "quantize_per_tensor", "relu", "relu6", "round", "selu", "sigmoid", "sign",
    "softsign", "tanh",
    "trunc",
}  # fmt: skip
_INCREASING_IF_POSITIVE = {"celu", "elu", "leaky_relu", "prelu"}


@dataclass(eq=False)
class Affine:
    """Represents the value Σ terms + bias (C, *S).

    `origin` holds another affine value and the function of one variable that turns it into this value, or
    None.
    """

    name: str
    terms: tuple[Term, ...]
    bias: Array
    origin: "tuple[Affine, Expression] | None" = None

    @property
    def shape(self) -> Shape:
        """The shape (C, *S)."""
        return self.bias.shape


@dataclass(eq=False)
class Pending:
    """Represents a function of an affine value; `view` selects some elements, none `OUTSIDE`."""

    name: str
    base: Affine
    function: Expression
    view: Select | None = None

    @property
    def shape(self) -> Shape:
        """The shape (C, *S)."""
        return self.base.shape if self.view is None else self.view.index.shape

    def readings(self) -> Iterator[tuple[Affine, Expression]]:
        """Yield each affine value that this value, without its view, is a function of, and the function."""
        base, function = self.base, self.function
        yield base, function
        while base.origin is not None:
            base, inner = base.origin
            function = function.of(inner)
            yield base, function


@dataclass(eq=False)
class Pooled:
    """Represents maxima of a pending value, over sets of windows (n, C, *S) of flat positions, in order."""

    name: str
    inner: Pending
    windows: tuple[Array, ...]

    @property
    def shape(self) -> Shape:
        """The shape (C, *S)."""
        return self.windows[-1].shape[1:]


@dataclass(eq=False)
class Final:
    """Represents the function `last` of a pending value, which only the client can compute, in clear."""

    inner: Pending
    last: Expression


Value = Affine | Pending | Pooled


class Unsupported(Exception):
    """Says why an operator is not supported. The caller adds the place in the model."""


class Graph:
    """Collects the layers that values turn into when they are read."""

    def __init__(self, input_shape: Shape) -> None:
        self.input_shape = input_shape
        self.layers: list[Layer | Maximum] = []
        # The keys are ids of values, and of (base, function). Keeping the objects keeps their ids unique.
        self._read: dict[int, tuple[Value, Affine]] = {}
        self._looked_up: dict[tuple[int, int], tuple[Pending, Affine]] = {}
        # By source and steps: where terms are cut, and the tensor that the rest reads.
        self._cuts: dict[tuple[int, ...], tuple[Term, int]] = {}

    def source(self, number: int, name: str) -> Affine:
        """Return tensor `number` as an affine value."""
        return Affine(name, (Term(source=number),), np.zeros(self._shape(number)))

    def _shape(self, number: int) -> Shape:
        return self.layers[number - 1].shape if number else self.input_shape

    def affine(self, value: Value) -> Affine:
        """Return a value as an affine one; a function of a value becomes a layer with its lookup."""
        if isinstance(value, Affine):
            return value
        if id(value) not in self._read:
            made = self._maximum(value) if isinstance(value, Pooled) else self._function(value)
            self._read[id(value)] = (value, made)
        return self._read[id(value)][1]

    def pending(self, value: Value) -> Pending:
        """Return a value as a function of an affine value."""
        if isinstance(value, Pending):
            return value
        made = self.affine(value)
        return Pending(made.name, made, X)

    def common(self, values: Sequence[Value]) -> tuple[Pending, list[Expression]] | None:
        """Return a value and the functions that turn it into the given values, or None if there is none."""
        first, *rest = (self.pending(value) for value in values)
        if not all(_same_view(first.view, other.view) for other in rest):
            return None
        readings = [{id(base): function for base, function in other.readings()} for other in rest]
        for base, function in first.readings():
            if all(id(base) in others for others in readings):
                functions = [function, *(others[id(base)] for others in readings)]
                if first.view is not None and any(f.arrays() for f in functions):
                    return None  # a number for each channel of the base, not of the view
                return Pending(first.name, base, X, first.view), functions
        return None

    def network(self, value: Value | Final) -> Network:
        """Return the network whose output is `value`."""
        last = value.last if isinstance(value, Final) else None
        pending = self.pending(value.inner if isinstance(value, Final) else value)
        base, view = _with_an_axis(pending)
        self._layer(base, None, pending.name)
        plain = pending.function is X and view is None and last is None
        finish = None if plain else Finish(activation=pending.function, view=view, last=last)
        return Network(input_shape=self.input_shape, layers=_read(self.layers), finish=finish)

    # These methods turn values into layers.

    def _function(self, value: Pending) -> Affine:
        key = (id(value.base), id(value.function))
        base, view = _with_an_axis(value)
        if key not in self._looked_up:
            plain = value.function is X and _is_tensor(base)
            made = base if plain else self.source(self._layer(base, value.function, value.name), value.name)
            self._looked_up[key] = (value, made)
        made = self._looked_up[key][1]
        return made if view is None else self.linear(made, view, made.name)

    def _maximum(self, value: Pooled) -> Affine:
        (term,) = self.affine(value.inner).terms
        for number, index in enumerate(value.windows):
            for step in reversed(term.steps):
                index = step.index.ravel()[index] if isinstance(step, Select) else index
            name = value.name if len(value.windows) == 1 else f"{value.name}.{number}"
            self.layers.append(Maximum(name=self._name(name), source=term.source, index=frozen(index)))
            term = Term(source=len(self.layers))
        return self.source(term.source, value.name)

    def _layer(self, base: Affine, activation: Expression | None, name: str, first: int | None = None) -> int:
        """Make a layer, of whose terms the `first` may be a factor, and return the number of its tensor."""
        terms, bias = self._quantizable(base.terms, name), frozen(base.bias)
        name = self._name(weighed(base, name))
        layer = Layer(name=name, terms=terms, bias=bias, activation=activation, factor_terms=first)
        self.layers.append(layer)
        return len(self.layers)

    def _name(self, name: str) -> str:
        """Return the name, with a number added if another layer has it."""
        taken = {layer.name for layer in self.layers}
        numbers = (f"{name}_{n}" for n in range(1, len(taken) + 2))
        return next(candidate for candidate in (name, *numbers) if candidate not in taken)

    def _quantizable(self, terms: Sequence[Term], name: str) -> tuple[Term, ...]:
        """Return terms that add up to the same, with exactly one convolution whose weights are quantized."""
        found: list[Term] = []
        several: dict[int, list[Term]] = {}
        for term in terms:
            if len(term.inexact()) > 1:
                several.setdefault(term.source, []).append(term)
            elif term.inexact():
                found.append(term)
            else:
                output = term.shapes(self._shape(term.source))[-1]
                ones = pointwise(np.ones((output[0], 1)), len(output) - 1, groups=output[0])
                found.append(replace(term, steps=(*term.steps, ones)))
        for source, own in several.items():
            made = merged(own, self._shape(source))
            found += self._quantizable([self._cut(term, name) for term in own], name) if made is None else (
                self._quantizable(made, name)
            )  # fmt: skip
        return tuple(found)

    def _cut(self, term: Term, name: str) -> Term:
        """Return a term that reads a new tensor: the values in the middle of a term, looked up."""
        at, _ = cheapest_cut(term, self._shape(term.source))
        key = (term.source, *map(id, term.steps[:at]))
        if key not in self._cuts:
            first = before(term, at)
            bias = np.zeros(first.shapes(self._shape(term.source))[-1])
            self._cuts[key] = first, self._layer(Affine(name, (first,), bias), X, f"{name}.0")
        return replace(term, source=self._cuts[key][1], steps=term.steps[at:])

    # These methods apply operators to values.

    def linear(self, value: Affine, step: Step, name: str, factor: float = 1.0, bias: Any = None) -> Affine:
        """Apply a linear step, then multiply by `factor` and add `bias` (C,)."""
        terms = tuple(term.then(step, self._shape(term.source), factor) for term in value.terms)
        constant = factor * step.apply(value.bias[None], 0)[0]
        if bias is not None:
            constant = constant + np.reshape(bias, (-1, *[1] * (constant.ndim - 1)))
        return Affine(weighed(value, name), terms, constant)

    def select(self, value: Value, step: Select, name: str) -> Value:
        """Apply a selection. An activation stays pending if the selection adds no zeros."""
        if step.index.shape == value.shape and (step.index.ravel() == np.arange(step.index.size)).all():
            return value  # nothing moves
        if isinstance(value, Pending) and (step.index != OUTSIDE).all():
            index = step.index if value.view is None else value.view.index.ravel()[step.index]
            return replace(value, name=name, view=Select(index=frozen(index)))
        return self.linear(self.affine(value), step, name)

    def add(self, a: Affine, b: Affine, name: str, factor: float = 1.0) -> Affine:
        """Return a + factor · b, of equal shapes."""
        if sum(len(term.inexact()) > 1 for term in (*a.terms, *b.terms)) > MOST_PRODUCTS:
            a, b = (self._function(Pending(value.name, value, X)) for value in (a, b))
        terms = (replace(term, factor=factor * term.factor) for term in b.terms if factor)
        return Affine(weighed(a, weighed(b, name)), summed((*a.terms, *terms)), a.bias + factor * b.bias)

    def squares(self, x: Affine, y: Affine, name: str) -> Affine:
        """Return (x + y)², of equal shapes, looked up in a layer that knows which terms are those of x."""
        first = self._quantizable(x.terms, name)
        terms = (*first, *self._quantizable(y.terms, name))
        total = Affine(weighed(x, weighed(y, name)), terms, x.bias + y.bias)
        return self.source(self._layer(total, Expression("square", (X,)), name, len(first)), name)

    def scale(self, value: Affine, factors: Array, name: str) -> Affine:
        """Multiply by constants (C, *S)."""
        shape = value.shape
        rows = factors.reshape(shape[0] if shape else 1, -1)
        bias = value.bias * factors
        if (rows == rows[:, :1]).all():
            terms = tuple(term.scaled(rows[:, 0], len(shape) - 1) for term in value.terms)
            return Affine(weighed(value, name), terms, bias)
        size = math.prod(shape)
        flatten = Select(index=frozen(np.arange(size)))
        each = pointwise(factors.reshape(-1, 1), 0, groups=size)
        back = Select(index=frozen(np.arange(size).reshape(shape)))
        for step in (flatten, each, back):
            value = self.linear(value, step, name)
        return replace(value, bias=bias)

    def apply(self, value: Value, function: Expression, name: str, read_once: bool = False) -> Value:
        """Apply a function of one variable; `read_once` says that nothing else reads the value."""
        if isinstance(value, Pooled) and read_once and _increases(function):
            # The function moves before the maximum, into a lookup that the maximum needs anyway.
            inner = value.inner
            return replace(value, inner=replace(inner, function=function.of(inner.function)))
        pending = self.pending(value)
        if pending.view is not None and function.arrays():  # a number for each channel of the view
            pending = self.pending(self.affine(pending))
        return replace(pending, name=name, function=function.of(pending.function))


def _read(layers: Sequence[Layer | Maximum]) -> tuple[Layer | Maximum, ...]:
    """Return the layers that the last one depends on, numbered anew.

    Some layers are not read: those of a sum that later became part of a function of one variable.
    """
    wanted = {len(layers)}
    for number in range(len(layers), 0, -1):
        if number in wanted:
            wanted.update(layers[number - 1].sources)
    numbers = {old: new for new, old in enumerate(sorted(wanted | {0}))}
    kept: list[Layer | Maximum] = []
    for layer in (layers[number - 1] for number in sorted(wanted - {0})):
        if isinstance(layer, Maximum):
            kept.append(replace(layer, source=numbers[layer.source]))
        else:
            terms = tuple(replace(term, source=numbers[term.source]) for term in layer.terms)
            kept.append(replace(layer, terms=terms))
    return tuple(kept)


def weighed(value: Affine, name: str) -> str:
    """Return the name of the layer that gave a value its weights, or `name` if it has none."""
    return value.name if any(term.inexact() for term in value.terms) else name


def _with_an_axis(value: Pending) -> tuple[Affine, Select | None]:
    """Return the base and the view of a value, with a channel axis added to the base if it has none."""
    base, view = value.base, value.view
    if base.shape:
        return base, view
    one = Select(index=frozen(np.zeros(1, np.int64)))
    terms = tuple(replace(term, steps=(*term.steps, one)) for term in base.terms)
    back = Select(index=frozen(np.zeros(() if view is None else view.index.shape, np.int64)))
    return Affine(base.name, terms, base.bias.reshape(1)), back


def _is_tensor(value: Affine) -> bool:
    """Return whether a value only holds elements of one tensor."""
    if len(value.terms) != 1 or value.terms[0].factor != 1 or value.bias.any():
        return False
    return all(isinstance(s, Select) and (s.index != OUTSIDE).all() for s in value.terms[0].steps)


def _same_view(a: Select | None, b: Select | None) -> bool:
    if a is None or b is None:
        return a is b
    return np.array_equal(a.index, b.index)


def _increases(function: Expression) -> bool:
    """Return whether a function is one operator that never decreases, and is the same for all elements."""
    variable, *numbers = function.arguments
    if variable is not X or function.arrays():
        return False
    if function.operator in _INCREASING_IF_POSITIVE:
        return all(number >= 0 for number in numbers)
    return function.operator in _INCREASING
