"""Integer weights that compute nearly what the float weights do, under a budget for the accumulator.

For one filter w, and the second moment H of the inputs it meets, the error of integers q with scale s is
E(q, s) = (w − s·q) H (w − s·q)ᵀ, the mean squared error of what the layer computes. In offset form an
accumulator with weights q and inputs of ranges r needs Σ|q_i|·r_i steps, so that a width of P bits is the
budget Σ|q_i|·r_i ≤ 2^P − 1: the L1 bound of A2Q (Colbert et al. 2023), without the sign bit.
"""

import numpy as np
import scipy.linalg

from fheconv.arrays import Array
from fheconv.quantizer.rounding import IntegerWeight

# How many scales are tried: from a quarter of the one at which a filter's greatest weight becomes the
# greatest integer, to one at which it is little more than a half. A budget may ask for few units.
SCALES = 40
# What is added to the diagonal of H, as a share of its mean: inputs that calibration never saw still count.
DAMPING = 0.01
# How often integers and scale are adapted to each other.
ROUNDS = 3
TINY = float(np.finfo(np.float64).tiny)


def round_budgeted(
    weight: Array, moment: Array, ranges: Array, bits: int, budget: int | None
) -> IntegerWeight:
    """Return integers of `bits` bits and scales of small error, each filter within the budget.

    `weight` is (K, n), `moment` H (n, n), `ranges` (n,) integers: how many steps the accumulator gains for
    one step of each weight. `budget` None is none. For each scale of a grid: GPTQ rounding (Frantar et al.
    2022), then, while over budget, the unit decrement of least harm for what it saves; without a budget also
    the nearest integers. From the best: single moves and exchanges within the budget while they help, and the
    best scale for what came out. One bit is {−1, 0, 1}.
    """
    greatest = max(2 ** (bits - 1) - 1, 1)
    filters, taps = weight.shape
    variance = float(np.trace(moment)) / taps
    # Inputs that never change tell nothing: then all taps count alike.
    moment = moment + np.eye(taps) * DAMPING * variance if variance > 0 else np.eye(taps)
    largest = np.abs(weight).max(axis=1)
    alive = np.flatnonzero(largest > 0)
    q, scale = np.zeros((filters, taps), np.int64), np.zeros(filters)
    if len(alive):
        w = weight[alive].astype(np.float64)
        finest = 0.25 * largest[alive] / greatest
        if budget is not None:  # still finer integers would only be taken back again
            finest = np.maximum(finest, np.abs(w) @ ranges / max(4 * budget, 1))
        s = np.geomspace(np.minimum(finest, largest[alive]), 1.6 * largest[alive], SCALES, axis=1)
        meant, unit = np.repeat(w, SCALES, axis=0), s.ravel()
        candidates = _gptq(meant, unit, moment, greatest)
        if budget is not None:
            _decrement(candidates, meant, unit, moment, ranges, budget)
        harm = _harm(meant, candidates, unit, moment)
        if budget is None:  # what one tap leaves to the others may be more than they can take up
            nearest = np.clip(np.rint(meant / unit[:, None]), -greatest, greatest).astype(np.int64)
            plain = _harm(meant, nearest, unit, moment)
            candidates[plain < harm] = nearest[plain < harm]
            harm = np.minimum(harm, plain)
        harm = harm.reshape(len(alive), -1)
        best = harm.argmin(axis=1)
        at = np.arange(len(alive)) * SCALES + best
        for number, row in enumerate(alive):
            q[row], scale[row] = _descend(w[number], candidates[at[number]], moment, ranges, greatest, budget)
    return IntegerWeight(q, scale, (-greatest, greatest))


def _harm(w: Array, q: Array, s: Array, moment: Array) -> Array:
    """Return the error of each row (R, n)."""
    error: Array = w - s[:, None] * q
    return np.einsum("rn,rn->r", error @ moment, error)


