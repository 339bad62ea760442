"""Rounds weights so that outputs change little and the accumulator keeps to a budget.

In offset form, an accumulator with weights q and inputs of ranges r has the span Σ|q_i|·r_i. A width of P
bits therefore gives the budget Σ|q_i|·r_i ≤ 2^P − 1. This is the L1 bound of A2Q (Colbert et al. 2023),
without the sign bit.
"""

from collections.abc import Sequence

import numpy as np

from fheconv.basics.arrays import Array
from fheconv.quantizer.rounding.base import IntegerWeight, Moment, best_scales, greatest_integer
from fheconv.quantizer.rounding.gptq import best_rows, compensated, round_gptq, scale_grid

# The number of rounds in which integers and scale are adapted to each other.
ROUNDS = 3
# Each of this many steps is tried together with any other step.
PARTNERS = 16
# Rows are improved together up to about this many taps.
TOGETHER = 20_000
TINY = float(np.finfo(np.float64).tiny)


def round_accumulator(
    weight: Array,
    bits: int,
    moment: Array | Moment | None,
    ranges: Array,
    budget: int | None,
    finest: Array | None = None,
    free: Array | None = None,
) -> IntegerWeight:
    """Return integers of `bits` bits and scales of small output error, each filter within the budget.

    This is a `Rounding`. It starts with GPTQ at each scale of a grid. While a result is over the budget, it
    decrements the weight that adds the least error for the steps that this saves. The best result is improved
    by single moves and exchanges within the budget. Then it gets its best scale. One bit means {−1, 0, 1}.
    """
    weight = weight.astype(np.float64)
    greatest, h = greatest_integer(bits), Moment.of(moment, weight.shape[1])
    if budget is None:
        start = round_gptq(weight, bits, h, finest=finest, free=free).values
    else:
        # At finer scales, the integers would exceed the budget and be decremented again.
        scale = scale_grid(weight, greatest, finest=np.abs(weight) @ ranges / max(4 * budget, 1))
        candidates, _ = compensated(weight, scale, h, greatest, free)
        _decrement(candidates, weight, scale, h.values, ranges, budget)
        start = best_rows(candidates, h.errors(weight, candidates, scale))
    limits = np.full(weight.shape, greatest) if free is None else greatest * free
    q = _descended(weight, start, h.values, ranges, limits, budget)
    return IntegerWeight(q, best_scales(weight, q, h.values), (-greatest, greatest))


