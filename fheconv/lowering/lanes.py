"""Packs several images into one ciphertext, for networks without lookups."""

import math
from dataclasses import dataclass

import numpy as np

from fheconv.basics.arrays import Array


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """The packing of `count` images into one ciphertext: image i is shifted up by i·`bits` bits.

    Each image has its own lane of `bits` bits. Results lie between 0 and 2^bits − 1, so no lane borrows from
    another or carries into it.
    """

    count: int
    bits: int

    @classmethod
    def of(cls, count: int, result_bits: int) -> "Lanes":
        """Return lanes for results of `result_bits` bits. Constant results have 0 bits and take one bit."""
        return cls(count=count, bits=max(result_bits, 1))

    @property
    def steps(self) -> Array:
        """The factors (count,) by which a value is multiplied to put it into each lane: 2^(i·`bits`)."""
        return 1 << np.arange(self.count) * self.bits

    @property
    def every(self) -> int:
        """The sum of `steps`: a constant multiplied by it is added to every lane at once."""
        return int(self.steps.sum())

    def width(self, bits: int) -> int:
        """Return the width of all lanes together, for values of `bits` bits in each lane."""
        return bits + (self.count - 1) * self.bits

    def pack(self, values: Array, filler: int) -> Array:
        """Return the values (N, n) packed as (⌈N / count⌉, n). Lanes without an image hold `filler`."""
        rows = -(-len(values) // self.count)
        full = np.full((rows * self.count, values.shape[1]), filler, np.int64)
        full[: len(values)] = values
        return np.tensordot(full.reshape(rows, self.count, values.shape[1]), self.steps, axes=(1, 0))

    def unpack(self, results: Array, images: int) -> Array:
        """Return the results (images, n) that are packed in `results` (⌈images / count⌉, n)."""
        values = results[:, None] >> np.arange(self.count)[:, None] * self.bits
        if self.count > 1:
            values &= 2**self.bits - 1
        return values.reshape(len(results) * self.count, math.prod(results.shape[1:]))[:images]
