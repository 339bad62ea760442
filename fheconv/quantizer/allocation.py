"""Chooses the numbers that are "auto", by the network's error on held-out calibration images.

An accumulator of P bits allows either many levels of the inputs or large weights. Which is better depends on
the other layers. The search is a coordinate descent. Each number has a ladder of values, and a rung is a
place on it. The search starts with the narrowest accumulators and goes on to the widest that are allowed;
each width starts from the numbers of the width before. A narrower network also fits a wider limit, so that
more bits never give a greater error.
"""

from bisect import bisect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from fheconv.basics.arrays import Array
from fheconv.basics.config import ROUNDED_AWAY, QuantConfig
from fheconv.basics.errors import AccumulatorOverflowError, InvalidArgumentError
from fheconv.basics.progress import status
from fheconv.networks.floats import Layer, Network
from fheconv.networks.quantization import CalibratedInput
from fheconv.quantizer.layerwise import quantize_network
from fheconv.quantizer.sparing import results_error

# The ladder of levels: how many integers an activation or an image value can be. Each is about √2 times the
# one before, which costs half a bit of an accumulator. With finer steps the search gets stuck, and takes
# longer.
LEVELS = (2, 3, 4, 5, 7, 10, 14, 20, 28)
# The ladder of weight bits.
WEIGHT_BITS = (2, 3, 4, 5, 6)
# The greatest width of "auto" accumulators.
WIDEST = 8
# "auto" accumulators are wide enough at this error: networks on digits lose a point or two of accuracy.
TOLERANCE = 0.06
# A move must reduce the error by at least this share, because a smaller gain is chance.
SHARE = 0.01
# Every fifth image is held out, where there are enough for both parts.
EVERY, ENOUGH = 5, 20

# The rungs of all knobs.
State: TypeAlias = tuple[int, ...]


class Allocation(NamedTuple):
    """Holds a configuration without "auto", and its error on the held-out images."""

    config: QuantConfig
    error: float


@dataclass(frozen=True, kw_only=True)
class Knob:
    """Describes a number to choose: `name` of a `layer` (None: of images), on `ladder` from rung `first`."""

    name: str
    layer: str | None
    ladder: tuple[int, ...]
    first: int = 0


class Trial:
    """Quantizes on some of the calibration images (N, C, *S), and measures the error on the others."""

    def __init__(self, network: Network, images: Array, calibrated: CalibratedInput) -> None:
        self.network, self.calibrated = network, calibrated
        self.images = self.held_out = images
        if len(images) >= ENOUGH:
            held_out = np.arange(len(images)) % EVERY == EVERY - 1
            self.images, self.held_out = images[~held_out], images[held_out]
        self.expected = network.tensors(self.held_out)[-1]

    def error(self, config: QuantConfig) -> float:
        """Return the mean squared error of the last layer's real sums, divided by their variance.

        Raises like `fheconv.quantize`.
        """
        quantized = quantize_network(self.network, self.images, self.calibrated, config)
        variance = float(self.expected.var(axis=0).mean())
        return results_error(quantized, self.held_out, self.expected) / (variance or 1.0)


