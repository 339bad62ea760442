"""Chooses the window of each lookup, and the gains that fill it.

The window of a lookup are the 2^bits accumulators that its table holds. A rounded lookup keeps some high bits
of an accumulator, so that its window has 2^rounding_bits steps. A step should be small where accumulators
are. Two things help, and cost no lookup:

- A *gain*: the weights of a channel are multiplied by an integer, so that narrow channels fill the window.
- A window that is narrower than the worst image needs. On the torus a lookup has a value for every
  accumulator: its table repeats at the distance of a window, each time with the opposite sign. Entries are
  counted from the middle of the activation's range, so that the table is mirrored there: just outside the
  window, most activations are still right. The integer network computes these values too, so that it equals
  the circuit for every image.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fheconv.basics.arrays import Array
from fheconv.basics.errors import AccumulatorOverflowError
from fheconv.networks.bounds import FREE_BITS

# Concrete supports lookups of at most this many bits.
LOOKUP_LIMIT = 16
# The greatest width of windows that need no proof, unless a width is asked for. Before rounded lookups, more
# bits than the lookup keeps cost nothing as such, but Concrete has trouble with values of 14 bits and more.
WIDEST = 13
# Noise limits the weights before lookups of at most so many bits. With 6, lookups of 6 bits gave LeNet-5 a
# greater error than those of 5, and cost as much as with 5.
MOST_QUIET = 5
# A window outside which a greater share of a channel's accumulators lies is too narrow.
MOST_CUT = 0.02


class Budget(NamedTuple):
    """Limits the span of accumulators to `steps`, and rounds to `rounding_bits` before the lookup.

    `proved` says that no image may exceed the span. Otherwise it is the span of what calibration reaches.
    """

    steps: int
    rounding_bits: int | None = None
    proved: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """Describes the accumulators that a lookup of `bits` bits covers: `span` steps from `minimum`, both (C,).

    Accumulators are multiples of `gain` (C,). They are rounded to `rounding_bits` before the lookup (None:
    not rounded). `proved` says that no image leads outside.
    """

    minimum: Array
    span: Array
    bits: int
    rounding_bits: int | None
    proved: bool
    gain: Array | int = 1

    @property
    def dropped_bits(self) -> int:
        """The number of low bits that are rounded away."""
        return dropped_bits(self.bits, self.rounding_bits)

    @property
    def start(self) -> Array:
        """The accumulator of the first column, (C,).

        Half of the unused columns lie at each end, because noise can move an accumulator beyond either end.
        """
        below = 1 << (self.dropped_bits - 1) if self.dropped_bits and self.proved else 0
        return self.minimum - below - (self.room - self.span) // 2

    @property
    def room(self) -> int:
        """The greatest span that the window can have."""
        return room(self.bits, self.rounding_bits, proved=self.proved)


def dropped_bits(bits: int, rounding_bits: int | None) -> int:
    """Return how many low bits are rounded away from accumulators of `bits` bits."""
    return 0 if rounding_bits is None else max(bits - rounding_bits, 0)


def room(bits: int, rounding_bits: int | None, *, proved: bool = True) -> int:
    """Return the greatest span that a window of `bits` bits can have.

    Some of the 2^bits values stay free when accumulators are rounded to `rounding_bits`: rounding half up can
    carry a value above the top, and noise moves a value by less than a step before it is rounded. A value
    that leaves the table at one end comes back at the other, with the opposite sign. So a proved window has a
    free step at each end. In another window, it is enough that no value within it is rounded above the top.
    """
    dropped = dropped_bits(bits, rounding_bits)
    free = (2 << dropped if proved else 1 << (dropped - 1)) if dropped else 0
    return 2**bits - 1 - free


def width(name: str, span: int, rounding_bits: int | None, *, proved: bool = True) -> int:
    """Return the least width whose window can have the `span`.

    Raises `AccumulatorOverflowError` above the width that Concrete supports.
    """
    for bits in range(max(span.bit_length(), 1), LOOKUP_LIMIT + 1):
        if span <= room(bits, rounding_bits, proved=proved):
            return bits
    most = room(LOOKUP_LIMIT, rounding_bits, proved=proved)
    raise AccumulatorOverflowError(
        f"Layer {name!r} spans {span} accumulator steps, more than the {most} that the {LOOKUP_LIMIT} bits "
        "of a lookup hold.",
        layer=name,
        value=span,
        limit=most,
    )


def most_norm(taps: int, rounding_bits: int) -> float:
    """Return the norm ‖q‖₂ that the integer weights of a sum may have, if noise is to cost nothing.

    Where there are many `taps`, it is the norm of weights of 1. Lookups of more than `MOST_QUIET` bits are
    dear anyway, and what they tell apart should not be lost to coarse weights.
    """
    return max(2.0 ** (FREE_BITS - min(rounding_bits, MOST_QUIET)), math.sqrt(taps))


def quiet_gains(norm_bits: Array, rounding_bits: int) -> Array:
    """Return for each channel the greatest integer by which weights may grow before noise costs something.

    `norm_bits` (C,) is log2 of the norm by which a sum multiplies the noise of its summands. A gain
    multiplies the norm, and Concrete takes larger parameters above `FREE_BITS`.
    """
    return np.maximum(2.0 ** (FREE_BITS - rounding_bits - norm_bits), 1).astype(np.int64)


def filling_gains(span: Array, bits: int, rounding_bits: int | None, *, proved: bool) -> Array:
    """Return for each channel the greatest integer by which its `span` (C,) may grow within `bits` bits.

    It is at most one column of the table, because a larger gain would not make a step smaller.
    """
    dropped = dropped_bits(bits, rounding_bits)
    most = room(bits, rounding_bits, proved=proved)
    return np.clip(most // np.maximum(span, 1), 1, 2**dropped)
