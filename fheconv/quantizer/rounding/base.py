"""Defines what all methods of rounding weights share: signature, result, and the error to minimise.

For one filter w, and the second moment H of its inputs, the error of integers q with scale s is
E(q, s) = (w − s·q) H (w − s·q)ᵀ, the mean squared error of the layer's outputs.
"""

from typing import NamedTuple, Protocol

import numpy as np
import scipy.linalg

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
        moment: "Array | Moment | None",
        ranges: Array,
        budget: int | None,
        finest: Array | None = None,
        free: Array | None = None,
    ) -> IntegerWeight:
        """Return integers of `bits` bits, and scales, for `weight` (K, n).

        `moment` is H (n, n), damped already if it is a `Moment`, None if the inputs are not known. `ranges`
        (n,) is the growth of the accumulator's span for one step of each weight. `budget` is the greatest
        allowed span, None for any. `finest` (K,) are the least scales. `free` (K, n) is a mask of the weights
        that may differ from 0, None for all. A method uses the arguments that it needs.
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


class Moment:
    """Holds the second moment H (n, n) of the inputs of filters, damped: `values`.

    It is the identity if `moment` is None or zero. What is derived from it is computed once.
    """

    def __init__(self, moment: Array | None, taps: int) -> None:
        variance = 0.0 if moment is None else float(np.trace(moment)) / taps
        if moment is None or variance <= 0:
            self.values: Array = np.eye(taps)
        else:
            self.values = moment + np.eye(taps) * DAMPING * variance
        self._factors: dict[bytes, tuple[Array, Array]] = {}

    @classmethod
    def of(cls, moment: "Array | Moment | None", taps: int) -> "Moment":
        """Return `moment`, damped if it is an array."""
        return moment if isinstance(moment, Moment) else cls(moment, taps)

    def inverse_factor(self, last: Array | None = None) -> tuple[Array, Array]:
        """Return an order of taps, and the upper triangular U with UᵀU the inverse of H in that order.

        The tap with the largest inputs comes first, but those of the mask `last` (n,) after all others.
        """
        last = np.ones(len(self.values), bool) if last is None else last
        if last.tobytes() not in self._factors:
            order = np.lexsort((-np.diag(self.values), last))
            h = self.values[np.ix_(order, order)]
            # With rows and columns in reverse order, the lower factor of H becomes an upper one, R with
            # RRᵀ = H.
            upper = scipy.linalg.cholesky(h[::-1, ::-1], lower=True)[::-1, ::-1]
            self._factors[last.tobytes()] = order, scipy.linalg.lapack.dtrtri(upper)[0]
        return self._factors[last.tobytes()]

    def errors(self, weight: Array, q: Array, scale: Array) -> Array:
        """Return E (K, S) of integers (K, S, n) at scales (K, S), for weights (K, n)."""
        # E does not depend on the order, so any factor will do.
        order, factor = next(iter(self._factors.values()), None) or self.inverse_factor()
        off: Array = (weight[:, None] - scale[:, :, None] * q).reshape(-1, len(order))[:, order].T
        squares = np.square(scipy.linalg.solve_triangular(factor, off, trans="T", overwrite_b=True))
        return squares.sum(axis=0).reshape(scale.shape)


def best_scales(weight: Array, q: Array, held: Array) -> Array:
    """Return the scales (K,) of least E for weights and integers (K, n); 0 if no positive scale reduces E.

    `held` (K, n) is q·H.
    """
    fit, wanted = np.einsum("kn,kn->k", held, q), np.einsum("kn,kn->k", held, weight)
    return np.divide(np.maximum(wanted, 0.0), fit, out=np.zeros(len(q)), where=fit > 0)
