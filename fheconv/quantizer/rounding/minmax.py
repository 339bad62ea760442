"""Rounds weights to the nearest integers, where the greatest weight becomes the greatest integer."""

import numpy as np

from fheconv.basics.arrays import Array
from fheconv.quantizer.rounding.base import IntegerWeight, Moment, exact, greatest_integer


def round_minmax(
    weight: Array,
    bits: int,
    moment: Array | Moment | None = None,
    ranges: Array | None = None,
    budget: int | None = None,
    finest: Array | None = None,
    free: Array | None = None,
) -> IntegerWeight:
    """Return the integers of `bits` bits nearest to float weights (K, …), with the scale max|w| / greatest.

    This is a `Rounding` that uses only the weights (Jacob et al. 2018). All-zero channels get scale 0.
    Weights that are integers of `bits` bits already stay as they are, with scale 1.
    """
    if (integers := exact(weight, bits)) is not None:
        return integers
    greatest = greatest_integer(bits)
    rows = weight.reshape(len(weight), -1).astype(np.float64)
    largest = np.abs(rows).max(axis=1)
    shares = np.divide(rows, largest[:, None], out=np.zeros_like(rows), where=largest[:, None] > 0)
    q = np.rint(shares * greatest).astype(np.int64).reshape(weight.shape)
    return IntegerWeight(q, largest / greatest, (-greatest, greatest))
