"""Turns the integer network into one function that numpy and Concrete both run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, TypeAlias

import numpy as np

from fheconv.arithmetic import OUTSIDE
from fheconv.basics.arrays import Array, along_channels
from fheconv.basics.compile_config import Engine
from fheconv.lowering.dialect import hint, look_up, plus, take
from fheconv.lowering.interface import Interface
from fheconv.lowering.lanes import Lanes
from fheconv.lowering.plan import Plan, TermProgram
from fheconv.lowering.planes import Planes, in_planes
from fheconv.networks.demand import demand
from fheconv.networks.floats import Maximum
from fheconv.networks.integers import IntegerNetwork, Lookup, QuantizedLayer, blank_image, comparison
from fheconv.networks.quantization import twos_complement_bits

# Takes the tensors computed so far, each (N, values that are read), and returns the next one.
Function: TypeAlias = Callable[[list[Any]], Any]


@dataclass(frozen=True, kw_only=True)
class LoweredLayer:
    """The computation of one layer: its engine and the reason for it, its multiplications and its lookups.

    `bits` is the width of its accumulators. `lookup_bits` is the width that rounding leaves for a lookup. The
    last accumulators are computed in `planes` planes of `plane_bits` bits each (see
    `fheconv.lowering.planes`), all others in one plane.
    """

    name: str
    engine: str
    reason: str
    multiply_adds: int
    lookups: int
    bits: int
    lookup_bits: int
    planes: int
    plane_bits: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Step:
    """Holds the function of a layer, its description, and what `Lowered` says of all layers."""

    function: Function
    layer: LoweredLayer
    pads: bool
    gathers: Callable[[], bool]


@dataclass(frozen=True, kw_only=True, eq=False)
class Lowered:
    """A circuit's function, with everything needed to make its inputs and to read its results.

    `function` maps integers (1, n), a numpy array or a Concrete tracer, to the results (1, m).
    `interface.prepare` makes the integers, and `interface.accumulators` turns the results into accumulators.
    The results are the `planes` of the last accumulators, in offset form: never negative, and at most `bits`
    wide by the proof in `planes.bounds` (which leaves the bias out). Values that no result depends on are
    left out, and so are constant results. `padded` tells which layers read a padding. `gathers()` is True if
    some layer takes values of a tensor one by one, which Concrete cannot do with the widest values. It
    makes arrays as large as tensors.
    """

    function: Callable[[Any], Any]
    network: IntegerNetwork
    layers: tuple[LoweredLayer, ...]
    padded: tuple[bool, ...]
    gathers: Callable[[], bool]
    planes: Planes
    interface: Interface

    @property
    def bits(self) -> int:
        """The proved width of the function's results, for all lanes together."""
        return self.interface.lanes.width(self.planes.bounds.offset_bits)

    @property
    def lookups(self) -> int:
        """The number of lookups of one image."""
        return sum(layer.lookups for layer in self.layers)

    @property
    def takes_lanes(self) -> bool:
        """Whether several images may share a ciphertext: only in a network of one layer, without lookups."""
        return len(self.network.layers) == 1

    def inputset(self) -> Array:
        """Return the inputs that Concrete sees at compilation. They show signs; widths come as hints."""
        blank = blank_image(self.network.input, self.network.input_shape)
        return self.interface.prepare(np.repeat(blank, self.interface.lanes.count, axis=0))


