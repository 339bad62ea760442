"""Makes the function of each layer, which numpy and Concrete both run."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np

from fheconv.arithmetic import OUTSIDE
from fheconv.basics.arrays import Array, along_channels
from fheconv.basics.compile_config import Engine
from fheconv.lowering.dialect import hint, look_up, plus, take
from fheconv.lowering.lanes import Lanes
from fheconv.lowering.plan import Plan, TermProgram
from fheconv.lowering.planes import Planes
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
class Step:
    """Holds the function of a layer, its description, and what `Lowered` says of all layers."""

    function: Function
    layer: LoweredLayer
    pads: bool
    gathers: Callable[[], bool]


@dataclass(frozen=True, kw_only=True, eq=False)
class Lowering:
    """Makes the function of each layer of a network.

    `masks` holds the values that are there of each tensor, and `blanks()` the tensors for the blank image
    (`blank_image`). In a circuit, every tensor is counted from its values for that image, so that padding is
    0 and layers have no constants but one: the accumulators of the blank image, counted from the start of
    their window or bounds. So a constant has never more bits than its accumulator. And Concrete, which sees
    the blank image only, sees zeros in all sums that are not in offset form, and makes no value wider than
    its hints say.
    """

    network: IntegerNetwork
    masks: list[Array]
    engine: Engine
    blanks: Callable[[], list[Array]]

    @classmethod
    def of(cls, network: IntegerNetwork, engine: Engine) -> "Lowering":
        """Return what makes the functions of a network's layers, each for all values that are read of it."""
        blanks = cache(lambda: network.tensors(blank_image(network.input, network.input_shape)))
        return cls(network=network, masks=demand(network), engine=engine, blanks=blanks)

    def blank(self, number: int) -> Array:
        """Return tensor `number` (C, *S) for the blank image."""
        return self.blanks()[number][0]

    def each(self, wanted: Array, number: int) -> Step:
        """Return the step of layer `number`, which is not the last, for the values `wanted` of it."""
        layer = self.network.layers[number]
        if isinstance(layer, Maximum):
            return self.maximum(layer, wanted)
        if layer.lookup is None:
            raise TypeError("Only the last layer of a network has no lookup.")
        return self.layer(layer, wanted, layer.lookup.minimum, layer.lookup.bits)

    def last(self, planes: Planes, wanted: Array, lanes: Lanes) -> Step:
        """Return the step of the last layer, for the results `wanted` of its planes."""
        ends = self.network.input.minimum * lanes.every, self.network.input.maximum * lanes.every
        # A result of fewer bits than the image, next to which it is computed, would make Concrete expect a
        # narrower image than it is given.
        least = twos_complement_bits(min(ends[0], 0), ends[1])
        bits, start = lanes.width(planes.bounds.offset_bits), planes.bounds.channel_minimum
        return self.layer(planes.layer, wanted, start, bits, lanes.every, least)

    def layer(
        self, layer: QuantizedLayer, wanted: Array, start: Array, bits: int, every: int = 1, least: int = 0
    ) -> Step:
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
            offset = layer.accumulate(self.blanks())[0] - along_channels(start, wanted.ndim)
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
            lookups=0 if table is None else int(looked_up(table, layer, wanted).sum()),
            bits=bits,
            lookup_bits=0 if table is None else table.column_bits,
            planes=1,
            plane_bits=bits,
        )

        def gathers() -> bool:
            constant = () if table is None else table.constant[made()[2]]
            return (any(constant) and not all(constant)) or any(plan.gathers for plan in plans)

        pads = any(plan.pads for plan in plans)
        return Step(function=function, layer=description, pads=pads, gathers=gathers)

    def maximum(self, layer: Maximum, wanted: Array) -> Step:
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
        return Step(function=function, layer=description, pads=pads, gathers=lambda: True)


def looked_up(table: Lookup, layer: QuantizedLayer, wanted: Array) -> Array:
    """Return the mask of the values that take a lookup: those that are `wanted` and not constant."""
    mask: Array = wanted & ~table.constant[np.broadcast_to(table.which, layer.shape)]
    return mask
