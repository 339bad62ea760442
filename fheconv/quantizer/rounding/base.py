"""What the methods of rounding weights share: their signature, what they return, what they minimise.

For one filter w, and the second moment H of the inputs it meets, the error of integers q with scale s is
E(q, s) = (w − s·q) H (w − s·q)ᵀ, the mean squared error of what the layer computes.
"""

from typing import NamedTuple, Protocol

import numpy as np

from fheconv.basics.arrays import Array

# What is added to the diagonal of H, as a share of its mean: inputs that calibration never saw still count.
DAMPING = 0.01


class IntegerWeight(NamedTuple):
    """Integers `values` (int64) and scales (K,) with weight ≈ scale·values; `range` is their data type's."""

    values: Array
    scale: Array
    range: tuple[int, int]


class Rounding(Protocol):
    """A method of rounding K filters that read the same n inputs."""

    def __call__(
        self, weight: Array, bits: int, moment: Array | None, ranges: Array, budget: int | None
    ) -> IntegerWeight:
        """Return integers of `bits` bits, and scales, for `weight` (K, n).

        `moment` is H (n, n), None if nothing is known of the inputs; `ranges` (n,) how many steps the
        accumulator gains for one step of each weight, and `budget` how many it may span, None for any number.
        A method looks at what it needs.
        """


def greatest_integer(bits: int) -> int:
    """Return the greatest of the symmetric integers of `bits` bits; of one bit 1."""
    return max(2 ** (bits - 1) - 1, 1)


def exact(weight: Array, bits: int) -> IntegerWeight | None:
    """Return weights (K, …) that are integers of `bits` bits already, signed or unsigned; None for others."""
    if weight.dtype.kind in "iub":
        for low, high in ((-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), (0, 2**bits - 1)):
            if low <= weight.min() and weight.max() <= high:
                return IntegerWeight(weight.astype(np.int64), np.ones(len(weight)), (low, high))
    return None


def damped(moment: Array | None, taps: int) -> Array:
    """Return H, (taps, taps), to minimise by. Of inputs that tell nothing all count alike."""
    variance = 0.0 if moment is None else float(np.trace(moment)) / taps
    if moment is None or variance <= 0:
        return np.eye(taps)
    return moment + np.eye(taps) * DAMPING * variance


def output_error(weight: Array, q: Array, scale: Array, moment: Array) -> Array:
    """Return E of each row (R,), for weights and integers (R, n), scales (R,) and H (n, n)."""
    error: Array = weight - scale[:, None] * q
    return np.einsum("rn,rn->r", error @ moment, error)


def best_scale(weight: Array, q: Array, moment: Array) -> float:
    """Return the scale of least E for the integers of one row (n,), 0 if they are of no use."""
    fit = float(q @ moment @ q)
    return max(float(weight @ moment @ q) / fit, 0.0) if fit > 0 else 0.0