def _gptq(w: Array, s: Array, moment: Array, greatest: int) -> Array:
    """Round (R, n) tap by tap, the one with the most input first; each error is made up for by the others."""
    order = np.argsort(-np.diag(moment), kind="stable")
    inverse = scipy.linalg.inv(moment[np.ix_(order, order)])
    factor = scipy.linalg.cholesky((inverse + inverse.T) / 2)
    w = w[:, order].copy()
    q = np.zeros(w.shape, np.int64)
    for tap in range(w.shape[1]):
        q[:, tap] = np.clip(np.rint(w[:, tap] / s), -greatest, greatest)
        error = (w[:, tap] - s * q[:, tap]) / factor[tap, tap]
        w[:, tap + 1 :] -= error[:, None] * factor[tap, tap + 1 :]
    restored = np.empty_like(q)
    restored[:, order] = q
    return restored


def _decrement(q: Array, w: Array, s: Array, moment: Array, ranges: Array, budget: int) -> None:
    """Take units off `q` (R, n), in place, until each row is within the budget."""
    used = np.abs(q) @ ranges
    over = np.flatnonzero(used > budget)
    pull = (w[over] - s[over, None] * q[over]) @ moment
    while len(over):
        unit = s[over, None] * np.sign(q[over])
        gain = (2 * unit * pull + unit**2 * np.diag(moment)) / ranges
        gain[q[over] == 0] = np.inf
        tap = gain.argmin(axis=1)
        at = np.arange(len(over))
        pull += unit[at, tap][:, None] * moment[tap]
        q[over, tap] -= np.sign(q[over, tap])
        used[over] = used[over] - ranges[tap]
        still = used[over] > budget
        over, pull = over[still], pull[still]


def _descend(
    w: Array, q: Array, moment: Array, ranges: Array, greatest: int, budget: int | None
) -> tuple[Array, float]:
    """Improve one row while a step of one tap, or of two, lessens the error within the budget."""
    q = q.copy()
    diagonal = np.diag(moment)
    steps = np.array([1, -1])[:, None]
    tolerance = 1e-9 * max(float(w @ moment @ w), TINY)
    for _ in range(ROUNDS):
        s = _best_scale(w, q, moment)
        if s == 0:
            break
        pull = (w - s * q) @ moment
        for _ in range(20 * len(q)):
            moved = q + steps
            harm = -2 * s * steps * pull + s**2 * diagonal
            harm[np.abs(moved) > greatest] = np.inf
            price = (np.abs(moved) - np.abs(q)) * ranges
            left = np.inf if budget is None else budget - int(np.abs(q) @ ranges)
            single = np.where(price <= left, harm, np.inf)
            best = np.unravel_index(int(single.argmin()), single.shape)
            moves = [(int(best[0]), int(best[1]))]
            if single[best] > -tolerance:
                moves = _exchange(harm, price, left, s, moment, tolerance)
            if not moves:
                break
            for direction, tap in moves:
                q[tap] += int(steps[direction, 0])
                pull -= s * int(steps[direction, 0]) * moment[tap]
    return q, _best_scale(w, q, moment)


def _best_scale(w: Array, q: Array, moment: Array) -> float:
    """Return the scale of least error for given integers, 0 if they are of no use."""
    fit = float(q @ moment @ q)
    return max(float(w @ moment @ q) / fit, 0.0) if fit > 0 else 0.0


def _exchange(
    harm: Array, price: Array, left: float, s: float, moment: Array, tolerance: float
) -> list[tuple[int, int]]:
    """Return the best pair of steps of two taps that lessens the error within the budget, or nothing."""
    taps = harm.shape[1]
    sign = np.repeat([1, -1], taps)
    harm, price = harm.ravel(), price.ravel()
    both = harm[:, None] + harm + 2 * s**2 * sign[:, None] * sign * np.tile(moment, (2, 2))
    both[price[:, None] + price > left] = np.inf
    same = np.arange(2 * taps) % taps
    both[same[:, None] == same] = np.inf
    first, second = np.unravel_index(int(both.argmin()), both.shape)
    if both[first, second] > -tolerance:
        return []
    return [(int(at) // taps, int(at) % taps) for at in (first, second)]
