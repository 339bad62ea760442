"""Numbers of bits that are left to be found: how accumulators are shared out between weights and inputs.

Under a budget, finer inputs leave fewer units for the weights. What is best differs from layer to layer, so
the numbers are searched on calibration images: some are held out, and judge.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from fheconv.arrays import Array
from fheconv.config import AUTO, QuantConfig
from fheconv.errors import AccumulatorOverflowError, InvalidArgumentError
from fheconv.network import CalibratedInput, Layer, Network
from fheconv.progress import status
from fheconv.quantized import QuantizedNetwork
from fheconv.quantizer.layerwise import quantize_network

# What is tried: integers of an activation, of an image value; bits of a weight.
LEVELS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)
IMAGE_LEVELS = (*LEVELS, 24, 32)
WEIGHT_BITS = (2, 3, 4, 5, 6)
# Weights before lookups start here; those of the last layer, whose accumulators cost little, get so many.
FIRST_WEIGHT_BITS, LAST_WEIGHT_BITS = 4, 6
# Accumulators before lookups: the narrowest, and the widest that "auto" takes.
NARROWEST, WIDEST = 3, 8
# "auto" takes the least width at which the results' mean squared error is this share of their variance.
TOLERANCE = 0.05
# A change that gains less than this share of the loss is not worth following.
GAIN = 0.01
# Every fifth image is held out, if there are so many at least.
EVERY, FEWEST = 5, 20

# What kind of number, of which layer ("" for the image).
Number: TypeAlias = tuple[str, str]
State: TypeAlias = dict[Number, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Allocated:
    """A network with numbers that were found, and its loss on the images that were held out."""

    network: QuantizedNetwork
    loss: float


def is_open(config: QuantConfig) -> bool:
    """Whether some number is left to be found."""
    names = "weight_bits", "activation_bits", "accumulator_bits", "input_bits"
    return any(isinstance(value := getattr(config, name), str) and value == AUTO for name in names)


def allocate(network: Network, images: Array, calibrated: CalibratedInput, config: QuantConfig) -> Allocated:
    """Return the network with the numbers that lose least on held-out images (N, C, *S).

    The width of accumulators grows from the narrowest that works; at each, numbers go up or down a rung while
    that helps, from where the width before left them. The best of all widths is kept, so that more bits never
    lose more. With fewer than 20 images, none are held out.

    Raises `InvalidArgumentError` where nothing limits the accumulators, `AccumulatorOverflowError` if no
    width works.
    """
    enough = len(images) >= FEWEST
    held_out = images[::EVERY] if enough else images
    fitted = np.delete(images, slice(None, None, EVERY), axis=0) if enough else images
    meant = network.tensors(held_out)[-1]
    variance = float(meant.var()) or 1.0
    calibrated = replace(calibrated, images=len(fitted))
    search = _Search(network, config)

    def judged(one: QuantConfig) -> Allocated | None:
        try:
            quantized = quantize_network(network, fitted, calibrated, one)
        except AccumulatorOverflowError:
            return None
        sums = quantized.accumulate(quantized.input.integers(held_out)) * quantized.last.scale
        return Allocated(network=quantized, loss=float(np.square(sums - meant).mean()) / variance)

    best: Allocated | None = None
    state = search.start()
    with status("Looking for the best numbers of bits…"):
        for width in search.widths():
            now = judged(search.config_of(state, width))
            better = True
            while better:
                better = False
                for number in state:
                    tried = [
                        (judged(search.config_of(moved, width)), moved)
                        for moved in search.moves(state, number)
                    ]
                    for candidate, moved in tried:
                        if candidate is not None and (now is None or candidate.loss < now.loss * (1 - GAIN)):
                            now, state, better = candidate, moved, True
            if now is not None and (best is None or now.loss < best.loss):
                best = now
            if best is not None and search.any_width and best.loss <= TOLERANCE:
                break
    if best is None:
        # Without a search, the error says what the least width is.
        quantize_network(network, fitted, calibrated, search.config_of(state, search.widest))
        raise AccumulatorOverflowError("No numbers of bits fit these accumulators; allow wider ones.")
    return best


class _Search:
    """What is searched: which numbers, from where, and up to which widths."""

    def __init__(self, network: Network, config: QuantConfig) -> None:
        self.config = config
        self.layers = [layer for layer in network.layers if isinstance(layer, Layer)]
        self.any_width = config.accumulator_bits == AUTO
        self.limits = {layer.name: self._limit(layer) for layer in self.layers}
        known = [limit for limit in self.limits.values() if limit is not None]
        if not known:
            raise InvalidArgumentError(
                'Nothing limits the accumulators that "auto" shares out between inputs and weights; set '
                'accumulator_bits (a number, or "auto") or rounding_bits.'
            )
        self.widest = max(known)

    def _limit(self, layer: Layer) -> int | None:
        looks_up = layer.activation is not None
        if self.any_width:
            return WIDEST if looks_up else None
        return self.config.accumulator_bits_of(layer.name, looks_up=looks_up)

    def widths(self) -> range:
        """Return the widths to go through, upwards."""
        return range(min(NARROWEST, self.widest), self.widest + 1)

    def start(self) -> State:
        """Return the numbers to start with: few."""
        state: State = {}
        if self.config.input_bits == AUTO and self.config.input_levels is None:
            state["input", ""] = 3 if self.config.input_signed else 2
        for layer in self.layers:
            looks_up = layer.activation is not None
            if looks_up and self.config.activation_bits == AUTO and self.config.activation_levels is None:
                state["activation", layer.name] = 2
            if self.config.weight_bits == AUTO and self.limits[layer.name] is not None:
                state["weight", layer.name] = FIRST_WEIGHT_BITS
        return state

    def moves(self, state: State, number: Number) -> Iterator[State]:
        """Yield the states in which one number is a rung higher or lower."""
        rungs = {"input": IMAGE_LEVELS, "activation": LEVELS, "weight": WEIGHT_BITS}[number[0]]
        at = rungs.index(state[number])
        for to in (at + 1, at - 1):
            if 0 <= to < len(rungs) and not (
                number[0] == "input" and self.config.input_signed and rungs[to] < 3
            ):
                yield {**state, number: rungs[to]}

    def config_of(self, state: State, width: int) -> QuantConfig:
        """Return the configuration with these numbers, and accumulators no wider than `width`."""
        found: dict[str, Any] = {
            "accumulator_bits": {
                name: min(limit, width) for name, limit in self.limits.items() if limit is not None
            }
        }
        config = self.config
        if config.input_bits == AUTO:
            found["input_bits"] = 4
            found["input_levels"] = state.get(("input", ""), config.input_levels)
        if config.activation_bits == AUTO:
            found["activation_bits"] = None
            levels = {layer: value for (kind, layer), value in state.items() if kind == "activation"}
            found["activation_levels"] = levels or config.activation_levels
        if config.weight_bits == AUTO:
            found["weight_bits"] = {
                layer.name: state.get(("weight", layer.name), LAST_WEIGHT_BITS) for layer in self.layers
            }
        return replace(config, **found)
