"""Lanes: several images in one ciphertext of a network without lookups."""

import math
from dataclasses import dataclass

import numpy as np

from fheconv.basics.arrays import Array


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """`count` images ride in one: image i is shifted up by i·`bits`.

    Results lie between 0 and 2^bits − 1, so that no lane borrows from or carries into another.
    """

    count: int
    bits: int

    @classmethod
    def of(cls, count: int, result_bits: int) -> "Lanes":
        """Return lanes for results of so many bits; those that are constant, of none, take one bit."""
        return cls(count=count, bits=max(result_bits, 1))

    @property
    def steps(self) -> Array:
        """What one step of each lane is worth, (count,)."""
        return 1 << np.arange(self.count) * self.bits

    @property
    def every(self) -> int:
        """What one step of all lanes at once is worth."""
        return int(self.steps.sum())

    def width(self, bits: int) -> int:
        """Return the width of values of so many bits, all lanes together."""
        return bits + (self.count - 1) * self.bits

    def pack(self, values: Array, filler: int) -> Array:
        """Return (⌈N / count⌉, n) of the values (N, n), with `filler` for images that there are not."""
        rows = -(-len(values) // self.count)
        full = np.full((rows * self.count, values.shape[1]), filler, np.int64)
        full[: len(values)] = values
        return np.tensordot(full.reshape(rows, self.count, values.shape[1]), self.steps, axes=(1, 0))

    def unpack(self, results: Array, images: int) -> Array:
        """Return the results (images, n) that ride in (⌈images / count⌉, n)."""
        values = results[:, None] >> np.arange(self.count)[:, None] * self.bits
        if self.count > 1:
            values &= 2**self.bits - 1
        return values.reshape(len(results) * self.count, math.prod(results.shape[1:]))[:images]