def _decrement(
    candidates: Array, weight: Array, scale: Array, moment: Array, ranges: Array, budget: int
) -> None:
    """Decrement `candidates` (K, S, n), in place, until each is within the budget."""
    q = candidates.reshape(-1, weight.shape[1])
    used = np.abs(q) @ ranges
    over = np.flatnonzero(used > budget)
    s = scale.ravel()[over, None]
    pull = (weight[over // scale.shape[1]] - s * q[over]) @ moment
    while len(over):
        unit = s * np.sign(q[over])
        gain = (2 * unit * pull + unit**2 * np.diag(moment)) / ranges
        gain[q[over] == 0] = np.inf
        tap = gain.argmin(axis=1)
        at = np.arange(len(over))
        pull += unit[at, tap][:, None] * moment[tap]
        q[over, tap] -= np.sign(q[over, tap])
        used[over] = used[over] - ranges[tap]
        still = used[over] > budget
        over, pull, s = over[still], pull[still], s[still]


def _descended(
    weight: Array, start: Array, moment: Array, ranges: Array, limits: Array, budget: int | None
) -> Array:
    """Return rows (K, n), improved while steps of one or two taps reduce the error within the budget.

    No integer may exceed those of `limits` (K, n) in size.
    """
    descent = _Descent(weight, start, moment, ranges, limits, budget)
    rows = np.arange(len(start))
    for _ in range(ROUNDS):
        if not len(rows):
            break
        rows = descent.moved(rows)  # the scale of a row that has not moved stays
    return descent.q


class _Descent:
    """Improves rows of integers `q` (K, n), many together: numpy's calls would cost more than the numbers."""

    def __init__(
        self, weight: Array, start: Array, moment: Array, ranges: Array, limits: Array, budget: int | None
    ) -> None:
        self.q = start.copy()
        self._wanted, self._held = weight @ moment, start @ moment  # w·H, and q·H, which follows q
        self._moment, self._ranges, self._limits, self._budget = moment, ranges, limits, budget
        self._tolerance = 1e-9 * np.maximum(np.einsum("kn,kn->k", self._wanted, weight), TINY)

    def moved(self, rows: Array) -> Array:
        """Improve some rows, at the best scale of each. Return those that have changed."""
        fit = np.einsum("kn,kn->k", self._held[rows], self.q[rows])
        wanted = np.einsum("kn,kn->k", self._wanted[rows], self.q[rows])
        scale = np.divide(wanted, fit, out=np.zeros(len(rows)), where=fit > 0)
        rows, scale = rows[scale > 0], scale[scale > 0]
        changed = np.zeros(len(self.q), bool)
        together = max(TOGETHER // self.q.shape[1], 1)
        for first in range(0, len(rows), together):
            some, s = rows[first : first + together], scale[first : first + together]
            for _ in range(20 * self.q.shape[1]):
                moving = self._step(some, s)
                some, s = some[moving], s[moving]
                if not len(some):
                    break
                changed[some] = True
        return np.flatnonzero(changed)

    def _step(self, rows: Array, scale: Array) -> Array:
        """Move one tap of each row (R,), or two. Return which rows have moved."""
        s, q, limits = scale[:, None], self.q[rows], self._limits[rows]
        pull, curve = 2 * s * (self._wanted[rows] - s * self._held[rows]), s**2 * np.diag(self._moment)
        harm = np.concatenate([curve - pull, curve + pull], axis=1)  # of a step up, and of a step down
        harm[np.concatenate([q >= limits, q <= -limits], axis=1)] = np.inf
        single = harm
        prices: Sequence[tuple[Array, float] | None] = [None] * len(rows)
        if self._budget is not None:
            price = np.concatenate([np.where(q >= 0, 1, -1), np.where(q <= 0, 1, -1)], axis=1)
            price *= np.tile(self._ranges, 2)
            left = self._budget - np.abs(q) @ self._ranges
            single = np.where(price <= left[:, None], harm, np.inf)
            prices = list(zip(price, left, strict=True))
        best = single.argmin(axis=1)
        moving = single[np.arange(len(rows)), best] <= -self._tolerance[rows]
        self._move(rows[moving], best[moving])
        for at in np.flatnonzero(~moving):
            pair = _exchange(harm[at], scale[at], self._moment, self._tolerance[rows[at]], prices[at])
            moving[at] = pair is not None
            for step in pair or ():
                self._move(rows[[at]], np.array([step]))
        return moving

    def _move(self, rows: Array, steps: Array) -> None:
        """Make one step (R,) of each row: n steps go up, then n down."""
        direction, tap = np.where(steps < self.q.shape[1], 1, -1), steps % self.q.shape[1]
        self.q[rows, tap] += direction
        self._held[rows] += direction[:, None] * self._moment[tap]


def _exchange(
    harm: Array, s: float, moment: Array, tolerance: float, prices: tuple[Array, float] | None
) -> tuple[int, int] | None:
    """Return a pair of steps of two taps that reduces the error within the budget, None if there is none.

    It is the best pair of which one step is among the `PARTNERS` that add the least error. `harm` (2·n,) is
    the error that each step adds, up or down. If there is a budget, `prices` are those of the steps, and what
    is left of it.
    """
    taps = len(moment)
    first = np.argpartition(harm, PARTNERS)[:PARTNERS] if len(harm) > PARTNERS else np.arange(len(harm))
    tap = first % taps
    cross = np.where(first < taps, 2 * s**2, -2 * s**2)[:, None] * moment[tap]
    both = harm[first, None] + harm + np.concatenate([cross, -cross], axis=1)
    own = np.arange(len(first))
    both[own, tap] = both[own, tap + taps] = np.inf
    if prices is not None:
        price, left = prices
        both[price[first, None] + price > left] = np.inf
    one, other = np.unravel_index(int(both.argmin()), both.shape)
    return None if both[one, other] > -tolerance else (int(first[one]), int(other))
