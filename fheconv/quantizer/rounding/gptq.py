"""Rounds weights so that outputs change little, by GPTQ (Frantar et al. 2022)."""

import numpy as np

from fheconv.basics.arrays import Array
from fheconv.quantizer.rounding.base import IntegerWeight, Moment, best_scales, greatest_integer

# The number of scales in a grid. At the finest, a quarter of the greatest weight becomes the greatest
# integer; at the coarsest, the greatest weight becomes little more than a half.
SCALES = 40
# For filters of many taps, fewer scales are tried: the product of scales and taps is limited.
MOST_PRODUCTS, FEWEST_SCALES = 12_000, 4
# The errors of this many taps are compensated in the other taps together, because matrix products are fast.
BLOCK = 64
# Rows are rounded together up to about this many products of scales and taps, so that they stay in the cache.
TOGETHER = 1_000_000


def round_gptq(
    weight: Array,
    bits: int,
    moment: Array | Moment | None,
    ranges: Array | None = None,
    budget: int | None = None,
    finest: Array | None = None,
    free: Array | None = None,
) -> IntegerWeight:
    """Return integers of `bits` bits and scales of small output error.

    This is a `Rounding` without a budget. It tries scales of a grid, each with the integers of GPTQ and with
    the nearest integers. It takes the best, and then the best scale for its integers. One bit means {−1, 0,
    1}.
    """
    weight = weight.astype(np.float64)
    greatest, h = greatest_integer(bits), Moment.of(moment, weight.shape[1])
    q = best_integers(weight, greatest, h, finest, free)
    return IntegerWeight(q, best_scales(weight, q, q @ h.values), (-greatest, greatest))


def best_integers(
    weight: Array, greatest: int, moment: Moment, finest: Array | None, free: Array | None
) -> Array:
    """Return the integers (K, n) of least E that GPTQ finds for some scale, or the nearest integers.

    The latter are tried too, because the later taps cannot always compensate the errors of GPTQ.
    """
    scale = _promising(weight, scale_grid(weight, greatest, SCALES, finest), moment, greatest, free)
    q, error = compensated(weight, scale, moment, greatest, free)
    if scale.shape[1] <= SCALES:  # of many taps, the later ones can
        scale = scale[:, :1]
    nearest = np.clip(np.rint(weight[:, None] / scale[:, :, None]), -greatest, greatest)
    other = moment.errors(weight, nearest, scale)
    better = other.min(axis=1) < error.min(axis=1)
    return np.where(better[:, None], best_rows(nearest, other).astype(np.int64), best_rows(q, error))


def affordable_scales(taps: int, fewest: int) -> int:
    """Return how many scales may be tried for filters of so many taps."""
    return max(MOST_PRODUCTS // max(taps, 1), fewest)


def scale_grid(weight: Array, greatest: int, count: int, finest: Array | None = None) -> Array:
    """Return `count` scales and one more (K, S) for rows (K, n), none below `finest` (K,)."""
    largest = np.abs(weight).max(axis=1)
    largest = np.where(largest > 0, largest, 1.0)
    first = 0.25 * largest / greatest
    if finest is not None:
        first = np.clip(finest, first, largest)
    grid = np.geomspace(first, 1.6 * largest, count, axis=1)
    return np.concatenate([grid, np.maximum(largest / greatest, first)[:, None]], axis=1)


def _promising(weight: Array, scale: Array, moment: Moment, greatest: int, free: Array | None) -> Array:
    """Return those of the scales (K, S) that promise the least E, fewer for rows (K, n) of many taps.

    GPTQ compensates what later taps have in common with a tap. So its E is near that of the nearest integers,
    if each tap has only the variance that later taps do not explain.
    """
    most = affordable_scales(weight.shape[1], FEWEST_SCALES)
    if most >= scale.shape[1]:
        return scale
    order, factor = moment.inverse_factor(None if free is None else free.all(axis=0))
    ordered, unexplained = weight[:, order], 1 / np.square(np.diag(factor))
    error = np.empty(scale.shape)
    for number, one in enumerate(scale.T[:, :, None]):
        off = ordered - one * np.rint(ordered / one).clip(-greatest, greatest)
        error[:, number] = np.square(off) @ unexplained
    return np.take_along_axis(scale, error.argsort(axis=1)[:, :most], axis=1)


def compensated(
    weight: Array, scale: Array, moment: Moment, greatest: int, free: Array | None = None
) -> tuple[Array, Array]:
    """Return the integers (K, S, n) of each row (K, n) at each of its scales (K, S), and their E (K, S).

    Taps are rounded one by one, the tap with the largest inputs first. The later taps compensate each error.
    Taps that some row must leave at 0, by the mask `free`, come before all others: so the taps of all rows
    compensate what they get beside 0.
    """
    free = np.ones(weight.shape, bool) if free is None else free
    order, factor = moment.inverse_factor(free.all(axis=0))
    scales, (rows, taps) = scale.shape[1], weight.shape
    integers, error = np.empty((rows, scales, taps), np.int64), np.empty(scale.shape)
    together = max(TOGETHER // (taps * scales), 1)
    for first in range(0, rows, together):
        some = slice(first, first + together)
        # Taps come first, so that one tap of all rows and scales lies together in memory.
        left, may = (np.repeat(values[some, order].T, scales, axis=1) for values in (weight, free))
        q, squares = _rounded_in_turn(left, may, scale[some].ravel(), factor, greatest)
        integers[some][..., order] = q.T.reshape(-1, scales, taps)
        error[some] = squares.reshape(-1, scales)
    return integers, error


def _rounded_in_turn(
    left: Array, may: Array, steps: Array, factor: Array, greatest: int
) -> tuple[Array, Array]:
    """Return the integers (n, R) of columns `left` (n, R), which are overwritten, and their E (R,).

    `may` (n, R) is a mask of the integers that may differ from 0, and `steps` (R,) are the scales.
    """
    q, error = np.zeros(left.shape), np.zeros(len(steps))
    for start in range(0, len(left), BLOCK):
        end = min(start + BLOCK, len(left))
        errors = np.empty((end - start, len(steps)))
        for tap in range(start, end):
            np.clip(np.rint(left[tap] / steps), -greatest, greatest, out=q[tap])
            q[tap] *= may[tap]
            errors[tap - start] = (left[tap] - steps * q[tap]) / factor[tap, tap]
            left[tap + 1 : end] -= factor[tap, tap + 1 : end, None] * errors[tap - start]
        left[end:] -= factor[start:end, end:].T @ errors
        error += np.square(errors).sum(axis=0)
    return q, error


def best_rows(candidates: Array, error: Array) -> Array:
    """Return for each row the candidate (K, S, n) of least `error` (K, S)."""
    return candidates[np.arange(len(error)), error.argmin(axis=1)]