@dataclass(frozen=True, kw_only=True)
class Search:
    """Searches for numbers, with the limits `widths` of accumulators by the names of layers."""

    trial: Trial
    config: QuantConfig
    knobs: Sequence[Knob]
    widths: Mapping[str, int]

    def filled(self, state: State) -> QuantConfig:
        """Return the configuration with the numbers of a state."""
        config = self.config
        chosen: dict[str, dict[str | None, int]] = {}
        for knob, rung in zip(self.knobs, state, strict=True):
            chosen.setdefault(knob.name, {})[knob.layer] = knob.ladder[rung]
        numbers: dict[str, Any] = {"accumulator_bits": dict(self.widths)}
        if isinstance(config.accumulator_bits, int):
            numbers["accumulator_bits"] = max(self.widths.values())
        for name in ("weight_bits", "activation_levels"):
            if name in chosen:
                given = getattr(config, name)
                numbers[name] = {**(given if isinstance(given, Mapping) else {}), **chosen[name]}
        if config.asks("activation_bits"):
            given = config.activation_bits
            others = given.items() if isinstance(given, Mapping) else ()
            numbers["activation_bits"] = {layer: bits for layer, bits in others if bits != "auto"} or None
        if config.asks("input_bits"):
            numbers["input_bits"] = QuantConfig.input_bits
        if "input_levels" in chosen:
            numbers["input_levels"] = chosen["input_levels"][None]
        return replace(config, **numbers)

    def error(self, state: State) -> float:
        """Return the error of a state, or infinity if accumulators would overflow."""
        try:
            return self.trial.error(self.filled(state))
        except AccumulatorOverflowError:
            return np.inf

    def descended(self, state: State) -> tuple[State, float]:
        """Improve a state by moves of single rungs. Return the result and its error.

        The descent starts from the best of three: `state`, one rung more for all levels, and levels that take
        half of the width. Raises `AccumulatorOverflowError` if accumulators of `state` would overflow.
        """
        error = cache(self.error)
        if error(state) == np.inf:
            self.trial.error(self.filled(state))  # raises, and names the layer and what it needs
        levels = [place for place, knob in enumerate(self.knobs) if knob.name != "weight_bits"]
        state = min((state, self._moved(state, levels, 1), self._halves()), key=error)
        least, before = error(state), np.inf
        while least < before:
            before = least
            for place in range(len(state)):
                better = min((self._moved(state, [place], step) for step in (-1, 1)), key=error)
                if error(better) < least * (1 - SHARE):
                    state, least = better, error(better)
        return state, least

    def _halves(self) -> State:
        """Return the state in which levels take half of a width, and weights have their first rung."""
        levels = 2 ** (max(self.widths.values()) // 2)
        return tuple(
            knob.first if knob.name == "weight_bits" else max(bisect(knob.ladder, levels) - 1, 0)
            for knob in self.knobs
        )

    def _moved(self, state: State, places: Collection[int], step: int) -> State:
        """Return the state with some rungs moved by `step`, within their ladders."""
        return tuple(
            min(max(rung + step, 0), len(knob.ladder) - 1) if place in places else rung
            for place, (rung, knob) in enumerate(zip(state, self.knobs, strict=True))
        )


def allocate(network: Network, images: Array, calibrated: CalibratedInput, config: QuantConfig) -> Allocation:
    """Choose the numbers that are "auto" in `config`, by calibration images (N, C, *S).

    Raises `AccumulatorOverflowError` if no numbers fit the widths, `InvalidArgumentError` if nothing limits a
    width, and the other errors of `fheconv.quantize`.
    """
    layers = [layer for layer in network.layers if isinstance(layer, Layer)]
    limits = _limits(layers, config)
    if not limits:
        raise InvalidArgumentError(
            "No accumulator of this network enters a lookup, so that nothing limits its width; give a number "
            'in place of "auto".'
        )
    knobs, trial = _knobs(layers, config), Trial(network, images, calibrated)
    state = tuple(knob.first for knob in knobs)
    greatest, found = max(limits.values()), []
    refused: AccumulatorOverflowError | None = None
    with status("Choosing numbers of bits on held-out images…"):
        for width in range(1, greatest + 1):
            widths = {layer: min(limit, width) for layer, limit in limits.items()}
            search = Search(trial=trial, config=config, knobs=knobs, widths=widths)
            try:
                state, error = search.descended(state)
            except AccumulatorOverflowError as too_narrow:
                refused = too_narrow
                continue
            found.append(Allocation(search.filled(state), error))
            if error <= TOLERANCE and config.asks("accumulator_bits"):
                break
    if not found and refused is not None:
        raise refused
    return min(found, key=lambda allocation: allocation.error)


def _limits(layers: Sequence[Layer], config: QuantConfig) -> dict[str, int]:
    """Return the greatest allowed width of each layer that has a limit, by its name."""
    limits = {}
    for layer in layers:
        looks_up = layer.activation is not None
        if config.of_layer("accumulator_bits", layer.name) != "auto":
            limit = config.accumulator_bits_of(layer.name, looks_up=looks_up)
        elif looks_up:
            rounding = config.of_layer("rounding_bits", layer.name)
            limit = WIDEST if rounding is None else rounding + ROUNDED_AWAY
        else:
            limit = None
        if limit is not None:
            limits[layer.name] = limit
    return limits


def _knobs(layers: Sequence[Layer], config: QuantConfig) -> list[Knob]:
    """Return the numbers to choose, except those of accumulators."""
    knobs = []
    if config.asks("input_bits") and config.input_levels is None:
        ladder = LEVELS[1:] if config.input_signed else LEVELS
        knobs.append(Knob(name="input_levels", layer=None, ladder=ladder))
    for layer in layers:
        asked = config.of_layer("activation_bits", layer.name) == "auto"
        given = config.of_layer("activation_levels", layer.name) is not None
        if layer.activation is not None and asked and not given:
            knobs.append(Knob(name="activation_levels", layer=layer.name, ladder=LEVELS))
        if config.of_layer("weight_bits", layer.name) == "auto":
            knobs.append(Knob(name="weight_bits", layer=layer.name, ladder=WEIGHT_BITS, first=2))
    return knobs
