"""Measures how much calibration images tell, and makes up for what they do not tell.

What is fitted to a few images, or to images that are alike, is wrong for others. So all that is measured on
calibration images is mixed with what holds of inputs that are independent and uniform over their range. These
count as much as `PRIOR_IMAGES` images. This is the posterior mean of a covariance under a conjugate prior
(Chen 1979; Haff 1980): with many images, the prior vanishes.
"""

import numpy as np
import scipy.linalg

from fheconv.basics.arrays import Array

# As many images as this tell as much as the prior.
PRIOR_IMAGES = 10
# How strongly the least-squares fit keeps the trained weights, as a share of the inputs' variance.
RIDGE = 0.01


def independent_images(values: Array, low: float, high: float) -> float:
    """Return how many independent images tell as much as `values` (N, …), whose range is [low, high].

    Equal images count once. Each further image counts by the variance between images, as a share of the
    variance of uniform values. One image counts as 1.

    Example:
        >>> independent_images(np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]), 0, 1)
        2.0
        >>> independent_images(np.array([[0.5, 0.5], [0.5, 0.5]]), 0, 1)
        1.0
    """
    first = {hash(image.tobytes()): number for number, image in reversed([*enumerate(values)])}
    count = len(first)
    if count == 1 or not low < high:
        return 1.0
    # Dividing by the range first keeps the squares from overflowing or vanishing.
    between = float((values[[*first.values()]] / (high - low)).var(axis=0, ddof=1).mean())
    return 1.0 + (count - 1) * min(between * 12, 1.0)  # 1/12 is the variance of uniform values in [0, 1]


def uniform_variance(steps: int) -> float:
    """Return the variance of integers that are uniform over 0 to `steps`."""
    return steps * (steps + 2) / 12


def trust(images: float) -> float:
    """Return the share that `images` independent images have beside the prior, from 0 to 1.

    Example:
        >>> trust(30)
        0.75
    """
    return images / (images + PRIOR_IMAGES)


def shrunk(moment: Array, variance: Array, trusted: Array) -> Array:
    """Return a covariance (n, n) mixed with that of independent inputs of the given `variance` (n,).

    `trusted` (n,) is the share of `moment` for each input.
    """
    share = np.sqrt(trusted)
    mixed: Array = moment * share[:, None] * share + np.diag((1 - trusted) * variance)
    return mixed


def least_squares(moment: Array, target: Array, weights: Array) -> Array:
    """Return the weights (K, n) of least squared error, with a small penalty for leaving `weights`.

    `moment` (n, n) is the covariance of the inputs, `target` (n, K) that of the inputs and the float sums.
    """
    ridge = RIDGE * float(np.trace(moment)) / max(len(moment), 1)
    if not ridge > 0:  # constant inputs do not determine the weights
        return weights
    fitted: Array = scipy.linalg.solve(
        moment + ridge * np.eye(len(moment)), target + ridge * weights.T, assume_a="pos"
    ).T
    return fitted
