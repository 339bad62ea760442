"""Chooses where a window lies, by the error of the activations that its lookup gives.

A window that holds all sums has wide columns. Most sums lie in its middle, so that a narrower window has
finer columns where they count. What a value outside costs depends on the activation. A table repeats mirrored
there, so that sums above the window of a ReLU saturate, for as far as the window reaches below 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from fheconv.basics.arrays import Array
from fheconv.networks.expression import Expression
from fheconv.quantizer.windows import MOST_CUT, dropped_bits, filling_gains, room

# The shares of a channel's sums that are tried to be cut off at one end.
CUTS = (0.0, 0.002, 0.005, 0.01, 0.02)
# The error is measured on at most this many sums of a channel.
MOST_SUMS = 512


@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """Holds some sums `values` (C, n) of each channel, and the activation of each, a function of (C, n)."""

    values: Array
    activation: Callable[[Array], Array]

    @classmethod
    def of(
        cls,
        sums: Array,
        activation: Expression,
        *,
        stretch: float,
        step: Array | float = 1.0,
        bias: Array | float = 0.0,
    ) -> "Sums":
        """Take some of the sums (N, C, *S), moved away from their middle by the factor `stretch`.

        A sum `a` stands for the real number a · step + bias; both broadcast to (C, *S).
        """
        shape = sums.shape[1:]
        by_channel = np.moveaxis(sums, 1, 0).reshape(shape[0], -1)
        chosen = np.arange(by_channel.shape[1])
        if len(chosen) > MOST_SUMS:  # a stride could leave positions out
            chosen = np.random.default_rng(0).choice(chosen, MOST_SUMS, replace=False)
        values = by_channel[:, chosen].astype(np.float64)
        middle = (by_channel.max(axis=1) + by_channel.min(axis=1)) / 2
        values = middle[:, None] + (values - middle[:, None]) * stretch
        positions = int(np.prod(shape[1:]))
        places = (np.arange(shape[0])[:, None] * positions + chosen % positions).ravel()
        function = activation.at(shape, places)
        steps, offsets = (np.broadcast_to(one, shape).ravel()[places] for one in (step, bias))

        def applied(a: Array) -> Array:
            real = a.ravel() * steps + offsets
            return function(real[:, None]).reshape(a.shape)

        return cls(values=values, activation=applied)

    @cached_property
    def _meant(self) -> Array:
        return self.activation(self.values)

    def error(self, first: Array, size: Array, count: int) -> Array:
        """Return the mean squared error (C,) of activations that are looked up.

        The table has `count` columns of `size` (C,), the first of which is in the middle at `first` (C,).
        """
        place = np.floor((self.values - first[:, None]) / size[:, None] + 0.5)
        turns = np.floor(place / count)  # several times as fast as numpy's divmod
        column = place - turns * count
        looked_up = self.activation(first[:, None] + column * size[:, None])
        odd = np.floor(turns / 2) != turns / 2
        if odd.any():
            ends = np.broadcast_to(first[:, None], place.shape)
            low, high = self.activation(ends), self.activation(ends + size[:, None] * (count - 1))
            looked_up = np.where(odd, low + high - looked_up, looked_up)
        error: Array = np.square(looked_up - self._meant).mean(axis=1)
        return error

    def ends(self, widest: Sequence[Array]) -> tuple[Array, Array]:
        """Return lower and upper ends (CUTS, C) that cut shares of the sums off, within the `widest`."""
        ordered = np.sort(self.values, axis=1)
        last = ordered.shape[1] - 1
        lows = [np.maximum(ordered[:, int(cut * last)], widest[0]) for cut in CUTS[1:]]
        highs = [np.minimum(ordered[:, last - int(cut * last)], widest[1]) for cut in CUTS[1:]]
        return np.stack([widest[0], *lows]), np.stack([widest[1], *highs])

    def outside(self, low: Array, high: Array) -> Array:
        """Return the share (C,) of the sums outside of the ends (C,)."""
        beyond = (self.values < low[:, None]) | (self.values > high[:, None])
        share: Array = beyond.mean(axis=1)
        return share


class Reached(NamedTuple):
    """Says that a window should begin at `minimum` (C,), span `span` (C,) and have at least `bits` bits."""

    minimum: Array
    span: Array
    bits: int


def least_span(sums: Sums, rounding_bits: int) -> Array:
    """Return the span (C,) of the windows of least error, if they can have any span."""
    count = 2**rounding_bits
    whole = sums.values.min(axis=1), sums.values.max(axis=1)

    def error(low: Array, high: Array) -> Array:
        size = np.maximum(high - low, np.finfo(np.float64).tiny) / (count - 0.5)
        return np.where(sums.outside(low, high) <= MOST_CUT, sums.error(low, size, count), np.inf)

    low, high = _least(error, *sums.ends(whole))
    return high - low


@dataclass(frozen=True, kw_only=True, eq=False)
class Placing:
    """Places the windows of a layer, which keep `rounding_bits` of at most `widest` bits.

    Gains fill the windows, up to `gains` (C,).
    """

    rounding_bits: int
    gains: Array
    widest: int

    def filled_width(self, span: Array) -> int:
        """Return the width, at most `widest`, at which columns are the finest for channels of `span` (C,)."""
        kept, greatest = self.rounding_bits, int(span.max())
        widths = range(kept + 2, self.widest + 1)
        fitting = [bits for bits in widths if greatest <= room(bits, kept, proved=False)]

        def coarseness(bits: int) -> float:
            gain = np.minimum(filling_gains(span, bits, kept, proved=False), self.gains)
            return float(np.square(2.0**bits / (gain * np.maximum(span, 1))).sum())

        return min(fitting, key=coarseness, default=self.widest)

    def best(self, sums: Sums, widest: Sequence[Array], held: Sequence[Array]) -> Reached | None:
        """Return the windows of least error that lie within the ends `widest` and contain those in `held`.

        They cut at most a share of `MOST_CUT` off the accumulators `sums`. Return None if they would have too
        many bits. Ends are pairs of (C,).
        """
        lows, highs = sums.ends(widest)
        lows, highs = np.floor(np.minimum(lows, held[0])), np.ceil(np.maximum(highs, held[1]))
        found, least = None, np.inf
        narrowest = float((highs.min(axis=0) - lows.max(axis=0)).max())
        for bits in range(self.rounding_bits + 2, self.widest + 1):
            most = room(bits, self.rounding_bits, proved=False)
            if most < narrowest:  # the error would be infinite
                continue
            error = partial(self._error, sums, held, bits)
            low, high = _least(error, lows, highs, most)
            total = float(error(low, high).sum())
            if total < least:
                least, found = total, Reached(low.astype(np.int64), (high - low).astype(np.int64), bits)
        return found

    def _error(self, sums: Sums, held: Sequence[Array], bits: int, low: Array, high: Array) -> Array:
        """Return the error (C,) of windows of `bits` bits that hold the accumulators from `low` to `high`.

        It is infinite if they cut too much off, are too wide, or do not contain the ends `held`.
        """
        span, most = high - low, room(bits, self.rounding_bits, proved=False)
        gain = np.minimum(filling_gains(span, bits, self.rounding_bits, proved=False), self.gains)
        first = low - (most / gain - span) / 2
        size = 2.0 ** dropped_bits(bits, self.rounding_bits) / gain
        within = (sums.outside(low, high) <= MOST_CUT) & (span <= most)
        within &= (low <= held[0]) & (high >= held[1])
        return np.where(within, sums.error(first, size, 2**self.rounding_bits), np.inf)


def _least(
    error: Callable[[Array, Array], Array], lows: Array, highs: Array, most: float = np.inf
) -> tuple[Array, Array]:
    """Return those of the ends `lows` and `highs` (n, C) that have the least `error` (C,) for each channel.

    The upper end is chosen first, each with the lowest end. A lower end is moved up where the upper one is
    more than `most` away.
    """
    rows = np.arange(lows.shape[1])
    high = highs[np.argmin([error(np.maximum(lows[0], one - most), one) for one in highs], axis=0), rows]
    tried = np.maximum(lows, high - most)
    return tried[np.argmin([error(one, high) for one in tried], axis=0), rows], high
