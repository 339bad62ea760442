"""Makes lookup tables.

For every accumulator that can enter it, a table holds the integer of the activation. The table includes the
layer's scale, bias and zero-points, BatchNorm, the activation function, and the scale of its integers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fheconv.basics.arrays import Array, along_channels, frozen
from fheconv.basics.errors import AccumulatorOverflowError, CalibrationError
from fheconv.networks.expression import Expression
from fheconv.networks.integers import Lookup
from fheconv.networks.quantization import Quantization

# Concrete supports lookups of at most this many bits.
LOOKUP_LIMIT = 16


def reserve(bits: int, rounding_bits: int | None) -> int:
    """Return how many of 2^bits values must stay free when accumulators are rounded to `rounding_bits`.

    Rounding half up can carry a value above the top, and noise moves a value by less than a step before it is
    rounded. A value that leaves the table at one end comes back at the other, with the opposite sign.
    """
    dropped = bits - rounding_bits if rounding_bits is not None else 0
    return 2 << dropped if dropped > 0 else 0


def width(name: str, span: int, rounding_bits: int | None) -> int:
    """Return the least width that holds 0 to `span`, and the values that rounding needs free.

    Raises `AccumulatorOverflowError` above the width that Concrete supports.
    """
    for bits in range(max(span.bit_length(), 1), LOOKUP_LIMIT + 1):
        if span + reserve(bits, rounding_bits) < 2**bits:
            return bits
    most = 2**LOOKUP_LIMIT - 1 - reserve(LOOKUP_LIMIT, rounding_bits)
    raise AccumulatorOverflowError(
        f"Layer {name!r} spans {span} accumulator steps, more than the {most} that the {LOOKUP_LIMIT} bits "
        "of a lookup hold; quantize with accumulator_bits, or with fewer weight_bits, activation_bits or "
        "input_bits.",
        layer=name,
        value=span,
        limit=most,
        remedy=f"accumulator_bits={LOOKUP_LIMIT} or less",
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """Describes the accumulators that a lookup of `bits` bits covers: `span` steps from `minimum`, both (C,).

    Accumulators are rounded to `rounding_bits` before the lookup (None: not rounded). `proved` says that no
    image leads outside.
    """

    minimum: Array
    span: Array
    bits: int
    rounding_bits: int | None
    proved: bool

    @property
    def dropped_bits(self) -> int:
        """The number of low bits that are rounded away."""
        return 0 if self.rounding_bits is None else max(self.bits - self.rounding_bits, 0)

    @property
    def start(self) -> Array:
        """The accumulator of the first column, (C,).

        Half of the unused columns lie at each end, because noise can move an accumulator beyond either end.
        """
        below = 1 << (self.dropped_bits - 1) if self.dropped_bits else 0
        return (
            self.minimum
            - below
            - (2**self.bits - 1 - reserve(self.bits, self.rounding_bits) - self.span) // 2
        )


def lookup(
    name: str, activation: Expression, output: Quantization, window: Window, *, step: Array, bias: Array
) -> Lookup:
    """Return the tables of a layer whose accumulator `a` means the real number a · step + bias.

    `step` and `bias` have the layer's shape (C, *S). Values with equal step, bias and constants share a
    table.

    Raises `CalibrationError` if the activation gives NaN.
    """
    shape = step.shape
    bits, dropped, minimum = window.bits, window.dropped_bits, window.start
    start = np.broadcast_to(along_channels(minimum, len(shape)), shape)
    offset = bias + step * start
    constants = [np.broadcast_to(array, shape) for array in activation.arrays()]
    keys = np.stack([values.ravel() for values in (step, offset, *constants)])
    _, first, which = np.unique(keys, axis=1, return_index=True, return_inverse=True)
    # The accumulators that round to a column are on average half a step lower than it.
    columns = np.arange(2.0 ** (bits - dropped)) * 2.0**dropped - (0.5 if dropped else 0.0)
    real = keys[0, first, None] * columns + keys[1, first, None]
    values = activation.at(shape, first)(real)
    if np.isnan(values).any():
        row, column = np.argwhere(np.isnan(values))[0]
        raise CalibrationError(
            f"The activation {activation} of layer {name!r} is not a number at {real[row, column]:g}, which "
            "its accumulator can reach; clamp what enters it."
        )
    return Lookup(
        tables=frozen(output.nearest(values)),
        which=frozen(compressed(which.reshape(shape))),
        minimum=frozen(minimum),
        bits=bits,
        dropped_bits=dropped,
        output=output,
        proved=window.proved,
    )


def compressed(values: Array) -> Array:
    """Return (C, *S) as (C, *1) if every channel has a single value."""
    first = along_channels(values.reshape(len(values), -1)[:, 0], values.ndim)
    return first if (values == first).all() else values


class Budget(NamedTuple):
    """Limits the span of accumulators to `steps`, and rounds to `rounding_bits` before the lookup."""

    steps: int
    rounding_bits: int | None = None
