"""Defines what all methods of rounding weights share: signature, result, and the error to minimise.

For one filter w, and the second moment H of its inputs, the error of integers q with scale s is
E(q, s) = (w − s·q) H (w − s·q)ᵀ, the mean squared error of the layer's outputs.
"""

from typing import NamedTuple, Protocol

import numpy as np

from fheconv.basics.arrays import Array

# This share of the mean of the diagonal of H is added to it, so that inputs without calibration data count.
DAMPING = 0.01


class IntegerWeight(NamedTuple):
    """Holds integers `values` (int64), scales (K,) with weight ≈ scale·values, and the data type's range."""

    values: Array
    scale: Array
    range: tuple[int, int]


class Rounding(Protocol):
    """Rounds K filters that read the same n inputs, or some of these."""

    def __call__(
        self,
        weight: Array,
        bits: int,
        moment: Array | None,
        ranges: Array,
        budget: int | None,
        finest: Array | None = None,
        free: Array | None = None,
    ) -> IntegerWeight:
        """Return integers of `bits` bits, and scales, for `weight` (K, n).

        `moment` is H (n, n), None if the inputs are not known. `ranges` (n,) is the growth of the
        accumulator's span for one step of each weight. `budget` is the greatest allowed span, None for any.
        `finest` (K,) are the least scales. `free` (K, n) is a mask of the weights that may differ from 0,
        None for all. A method uses the arguments that it needs.
        """


def greatest_integer(bits: int) -> int:
    """Return the greatest symmetric integer of `bits` bits; it is 1 for one bit."""
    return max(2 ** (bits - 1) - 1, 1)


def exact(weight: Array, bits: int) -> IntegerWeight | None:
    """Return weights (K, …) that are integers of `bits` bits already, signed or unsigned; else None."""
    if weight.dtype.kind in "iub":
        for low, high in ((-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), (0, 2**bits - 1)):
            if low <= weight.min() and weight.max() <= high:
                return IntegerWeight(weight.astype(np.int64), np.ones(len(weight)), (low, high))
    return None


def damped(moment: Array | None, taps: int) -> Array:
    """Return the damped H, (taps, taps). It is the identity if `moment` is None or zero."""
    variance = 0.0 if moment is None else float(np.trace(moment)) / taps
    if moment is None or variance <= 0:
        return np.eye(taps)
    return moment + np.eye(taps) * DAMPING * variance


def output_error(weight: Array, q: Array, scale: Array, moment: Array) -> Array:
    """Return E of each row (R,), for weights and integers (R, n), scales (R,) and H (n, n)."""
    error: Array = weight - scale[:, None] * q
    return np.einsum("rn,rn->r", error @ moment, error)


def best_scales(weight: Array, q: Array, moment: Array) -> Array:
    """Return the scales (K,) of least E for weights and integers (K, n); 0 if no positive scale reduces E."""
    held = q @ moment
    fit, wanted = np.einsum("kn,kn->k", held, q), np.einsum("kn,kn->k", held, weight)
    return np.divide(np.maximum(wanted, 0.0), fit, out=np.zeros(len(q)), where=fit > 0)
