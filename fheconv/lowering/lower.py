"""Turns the integer network into one function that numpy and Concrete both run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fheconv.basics.arrays import Array, along_channels
from fheconv.basics.compile_config import Engine
from fheconv.lowering.dialect import hint, plus
from fheconv.lowering.interface import Interface
from fheconv.lowering.lanes import Lanes
from fheconv.lowering.layers import LoweredLayer, Lowering
from fheconv.lowering.planes import Planes, in_planes
from fheconv.networks.integers import IntegerNetwork, blank_image


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
    lowering = Lowering.of(network, engine)
    masks = lowering.masks
    steps = [lowering.each(wanted, number) for number, wanted in enumerate(masks[1:-1])]
    # The engine "separable" needs filters of rank one. The digits of such a filter may have a higher rank.
    lookup_bits = max((step.layer.lookup_bits for step in steps), default=0) if engine != "separable" else 0
    lookups = sum(step.layer.lookups for step in steps)
    planes = in_planes(network.last, network.shapes, lookup_bits, lookups)
    start, bounds = planes.bounds.channel_minimum, planes.bounds
    changes = bounds.maximum != along_channels(start, bounds.maximum.ndim)
    computed = changes if changes.any() else np.ones_like(changes)
    riding = Lanes.of(lanes, bounds.offset_bits)
    last = lowering.last(planes, computed, riding)
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
