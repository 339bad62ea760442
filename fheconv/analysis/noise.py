"""Tells the noise of encrypted values and of switches to other keys, and how often noise makes a value wrong.

The formulas are those of Bergerat et al. 2023 ("Parameter Optimization and Larger Precision for (T)FHE"), for
binary keys and numbers of 64 bits. Variances are in units of the torus.
"""

import math
from functools import cache
from statistics import NormalDist

import numpy as np

from fheconv.basics.arrays import Array
from fheconv.basics.security import FLOOR, LINES

# The numbers of levels of a decomposition that are tried. More are never the cheapest.
LEVELS = np.arange(1, 33)
UNIT = 2.0**-64


def greatest_variance(bits: int, p_error: float) -> float:
    """Return the variance with which a value of `bits` bits goes wrong with a probability of `p_error`."""
    deviations = -NormalDist().inv_cdf(max(p_error / 2, 1e-300))
    return float((2.0 ** -(bits + 2) / deviations) ** 2)


def failure(bits: int, variance: float) -> float:
    """Return the probability that a value of `bits` bits goes wrong: that noise moves it by half a unit."""
    return math.erfc(2.0 ** -(bits + 2) / math.sqrt(2 * variance)) if variance else 0.0


def fresh_variance(dimension: int, security_level: int) -> float:
    """Return the variance of fresh encryptions under a key of `dimension` bits."""
    slope, bias = LINES[security_level]
    return float(4.0 ** max(slope * dimension + bias, FLOOR))


@cache
def switch_variances(dimensions: tuple[int, ...], security_level: int) -> Array:
    """Return the variance that switches to some keys add, (n, l), for each bit of the source's key."""
    key = np.array([fresh_variance(dimension, security_level) for dimension in dimensions])[:, None, None]
    level, base = LEVELS[None, :, None].astype(float), 2.0 ** np.arange(1, 33)
    step = 2.0 ** np.minimum(2 * level * np.log2(base), 128)
    noise = (1 / step - UNIT**2) / 24 + UNIT**2 / 16 + level * key * (base**2 + 2) / 12
    found: Array = np.minimum.accumulate(noise.min(axis=2), axis=1)
    return found
