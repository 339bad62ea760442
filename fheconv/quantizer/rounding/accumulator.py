"""Rounds weights so that outputs change little and the accumulator keeps to a budget.

In offset form, an accumulator with weights q and inputs of ranges r has the span Σ|q_i|·r_i. A width of P
bits therefore gives the budget Σ|q_i|·r_i ≤ 2^P − 1. This is the L1 bound of A2Q (Colbert et al. 2023),
without the sign bit.
"""

from typing import NamedTuple

import numpy as np

from fheconv.basics.arrays import Array
from fheconv.quantizer.rounding.base import IntegerWeight, Moment, best_scales, greatest_integer
from fheconv.quantizer.rounding.gptq import (
    SCALES,
    affordable_scales,
    best_integers,
    best_rows,
    compensated,
    scale_grid,
)

# The number of rounds in which integers and scale are adapted to each other.
ROUNDS = 3
# Within a budget, so many scales are tried at least: errors before decrements do not tell which is best.
FEWEST_SCALES = 12
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
        start = best_integers(weight, greatest, h, finest, free)
    else:
        # At finer scales, the integers would exceed the budget and be decremented again.
        least = np.abs(weight) @ ranges / max(4 * budget, 1)
        count = min(affordable_scales(weight.shape[1], FEWEST_SCALES), SCALES)
        scale = scale_grid(weight, greatest, count, least)
        candidates, _ = compensated(weight, scale, h, greatest, free)
        _decrement(candidates, weight, scale, h.values, ranges, budget)
        start = best_rows(candidates, h.errors(weight, candidates, scale))
    sizes = np.full(weight.shape, greatest) if free is None else greatest * free
    q = _descended(weight, start, h.values, _Limits(sizes, ranges, budget))
    return IntegerWeight(q, best_scales(weight, q, q @ h.values), (-greatest, greatest))


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


class _Limits(NamedTuple):
    """Says what rows of integers q must keep to: |q| ≤ `sizes` (K, n), and Σ|q|·`ranges` ≤ `budget`."""

    sizes: Array
    ranges: Array
    budget: int | None

    def of(self, rows: Array) -> "_Limits":
        """Return the limits of some rows."""
        return self._replace(sizes=self.sizes[rows])


def _descended(weight: Array, start: Array, moment: Array, limits: _Limits) -> Array:
    """Return rows (K, n), improved while steps of one or two taps reduce the error within the limits."""
    q, wanted = start.copy(), weight @ moment
    tolerance = 1e-9 * np.maximum(np.einsum("kn,kn->k", wanted, weight), TINY)
    together = max(TOGETHER // q.shape[1], 1)
    rows = np.arange(len(q))
    for _ in range(ROUNDS):
        if not len(rows):  # the scale of a row that has not moved stays
            break
        held = q[rows] @ moment
        scale = best_scales(weight[rows], q[rows], held)
        slope = 2 * scale[:, None] * (wanted[rows] - scale[:, None] * held)
        moving = []
        for piece in np.split(np.arange(len(rows)), range(together, len(rows), together)):
            piece = piece[scale[piece] > 0]
            some = rows[piece]
            descent = _Descent(q[some], slope[piece], scale[piece], moment, limits.of(some), tolerance[some])
            moving.append(some[descent.run()])
            q[some] = descent.q
        rows = np.concatenate(moving)
    return q


class _Descent:
    """Moves taps of rows of integers `q` (R, n) at fixed scales, while that reduces their errors.

    It moves many rows together, because numpy's calls would cost more than the numbers. A step up of a tap
    adds its curve to the error, less its slope.
    """

    def __init__(
        self, q: Array, slope: Array, scale: Array, moment: Array, limits: _Limits, tolerance: Array
    ) -> None:
        self.q = q.astype(np.float64)
        self._slope, self._square, self._moment = slope, np.square(scale)[:, None], moment
        self._curve = self._square * np.diag(moment)
        self._limits, self._tolerance = limits, tolerance

    def run(self) -> Array:
        """Move taps to the end. Return a mask (R,) of the rows that have moved."""
        moved = np.zeros(len(self.q), bool)
        rows = np.arange(len(self.q))
        for _ in range(20 * self.q.shape[1]):
            if not len(rows):
                break
            rows = rows[self._step(rows)]
            moved[rows] = True
        return moved

    def _step(self, rows: Array) -> Array:
        """Move one tap of each row (R,), or two. Return which rows have moved."""
        of = slice(None) if len(rows) == len(self.q) else rows
        # Only a step that follows the slope can reduce the error.
        direction = np.copysign(1.0, self._slope[of])
        harm = self._harm(of, direction)
        if self._limits.budget is not None:
            harm[self._price(of, direction) > self._left(rows)[:, None]] = np.inf
        at, tap = np.arange(len(rows)), harm.argmin(axis=1)
        moving = harm[at, tap] <= -self._tolerance[of]
        self._move(rows[moving], tap[moving], direction[at, tap][moving])
        for one in np.flatnonzero(~moving):
            moving[one] = self._exchange(rows[one])
        return moving

    def _harm(self, rows: Array | int | slice, direction: Array) -> Array:
        """Return what a step of each tap, up or down by `direction`, adds to the errors of some rows."""
        harm: Array = self._curve[rows] - direction * self._slope[rows]
        harm[self.q[rows] * direction >= self._limits.sizes[rows]] = np.inf
        return harm

    def _price(self, rows: Array | int | slice, direction: Array) -> Array:
        """Return what a step of each tap, up or down by `direction`, takes of the budget of some rows."""
        ranges = self._limits.ranges
        return np.where(self.q[rows] * direction >= 0, ranges, -ranges)

    def _left(self, rows: Array | int) -> Array:
        """Return what is left of the budget of some rows."""
        left: Array = self._limits.budget - np.abs(self.q[rows]) @ self._limits.ranges
        return left

    def _move(self, rows: Array, taps: Array, direction: Array) -> None:
        """Move one tap (R,) of each row, up or down by `direction` (R,)."""
        self.q[rows, taps] += direction
        self._slope[rows] -= (2 * self._square[rows] * direction[:, None]) * self._moment[taps]

    def _exchange(self, row: int) -> bool:
        """Move two taps of a row, if that reduces its error. Return whether it does.

        It is the best pair of steps of which one is among the `PARTNERS` that add the least error.
        """
        up_and_down, taps = np.array([[1.0], [-1.0]]), self.q.shape[1]
        harm = self._harm(row, up_and_down).ravel()
        first = np.argpartition(harm, PARTNERS)[:PARTNERS] if len(harm) > PARTNERS else np.arange(len(harm))
        tap = first % taps
        cross = np.where(first < taps, 2, -2)[:, None] * self._square[row] * self._moment[tap]
        both = harm[first, None] + harm + np.concatenate([cross, -cross], axis=1)
        own = np.arange(len(first))
        both[own, tap] = both[own, tap + taps] = np.inf
        if self._limits.budget is not None:
            price = self._price(row, up_and_down).ravel()
            both[price[first, None] + price > self._left(row)] = np.inf
        one, other = np.unravel_index(int(both.argmin()), both.shape)
        if both[one, other] > -self._tolerance[row]:
            return False
        for step in (int(first[one]), int(other)):
            self._move(np.array([row]), np.array([step % taps]), np.array([1.0 if step < taps else -1.0]))
        return True
