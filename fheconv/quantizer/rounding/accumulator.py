"""Rounds weights so that outputs change little and the accumulator keeps to a budget.

In offset form, an accumulator with weights q and inputs of ranges r has the span Σ|q_i|·r_i. A width of P
bits therefore gives the budget Σ|q_i|·r_i ≤ 2^P − 1. This is the L1 bound of A2Q (Colbert et al. 2023),
without the sign bit.
"""

import numpy as np

from fheconv.basics.arrays import Array
from fheconv.quantizer.rounding.base import IntegerWeight, best_scales, damped, greatest_integer
from fheconv.quantizer.rounding.gptq import best_rows, compensated, round_gptq, scale_grid

# The number of rounds in which integers and scale are adapted to each other.
ROUNDS = 3
# Each of this many steps is tried together with any other step.
PARTNERS = 16
TINY = float(np.finfo(np.float64).tiny)


def round_accumulator(
    weight: Array,
    bits: int,
    moment: Array | None,
    ranges: Array,
    budget: int | None,
    finest: Array | None = None,
) -> IntegerWeight:
    """Return integers of `bits` bits and scales of small output error, each filter within the budget.

    This is a `Rounding`. It starts with GPTQ at each scale of a grid. While a result is over the budget, it
    decrements the weight that adds the least error for the steps that this saves. The best result is improved
    by single moves and exchanges within the budget. Then it gets its best scale. One bit means {−1, 0, 1}.
    """
    weight = weight.astype(np.float64)
    greatest, h = greatest_integer(bits), damped(moment, weight.shape[1])
    if budget is None:
        start = round_gptq(weight, bits, moment, finest=finest).values
    else:
        # At finer scales, the integers would exceed the budget and be decremented again.
        scale = scale_grid(weight, greatest, finest=np.abs(weight) @ ranges / max(4 * budget, 1))
        candidates = compensated(weight, scale, h, greatest)
        _decrement(candidates, weight, scale, h, ranges, budget)
        start = best_rows(weight, candidates, scale, h)
    q = _descended(weight, start, h, ranges, greatest, budget)
    return IntegerWeight(q, best_scales(weight, q, h), (-greatest, greatest))


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
    weight: Array, start: Array, moment: Array, ranges: Array, greatest: int, budget: int | None
) -> Array:
    """Return rows (K, n), improved while steps of one or two taps reduce the error within the budget."""
    q = start.copy()
    wanted, held = weight @ moment, q @ moment
    for row in range(len(q)):
        tolerance = 1e-9 * max(float(wanted[row] @ weight[row]), TINY)
        for _ in range(ROUNDS):
            _descend(q[row], wanted[row], held[row], moment, ranges, greatest, budget, tolerance)
    return q


def _descend(
    q: Array,
    wanted: Array,
    held: Array,
    moment: Array,
    ranges: Array,
    greatest: int,
    budget: int | None,
    tolerance: float,
) -> None:
    """Improve one row (n,) in place, at its best scale. `wanted` is w·H, and `held` q·H follows q."""
    diagonal, steps = np.diag(moment), np.array([1, -1])[:, None]
    fit = float(held @ q)
    s = float(wanted @ q) / fit if fit > 0 else 0.0
    if s <= 0:
        return
    for _ in range(20 * len(q)):
        moved = q + steps
        harm = -2 * s * steps * (wanted - s * held) + s**2 * diagonal
        harm[np.abs(moved) > greatest] = np.inf
        price = (np.abs(moved) - np.abs(q)) * ranges
        left = np.inf if budget is None else budget - int(np.abs(q) @ ranges)
        single = np.where(price <= left, harm, np.inf)
        best = np.unravel_index(int(single.argmin()), single.shape)
        moves = [(int(best[0]), int(best[1]))]
        if single[best] > -tolerance:
            moves = _exchange(harm, price, left, s, moment, tolerance)
        if not moves:
            return
        for direction, tap in moves:
            q[tap] += steps[direction, 0]
            held += steps[direction, 0] * moment[tap]


def _exchange(
    harm: Array, price: Array, left: float, s: float, moment: Array, tolerance: float
) -> list[tuple[int, int]]:
    """Return a pair of steps of two taps that reduces the error within the budget, or no steps.

    It is the best pair of which one step is among the `PARTNERS` that add the least error.
    """
    taps = harm.shape[1]
    sign = np.repeat([1, -1], taps)
    harm, price = harm.ravel(), price.ravel()
    first = np.argpartition(harm, PARTNERS)[:PARTNERS] if len(harm) > PARTNERS else np.arange(len(harm))
    tap, rest = first % taps, np.arange(2 * taps) % taps
    both = harm[first, None] + harm + 2 * s**2 * sign[first, None] * sign * np.tile(moment[tap], 2)
    both[(price[first, None] + price > left) | (tap[:, None] == rest)] = np.inf
    one, other = np.unravel_index(int(both.argmin()), both.shape)
    if both[one, other] > -tolerance:
        return []
    return [(int(at) // taps, int(at) % taps) for at in (first[one], other)]
