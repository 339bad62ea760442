"""From the integer network to one function that numpy and Concrete both run."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from fheconv import engines
from fheconv.arithmetic import OUTSIDE
from fheconv.arithmetic.matrix import DENSE_LIMIT
from fheconv.arrays import Array
from fheconv.bounds import AccumulatorBounds, layer_bounds, without_bias
from fheconv.config import Engine
from fheconv.engines import UNIT_COST, WHY, take
from fheconv.errors import InvalidArgumentError
from fheconv.network import Maximum, Quantization
from fheconv.pruning import Plain, demand, prune
from fheconv.quantized import Lookup, QuantizedLayer, QuantizedNetwork, blank_images, comparison
from fheconv.steps import Kernel, Shape, Term

# From the tensors so far, each (N, values that are read), to the next.
Function: TypeAlias = Callable[[list[Any]], Any]


@dataclass(frozen=True, kw_only=True)
class LoweredLayer:
    """How a layer is computed: with which engine and why, for how many multiplications and lookups.

    `lookup_bits` is the width of what enters its lookups, after rounding, `bits` before.
    """

    name: str
    engine: str
    reason: str
    multiply_adds: int
    lookups: int
    bits: int
    lookup_bits: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Lowered:
    """The circuit's function, and what it takes to feed it and to read its results.

    `function` maps integers (1, n), the values at `inputs` of an image, numpy array or Concrete tracer, to
    those at `outputs` of the last accumulators in offset form (1, m): never negative, at most `bits` wide, by
    the proof in `bounds` (which leaves the bias out). Values that no result depends on are left out, and so
    are results that are constant.

    `lanes` images ride in one: image i is shifted up by i·`lane_bits`, and because every result lies between
    0 and 2^lane_bits − 1, no lane borrows from or carries into another.
    """

    function: Callable[[Any], Any]
    network: QuantizedNetwork
    layers: tuple[LoweredLayer, ...]
    bounds: AccumulatorBounds
    inputs: Array
    outputs: Array
    lanes: int

    @property
    def lane_bits(self) -> int:
        """The proved width of one image's results."""
        return max(self.bounds.offset_bits, 1)

    @property
    def bits(self) -> int:
        """The proved width of the function's results, all lanes together."""
        return self.bounds.offset_bits + (self.lanes - 1) * self.lane_bits

    @property
    def lookups(self) -> int:
        """The number of lookups of one image."""
        return sum(layer.lookups for layer in self.layers)

    def prepare(self, q: Array) -> Array:
        """Return what the circuit takes for integer images (N, C, *S): (⌈N / lanes⌉, n)."""
        empty = -len(q) % self.lanes
        filler = np.full((empty, *q.shape[1:]), self.network.input.zero_point)
        read = np.concatenate([q, filler]).reshape(len(q) + empty, math.prod(q.shape[1:]))[:, self.inputs]
        by_lane = read.reshape((len(q) + empty) // self.lanes, self.lanes, len(self.inputs))
        return np.tensordot(by_lane, _lane_steps(self.lanes, self.lane_bits), axes=(1, 0))

    def inputset(self) -> Array:
        """Return what Concrete sees at compilation: inputs of the right sign. All widths come as hints."""
        blank = blank_images(self.network.input, self.network.input_shape)
        return self.prepare(np.repeat(blank, self.lanes, axis=0))

    def accumulators(self, results: Array, images: int) -> Array:
        """Return the accumulators (N, K, *Out), bias included, of the function's results for N images."""
        shifts = np.arange(self.lanes)[:, None] * self.lane_bits
        lanes = results[:, None] >> shifts
        if self.lanes > 1:
            lanes &= 2**self.lane_bits - 1
        lanes = lanes.reshape(len(results) * self.lanes, len(self.outputs))[:images]
        layer = self.network.last
        y = np.zeros((images, math.prod(layer.shape)), np.int64)
        y[:, self.outputs] = lanes
        start = self.bounds.channel_minimum.reshape(-1, *[1] * (len(layer.shape) - 1))
        return y.reshape(images, *layer.shape) + start + layer.bias


def _lane_steps(lanes: int, lane_bits: int) -> Array:
    """Return what one step of each lane is worth, (lanes,)."""
    return 1 << np.arange(lanes) * lane_bits


def lower(network: QuantizedNetwork, engine: Engine = "auto", lanes: int = 1) -> Lowered:
    """Return the function of a network, by the engine named or by the one that is predicted cheapest.

    `lanes` images ride in one (see `Lowered`); the caller checks that so many bits can be held. Only networks
    without lookups take several.

    Raises `InvalidArgumentError` if the engine named cannot run a layer.
    """
    masks = demand(network)
    bounds = layer_bounds(without_bias(network.last), network.shapes)
    changes = bounds.maximum != bounds.channel_minimum.reshape(-1, *[1] * (len(network.last.shape) - 1))
    if changes.any():
        masks[-1] = changes
    every = int(_lane_steps(lanes, max(bounds.offset_bits, 1)).sum())
    functions, layers = [], []
    for number, layer in enumerate(network.layers):
        wanted = masks[number + 1]
        if isinstance(layer, Maximum):
            function, lowered = _maximum(layer, masks, wanted, network)
        else:
            function, lowered = _layer(layer, masks, wanted, network.shapes, bounds, engine, every, lanes)
        functions.append(function)
        layers.append(lowered)
    image_bits = _unsigned_bits(network.input) + (lanes - 1) * max(bounds.offset_bits, 1)

    def circuit(x: Any) -> Any:
        tensors = [x if network.input.minimum < 0 else _hint(x, image_bits)]
        for function in functions:
            tensors.append(function(tensors))
        return tensors[-1]

    return Lowered(
        function=circuit,
        network=network,
        layers=tuple(layers),
        bounds=bounds,
        inputs=np.flatnonzero(masks[0]),
        outputs=np.flatnonzero(masks[-1]),
        lanes=lanes,
    )


def _layer(
    layer: QuantizedLayer,
    masks: list[Array],
    wanted: Array,
    shapes: tuple[Shape, ...],
    last: AccumulatorBounds,
    engine: Engine,
    every: int,
    lanes: int,
) -> tuple[Function, LoweredLayer]:
    table = layer.lookup
    start = last.channel_minimum if table is None else table.minimum
    outputs = np.flatnonzero(wanted)
    offset = -np.broadcast_to(start.reshape(-1, *[1] * (len(layer.shape) - 1)), layer.shape).ravel()[outputs]
    programs = [
        _Program.of(layer.name, term, quantization, masks[term.source], shapes[term.source], wanted, engine)
        for term, quantization in zip(layer.terms, layer.inputs, strict=True)
    ]
    for program in programs:
        offset = offset + program.constant
    offset = (offset * every).reshape(1, -1)
    bits = last.offset_bits + (lanes - 1) * max(last.offset_bits, 1) if table is None else table.bits
    which = outputs if table is None else np.broadcast_to(table.which, layer.shape).ravel()[outputs]

    def function(tensors: list[Any]) -> Any:
        total: Any = None
        for program in programs:
            summand = program(tensors[program.source], every)
            total = summand if total is None else total + summand
        total = _hint(total + offset, bits)
        return total if table is None else _look_up(table, which, total)

    return function, LoweredLayer(
        name=layer.name,
        engine=" + ".join(dict.fromkeys(program.engine for program in programs)),
        reason=programs[0].reason,
        multiply_adds=sum(program.multiply_adds for program in programs),
        lookups=0 if table is None else len(outputs),
        bits=bits,
        lookup_bits=0 if table is None else table.column_bits,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Program:
    """How one term is computed from the values that are read of its source, (N, n), to (N, m).

    Either one product with `matrix` (n, m), or convolutions one after the other: `stages` holds each of them
    with its engine and the places in the values before it that it reads; `places` is what is read at the end.
    `constant` (m,) has to be added.
    """

    source: int
    engine: str
    reason: str
    multiply_adds: int
    constant: Array
    matrix: Array | None
    stages: tuple[tuple[str, Plain, Array, int], ...]
    places: Array

    def __call__(self, x: Any, every: int) -> Any:
        if self.matrix is not None:
            return x @ self.matrix
        for engine, plain, places, pad in self.stages:
            y = engines.run(engine, plain, take(x, places, pad * every), every)
            x = y.reshape((y.shape[0], math.prod(y.shape[1:])))
        return take(x, self.places, 0)

    @classmethod
    def of(
        cls,
        name: str,
        term: Term,
        quantization: Quantization,
        mask: Array,
        shape: Shape,
        wanted: Array,
        engine: Engine,
    ) -> "_Program":
        """Choose how to compute a term of the layer `name`."""
        inputs, outputs = np.flatnonzero(mask), np.flatnonzero(wanted)
        places = np.full(math.prod(shape), OUTSIDE)
        places[inputs] = np.arange(len(inputs))
        pad, stages, counts = quantization.zero_point, [], []
        steps = zip(term.steps, term.shapes(shape)[:-1], term.masks(wanted, shape)[1:], strict=True)
        for step, before, after in steps:
            if isinstance(step, Kernel):
                plain = prune(step, before, after, pad)
                stages.append((plain, np.where(plain.index == OUTSIDE, OUTSIDE, places[plain.index]), pad))
                counts.append(plain.multiply_adds())
                places = np.full(after.size, OUTSIDE)
                places[plain.outputs.ravel()] = np.arange(plain.outputs.size)
                pad = 0
            else:
                places = np.where(step.index == OUTSIDE, OUTSIDE, places[step.index]).ravel()
        possible = {
            one: sum(count.get(one, count.get("conv", 0)) for count in counts)
            for one in ("conv", "separable", "shifts")
            if any(one in count for count in counts)
        }
        if not all(counts):
            possible = {}
        if 8 * len(inputs) * len(outputs) <= DENSE_LIMIT:
            possible["matrix"] = len(inputs) * len(outputs)
        chosen, reason = _choose(name, engine, possible)
        zeros = np.zeros((1, *shape), np.int64)
        matrix, constant = None, np.zeros(len(outputs), np.int64)
        if chosen == "matrix":
            matrix = term.matrix(shape)[inputs][:, outputs].toarray()
            # The matrix reads no padding: what a zero-point there adds is a constant.
            constant = term.apply(zeros, quantization.zero_point).ravel()[outputs]
        return cls(
            source=term.source,
            engine=chosen,
            reason=reason,
            multiply_adds=possible[chosen],
            constant=constant,
            matrix=matrix,
            stages=tuple(
                (chosen if chosen in count else "conv", *stage)
                for stage, count in zip(stages, counts, strict=True)
            ),
            places=places[outputs],
        )


def _choose(name: str, engine: Engine, possible: dict[str, int]) -> tuple[str, str]:
    """Return the engine to run with, and why."""
    if engine == "auto":
        predicted = {one: possible[one] * UNIT_COST[one] / 1000 for one in possible}
        shown = ", ".join(f"{one} {ms:,.3g}" for one, ms in sorted(predicted.items(), key=lambda p: p[1]))
        return min(predicted, key=predicted.__getitem__), f"cheapest predicted, in ms: {shown}"
    if engine not in possible:
        too_large = f"The dense matrix would take more than {DENSE_LIMIT / 2**30:.0f} GiB."
        raise InvalidArgumentError(
            f"engine={engine!r} cannot run layer {name!r}; those that can are {', '.join(possible)}. "
            + WHY.get(engine, too_large)
        )
    return engine, "asked for"


def _maximum(
    layer: Maximum, masks: list[Array], wanted: Array, network: QuantizedNetwork
) -> tuple[Function, LoweredLayer]:
    """Take maxima of two at a time, one lookup each."""
    places = np.full(masks[layer.source].size, OUTSIDE)
    places[np.flatnonzero(masks[layer.source])] = np.arange(masks[layer.source].sum())
    candidates = places[layer.index[:, wanted]]
    quantization = network.quantizations[layer.source]
    table = comparison(quantization)
    source, bits = layer.source, _unsigned_bits(quantization)

    def function(tensors: list[Any]) -> Any:
        x = tensors[source]
        y = take(x, candidates[0], 0)
        for rest in candidates[1:]:
            other = take(x, rest, 0)
            difference = _hint(other - y - int(table.minimum[0]), table.bits)
            y = y + _look_up(table, np.zeros(candidates.shape[1], np.int64), difference)
            y = y if quantization.minimum < 0 else _hint(y, bits)
        return y

    return function, LoweredLayer(
        name=layer.name,
        engine="maximum",
        reason="a lookup for each comparison of two",
        multiply_adds=0,
        lookups=(len(candidates) - 1) * candidates.shape[1],
        bits=table.bits,
        lookup_bits=table.column_bits,
    )


def _unsigned_bits(quantization: Quantization) -> int:
    return quantization.maximum.bit_length()


# The operations that numpy and Concrete spell differently.


def _hint(x: Any, bits: int) -> Any:
    """Tell Concrete the width of a value: it would only know what it sees at compilation."""
    if isinstance(x, np.ndarray):
        return x
    from concrete import fhe

    return fhe.hint(x, bit_width=max(bits, 1))


def _look_up(table: Lookup, which: Array, x: Any) -> Any:
    """Return the activations for accumulators in offset form (N, m), which use rows `which` of the table."""
    if isinstance(x, np.ndarray):
        return table.rows(x, which)
    from concrete import fhe

    if table.dropped_bits:
        x = fhe.round_bit_pattern(
            x,
            lsbs_to_remove=table.dropped_bits,
            overflow_protection=False,
            exactness=fhe.Exactness.APPROXIMATE,
        )
        # Without its own hint it would have the width seen at compilation, to which Concrete clips the table.
        x = fhe.hint(x, bit_width=table.bits)
    # Concrete indexes by what is left in its old place: each entry 2^dropped_bits times, of which it reads
    # one.
    return _table(np.repeat(table.tables, 1 << table.dropped_bits, axis=1), which, x)


def _table(rows: Array, which: Array, x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return rows[which, x]
    from concrete import fhe

    used, at = np.unique(which, return_inverse=True)
    tables = [fhe.LookupTable(rows[row].tolist()) for row in used]
    each: Any = tables[0]
    if len(tables) > 1:
        by_place = np.empty((1, len(which)), object)
        for place, row in enumerate(at):
            by_place[0, place] = tables[row]
        each = fhe.LookupTable(by_place)
    return _hint(each[x], int(rows.max()).bit_length())
