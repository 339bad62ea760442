"""Integer weights that compute nearly what the float weights do: GPTQ (Frantar et al. 2022)."""

import numpy as np
import scipy.linalg

from fheconv.basics.arrays import Array
from fheconv.quantizer.rounding.base import IntegerWeight, best_scale, damped, greatest_integer, output_error

# How many scales are tried: from a quarter of the one at which a filter's greatest weight becomes the
# greatest integer, to one at which it is little more than a half.
SCALES = 40


def round_gptq(
    weight: Array,
    bits: int,
    moment: Array | None,
    ranges: Array | None = None,
    budget: int | None = None,
) -> IntegerWeight:
    """Return integers of `bits` bits and scales of small output error.

    A `Rounding` without a budget. Of a grid of scales, each with the integers of GPTQ and with the nearest
    ones, the best is taken, and then the best scale for its integers. One bit is {−1, 0, 1}.
    """
    weight = weight.astype(np.float64)
    greatest, h = greatest_integer(bits), damped(moment, weight.shape[1])
    scale = scale_grid(weight, greatest)
    # What one tap leaves to the others may be more than they can take up.
    nearest = np.clip(np.rint(weight[:, None] / scale[:, :, None]), -greatest, greatest).astype(np.int64)
    candidates = np.concatenate([compensated(weight, scale, h, greatest), nearest], axis=1)
    q = best_rows(weight, candidates, np.tile(scale, 2), h)
    fitted = np.array([best_scale(w, row, h) for w, row in zip(weight, q, strict=True)])
    return IntegerWeight(q, fitted, (-greatest, greatest))


def scale_grid(weight: Array, greatest: int, finest: Array | None = None) -> Array:
    """Return scales (K, S) to try for rows (K, n), none below `finest` (K,)."""
    largest = np.abs(weight).max(axis=1)
    largest = np.where(largest > 0, largest, 1.0)
    first = 0.25 * largest / greatest
    if finest is not None:
        first = np.clip(finest, first, largest)
    grid = np.geomspace(first, 1.6 * largest, SCALES, axis=1)
    return np.concatenate([grid, np.maximum(largest / greatest, first)[:, None]], axis=1)


def compensated(weight: Array, scale: Array, moment: Array, greatest: int) -> Array:
    """Return the integers (K, S, n) of each row (K, n) at each of its scales (K, S).

    They are rounded tap by tap, the one with the most input first; each error is made up for by the others.
    """
    order = np.argsort(-np.diag(moment), kind="stable")
    inverse = scipy.linalg.inv(moment[np.ix_(order, order)])
    factor = scipy.linalg.cholesky((inverse + inverse.T) / 2)
    left = np.repeat(weight[:, None, order], scale.shape[1], axis=1)
    q = np.zeros(left.shape, np.int64)
    for tap in range(left.shape[2]):
        q[..., tap] = np.clip(np.rint(left[..., tap] / scale), -greatest, greatest)
        error = (left[..., tap] - scale * q[..., tap]) / factor[tap, tap]
        left[..., tap + 1 :] -= error[..., None] * factor[tap, tap + 1 :]
    restored = np.empty_like(q)
    restored[..., order] = q
    return restored


def best_rows(weight: Array, candidates: Array, scale: Array, moment: Array) -> Array:
    """Return for each row (K, n) that of its candidates (K, S, n), with scales (K, S), of least error."""
    filters, tried, taps = candidates.shape
    rows = np.repeat(weight, tried, axis=0)
    error = output_error(rows, candidates.reshape(-1, taps), scale.ravel(), moment).reshape(filters, tried)
    return candidates[np.arange(filters), error.argmin(axis=1)]
