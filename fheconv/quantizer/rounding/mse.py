"""Rounds weights to the nearest integers, at the best of all scales."""

import numpy as np

from fheconv.basics.arrays import Array
from fheconv.quantizer.rounding.base import IntegerWeight, Moment, exact, greatest_integer


def round_mse(
    weight: Array,
    bits: int,
    moment: Array | Moment | None = None,
    ranges: Array | None = None,
    budget: int | None = None,
    finest: Array | None = None,
    free: Array | None = None,
) -> IntegerWeight:
    """Return the integers of `bits` bits, and the scales, of least squared error.

    This is a `Rounding` that uses only the weights. Float weights (K, …) become symmetric integers in
    ±(2^(bits−1) − 1), or in {−1, +1} for one bit (XNOR-Net, Rastegari et al. 2016). Integers and scale
    minimise ‖weight − scale·values‖² exactly, for each filter. All-zero channels get zeros and scale 0.
    Weights that are integers of `bits` bits already stay as they are, with scale 1.
    """
    if (integers := exact(weight, bits)) is not None:
        return integers
    rows = weight.reshape(len(weight), -1).astype(np.float64)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    rows = np.divide(rows, largest, out=np.zeros_like(rows), where=largest > 0)
    q, scale = zip(*(_nearest(row, bits) for row in rows), strict=True)
    greatest = greatest_integer(bits)
    # Dividing by the common divisor gives the same weights with narrower accumulators.
    divisor = np.maximum(np.gcd.reduce(np.stack(q), axis=1), 1)
    return IntegerWeight(
        (np.stack(q) // divisor[:, None]).reshape(weight.shape),
        np.array(scale) * divisor * largest[:, 0],
        (-greatest, greatest),
    )


def _nearest(row: Array, bits: int) -> tuple[Array, float]:
    """Return the integers and the scale of least squared error for one row.

    The scale is swept down from infinity, and the integers change only at breakpoints.
    |w_i|/scale passes k − ½ at scale = |w_i|/(k − ½), where |q_i| goes from k − 1 to k. For fixed q the
    best scale is A/D with A = Σ|w||q|, D = Σq², and leaves ‖w‖² − A²/D. The best pair is therefore the
    breakpoint with the greatest A²/D.
    """
    size = np.abs(row)
    if not size.any():
        return np.zeros(len(row), np.int64), 0.0
    if bits == 1:
        return np.where(row < 0, -1, 1), float(size.mean())
    k = np.arange(1, 2 ** (bits - 1))
    breakpoints = (size[:, None] / (k - 0.5)).ravel()
    order = np.argsort(-breakpoints, kind="stable")
    a = np.cumsum(np.repeat(size, len(k))[order])
    d = np.cumsum(np.tile(2 * k - 1, len(size))[order])
    best = int(np.argmax(a**2 / d))
    steps = np.bincount(order[: best + 1] // len(k), minlength=len(row))
    return np.sign(row).astype(np.int64) * steps, float(a[best] / d[best])
