"""Rounds weights so that outputs change little, by GPTQ (Frantar et al. 2022)."""

import numpy as np
import scipy.linalg

from fheconv.basics.arrays import Array
from fheconv.quantizer.rounding.base import IntegerWeight, best_scale, damped, greatest_integer, output_error

# The number of scales that are tried. At the finest, a quarter of the greatest weight becomes the greatest
# integer; at the coarsest, the greatest weight becomes little more than a half.
SCALES = 40


def round_gptq(
    weight: Array,
    bits: int,
    moment: Array | None,
    ranges: Array | None = None,
    budget: int | None = None,
    finest: Array | None = None,
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

    Taps are rounded one by one, the tap with the largest inputs first. The later taps compensate each error.
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
    """Return for each row (K, n) the candidate (K, S, n), with scales (K, S), of least error."""
    filters, tried, taps = candidates.shape
    rows = np.repeat(weight, tried, axis=0)
    error = output_error(rows, candidates.reshape(-1, taps), scale.ravel(), moment).reshape(filters, tried)
    return candidates[np.arange(filters), error.argmin(axis=1)]