def lower(network: IntegerNetwork, engine: Engine = "auto", lanes: int = 1) -> Lowered:
    """Return the function of a network, computed by the named engine or by the one predicted cheapest.

    `lanes` images share one ciphertext (see `Lanes`). The caller checks that Concrete can hold so many bits.
    Only networks without lookups take several images.

    Raises `InvalidArgumentError` if the named engine cannot run a layer.
    """
    masks = demand(network)
    lowering = _Lowering(network=network, masks=masks, engine=engine)
    steps = []
    for layer, wanted in zip(network.layers, masks[1:], strict=True):
        if isinstance(layer, Maximum):
            steps.append(lowering.maximum(layer, wanted))
        elif (table := layer.lookup) is not None:
            steps.append(lowering.layer(layer, wanted, table.minimum, table.bits))
    # The engine "separable" needs filters of rank one. The digits of such a filter may have a higher rank.
    lookup_bits = max((step.layer.lookup_bits for step in steps), default=0) if engine != "separable" else 0
    lookups = sum(step.layer.lookups for step in steps)
    planes = in_planes(network.last, network.shapes, lookup_bits, lookups)
    start, bounds = planes.bounds.channel_minimum, planes.bounds
    changes = bounds.maximum != along_channels(start, bounds.maximum.ndim)
    computed = changes if changes.any() else np.ones_like(changes)
    riding = Lanes.of(lanes, bounds.offset_bits)
    bits = riding.width(bounds.offset_bits)
    ends = [end * riding.every for end in (network.input.minimum, network.input.maximum)]
    # A result of fewer bits than the image, next to which it is computed, would make Concrete expect a
    # narrower image than it is given.
    least = twos_complement_bits(min(ends[0], 0), ends[1])
    last = lowering.layer(planes.layer, computed, start, bits, riding.every, least)
    described = replace(last.layer, bits=riding.width(planes.accumulator_bits), planes=len(planes.factors))
    functions = [*(step.function for step in steps), last.function]
    image_bits = riding.width(network.input.integer_bits)

    def circuit(x: Any) -> Any:
        tensors = [plus(hint(x, image_bits), -lowering.blank(0)[masks[0]] * riding.every)]
        for function in functions:
            tensors.append(function(tensors))
        return tensors[-1]

    return Lowered(
        function=circuit,
        network=network,
        layers=(*(step.layer for step in steps), described),
        padded=tuple(step.pads for step in (*steps, last)),
        gathers=lambda: any(step.gathers() for step in (*steps, last)),
        planes=planes,
        interface=Interface(
            input=network.input,
            input_shape=network.input_shape,
            inputs=np.flatnonzero(masks[0]),
            shape=network.accumulator_shape,
            outputs=np.flatnonzero(computed),
            start=start,
            factors=planes.factors,
            bias=network.last.bias,
            scale=network.last.scale,
            finish=network.source.finish,
            lanes=riding,
        ),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Lowering:
    """Makes the function of each layer of a network.

    `masks` holds the values that are read of each tensor. In a circuit, every tensor is counted from its
    values for the blank image (`blank_image`), so that padding is 0 and layers have no constants but one: the
    accumulators of the blank image, counted from the start of their window or bounds. So a constant has never
    more bits than its accumulator. And Concrete, which sees the blank image only, sees zeros in all sums that
    are not in offset form, and makes no value wider than its hints say.
    """

    network: IntegerNetwork
    masks: list[Array]
    engine: Engine

    @cached_property
    def _blanks(self) -> list[Array]:
        """The tensors of the network for the blank image."""
        return self.network.tensors(blank_image(self.network.input, self.network.input_shape))

    def blank(self, number: int) -> Array:
        """Return tensor `number` (C, *S) for the blank image."""
        return self._blanks[number][0]

    def layer(
        self, layer: QuantizedLayer, wanted: Array, start: Array, bits: int, every: int = 1, least: int = 0
    ) -> _Step:
        """Return a layer's function, and what is to be known of it.

        The function computes the accumulators at `wanted`, subtracts `start` (C,), so that they are `bits`
        wide, and looks them up. Constants are multiplied by `every`: 1 for one image in a ciphertext,
        `Lanes.every` for several. Concrete is told of at least `least` bits.
        """
        table = layer.lookup
        # Concrete fails on some sums with a summand that is always zero.
        reading = [term for term in layer.terms if term.read(wanted, self.masks[term.source].shape).any()]
        plans = [
            Plan.of(layer.name, term, self.masks[term.source], wanted, self.engine)
            for term in reading or layer.terms[:1]
        ]

        @cache
        def made() -> tuple[list[TermProgram], Array, Array]:
            """Return the programs, the accumulators of the blank image (m,), and the table's rows (m,)."""
            outputs = np.flatnonzero(wanted)
            offset = layer.accumulate(self._blanks)[0] - along_channels(start, wanted.ndim)
            which = outputs if table is None else np.broadcast_to(table.which, layer.shape).ravel()[outputs]
            return [plan.program() for plan in plans], offset.ravel()[outputs] * every, which

        def function(tensors: list[Any]) -> Any:
            programs, offset, which = made()
            total: Any = None
            for program in programs:
                summand = program(tensors[program.source])
                total = summand if total is None else total + summand
            total = hint(plus(total, offset), max(bits, least))
            return total if table is None else look_up(table, which, total, offset)

        description = LoweredLayer(
            name=layer.name,
            engine=" + ".join(dict.fromkeys(plan.engine for plan in plans)),
            reason=plans[0].reason,
            multiply_adds=sum(plan.multiply_adds for plan in plans),
            lookups=0 if table is None else _lookups(table, layer, wanted),
            bits=bits,
            lookup_bits=0 if table is None else table.column_bits,
            planes=1,
            plane_bits=bits,
        )

        def gathers() -> bool:
            constant = () if table is None else table.constant[made()[2]]
            return (any(constant) and not all(constant)) or any(plan.gathers for plan in plans)

        pads = any(plan.pads for plan in plans)
        return _Step(function=function, layer=description, pads=pads, gathers=gathers)

    def maximum(self, layer: Maximum, wanted: Array) -> _Step:
        """Return what `layer` does for a layer of maxima. Each maximum of two is one lookup."""
        mask = self.masks[layer.source]
        places = np.full(mask.size, OUTSIDE)
        places[np.flatnonzero(mask)] = np.arange(mask.sum())
        candidates = places[layer.index[:, wanted]]
        table = comparison(self.network.quantizations[layer.source])
        which = np.zeros(candidates.shape[1], np.int64)

        def function(tensors: list[Any]) -> Any:
            x, blanks = tensors[layer.source], take(self.blank(layer.source)[mask][None], candidates)[0]
            y, blank = take(x, candidates[0]), blanks[0]
            for rest, other in zip(candidates[1:], blanks[1:], strict=True):
                offset = other - blank - table.minimum
                difference = hint(plus(take(x, rest) - y, offset), table.bits)
                y, blank = y + look_up(table, which, difference, offset), np.maximum(other, blank)
            return y

        description = LoweredLayer(
            name=layer.name,
            engine="maximum",
            reason="a lookup for each comparison of two",
            multiply_adds=0,
            lookups=(len(candidates) - 1) * candidates.shape[1],
            bits=table.bits,
            lookup_bits=table.column_bits,
            planes=1,
            plane_bits=table.bits,
        )
        pads = bool((candidates == OUTSIDE).any())
        return _Step(function=function, layer=description, pads=pads, gathers=lambda: True)


def _lookups(table: Lookup, layer: QuantizedLayer, wanted: Array) -> int:
    """Return the number of lookups of a layer: one for each value that is `wanted` and not constant."""
    which = np.broadcast_to(table.which, layer.shape)
    return int((wanted & ~table.constant[which]).sum())
