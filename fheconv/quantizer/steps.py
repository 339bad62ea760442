"""Chooses how fine the steps of accumulators are, together with the width of the windows they fill.

Two errors reach an activation: that of the rounded weights, which grows with the step of the accumulator, and
that of the columns of the table. Columns are powers of two steps wide, so that a span a little above a power
of two doubles them. Then coarser steps, whose span stays below, give the better activations.
"""

from typing import NamedTuple

import numpy as np

from fheconv.basics.arrays import Array
from fheconv.quantizer.windows import room

# The integer sums reach further than the float sums by about this factor.
HEADROOM = 1.05
# The weights that the greatest integer stands for are mostly so much smaller than the greatest weight.
CLIPPED = 0.8
# GPTQ lets about this share of the error remain that the nearest integers cause.
LEFT = 0.3
# So many of the best widths are tried, if the expected error of each is at most so many times the least.
MOST_TRIED, MUCH_WORSE = 2, 2.0
# Before sums of more taps, only the best is tried, because rounding so many weights takes long.
MANY_TAPS = 1000


class Aim(NamedTuple):
    """Says that accumulators should have no finer real steps than `finest` (C,), and span at most `most`."""

    finest: Array
    most: int


def aims(
    spans: Array,
    quiet: Array,
    usual: Array,
    variance: Array,
    rounding_bits: int,
    widest: int,
    taps: int,
) -> list[Aim]:
    """Return what to try before lookups that keep `rounding_bits` of at most `widest` bits, the best first.

    All arrays are (C,). `spans` are the real spans of the windows, `quiet` the finest steps whose noise costs
    nothing, and `usual` the steps at which weights have their greatest integers. With steps of size s, the
    sums err by s²/12 times `variance`. Filters have up to so many `taps`.
    """
    found, tiny = [], float(np.finfo(np.float64).tiny)
    for bits in range(rounding_bits + 2, widest + 1):
        most, in_column = room(bits, rounding_bits, proved=False), 2.0 ** (bits - rounding_bits)
        finest = np.maximum(spans * HEADROOM / most, quiet)
        steps = np.maximum(finest, CLIPPED * usual)
        with np.errstate(over="ignore"):  # numbers that are too great are as good as infinite ones
            gain = steps * np.minimum(most / np.maximum(spans, tiny), 1 / np.maximum(quiet, tiny))
            columns = in_column * steps / np.clip(np.floor(gain), 1, in_column)
            error = float((columns**2 + LEFT * variance * steps**2).sum())
        found.append((error, Aim(finest, most)))
    found.sort(key=lambda one: one[0])
    most = MOST_TRIED if taps <= MANY_TAPS else 1
    return [aim for error, aim in found[:most] if error <= MUCH_WORSE * found[0][0]]
