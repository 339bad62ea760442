"""Rounds weights so that outputs change little, by GPTQ (Frantar et al. 2022)."""

import numpy as np
import scipy.linalg

from fheconv.basics.arrays import Array
from fheconv.quantizer.rounding.base import IntegerWeight, best_scales, damped, greatest_integer, output_error

# The number of scales that are tried. At the finest, a quarter of the greatest weight becomes the greatest
# integer; at the coarsest, the greatest weight becomes little more than a half. Filters of many taps try
# fewer: the product of scales and taps is limited.
SCALES, FEWEST_SCALES, MOST_PRODUCTS = 40, 12, 12_000
# The errors of this many taps are compensated in the other taps together, because matrix products are fast.
BLOCK = 64


def round_gptq(
    weight: Array,
    bits: int,
    moment: Array | None,
    ranges: Array | None = None,
    budget: int | None = None,
    finest: Array | None = None,
    free: Array | None = None,
) -> IntegerWeight:
    """Return integers of `bits` bits and scales of small output error.

    This is a `Rounding` without a budget. It tries a grid of scales, each with the integers of GPTQ and with
    the nearest integers. It takes the best, and then the best scale for its integers. One bit means {−1, 0,
    1}.
    """
    weight = weight.astype(np.float64)
    greatest, h = greatest_integer(bits), damped(moment, weight.shape[1])
    scale = scale_grid(weight, greatest, finest)
    # The nearest integers are tried too, because the later taps cannot always compensate the errors of GPTQ.
    nearest = np.clip(np.rint(weight[:, None] / scale[:, :, None]), -greatest, greatest).astype(np.int64)
    candidates = np.concatenate([compensated(weight, scale, h, greatest, free), nearest], axis=1)
    q = best_rows(weight, candidates, np.tile(scale, 2), h)
    return IntegerWeight(q, best_scales(weight, q, h), (-greatest, greatest))


def scale_grid(weight: Array, greatest: int, finest: Array | None = None) -> Array:
    """Return scales (K, S) to try for rows (K, n), none below `finest` (K,)."""
    largest = np.abs(weight).max(axis=1)
    largest = np.where(largest > 0, largest, 1.0)
    first = 0.25 * largest / greatest
    if finest is not None:
        first = np.clip(finest, first, largest)
    count = int(np.clip(MOST_PRODUCTS // max(weight.shape[1], 1), FEWEST_SCALES, SCALES))
    grid = np.geomspace(first, 1.6 * largest, count, axis=1)
    return np.concatenate([grid, np.maximum(largest / greatest, first)[:, None]], axis=1)


def compensated(
    weight: Array, scale: Array, moment: Array, greatest: int, free: Array | None = None
) -> Array:
    """Return the integers (K, S, n) of each row (K, n) at each of its scales (K, S).

    Taps are rounded one by one, the tap with the largest inputs first. The later taps compensate each error.
    Taps that some row must leave at 0, by the mask `free`, come before all others: so the taps of all rows
    compensate what they get beside 0.
    """
    free = np.ones(weight.shape, bool) if free is None else free
    order = np.lexsort((-np.diag(moment), free.all(axis=0)))
    factor = _inverse_factor(moment[np.ix_(order, order)])
    # Taps come first, so that one tap of all rows and scales lies together in memory.
    left, may = (np.repeat(values[:, order].T, scale.shape[1], axis=1) for values in (weight, free))
    steps, q = scale.ravel(), np.zeros(left.shape)
    taps = len(left)
    for start in range(0, taps, BLOCK):
        end = min(start + BLOCK, taps)
        errors = np.empty((end - start, len(steps)))
        for tap in range(start, end):
            np.clip(np.rint(left[tap] / steps), -greatest, greatest, out=q[tap])
            q[tap] *= may[tap]
            errors[tap - start] = (left[tap] - steps * q[tap]) / factor[tap, tap]
            left[tap + 1 : end] -= factor[tap, tap + 1 : end, None] * errors[tap - start]
        left[end:] -= factor[start:end, end:].T @ errors
    restored = np.empty((len(steps), taps), np.int64)
    restored[:, order] = q.T
    return restored.reshape(*scale.shape, taps)


def _inverse_factor(moment: Array) -> Array:
    """Return the upper triangular U with UᵀU the inverse of H (n, n)."""
    # With rows and columns in reverse order, the lower factor of H becomes an upper one, R with RRᵀ = H.
    upper = scipy.linalg.cholesky(moment[::-1, ::-1], lower=True)[::-1, ::-1]
    inverse: Array = scipy.linalg.solve_triangular(upper, np.eye(len(upper)))
    return inverse


def best_rows(weight: Array, candidates: Array, scale: Array, moment: Array) -> Array:
    """Return for each row (K, n) the candidate (K, S, n), with scales (K, S), of least error."""
    filters, tried, taps = candidates.shape
    rows = np.repeat(weight, tried, axis=0)
    error = output_error(rows, candidates.reshape(-1, taps), scale.ravel(), moment).reshape(filters, tried)
    return candidates[np.arange(filters), error.argmin(axis=1)]
