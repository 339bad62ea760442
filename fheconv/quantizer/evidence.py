"""Measures how much calibration images tell, and makes up for what they do not tell.

What is fitted to a few images, or to images that are alike, is wrong for others. So covariances on
calibration images are mixed with those of inputs that are independent and uniform over their range. Such
inputs count as much as `PRIOR_IMAGES` images. This is the posterior mean of a covariance under a conjugate
prior (Gelman et al., Bayesian Data Analysis, section 3.6): it shrinks the covariance of few images, and that
of many stays as it is. Means need fewer images: `PRIOR_IMAGES` are enough.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg

from fheconv.basics.arrays import Array
from fheconv.networks.quantization import Quantization

# As many images as this tell as much as the prior.
PRIOR_IMAGES = 10
# For each fitted weight, as many windows tell as much as the prior.
PRIOR_WINDOWS = 0.1
# So many random images stand beside those that fill less than this share of the range.
OTHER_IMAGES, SLIVER = 4 * PRIOR_IMAGES, 0.1
# How strongly the least-squares fit keeps the trained weights, as a share of the inputs' variance.
RIDGE = 0.01


def independent_images(values: Array) -> float:
    """Return how many independent images tell as much as `values` (N, …).

    Equal images count once. Each further image counts by the share of the variance that lies between images:
    1 minus what images have in common, their intraclass correlation. One image counts as 1.

    Example:
        >>> independent_images(np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]))
        2.0
        >>> independent_images(np.array([[0.0, 1.0], [0.001, 1.0]])) < 1.001
        True
    """
    different = _different(values)
    if len(different) == 1:
        return 1.0
    # Dividing by the range keeps the squares from overflowing or vanishing.
    different = (different - different.min()) / np.ptp(different)
    between = float(different.var(axis=0, ddof=1).mean())
    return 1.0 + (len(different) - 1) * min(between / float(different.var()), 1.0)


def evidence(images: Array, values: Array) -> float:
    """Return how many independent images tell as much as a tensor's `values` (N, …) for `images` (N, …).

    An activation that is the same for all images tells as much as one image.
    """
    return min(independent_images(images), float(len(_different(values))))


def _different(values: Array) -> Array:
    """Return those of the `values` (N, …) that differ from all before."""
    first = {hash(one.tobytes()): number for number, one in reversed([*enumerate(values)])}
    different: Array = values[sorted(first.values())]
    return different


def beside_others(images: Array, quantization: Quantization) -> Array:
    """Return some of the `images` (N, C, *S) and `OTHER_IMAGES` random ones, if they fill less than `SLIVER`.

    Images that fill so little of the range of `quantization` do not tell where the sums of other images lie.
    The random ones are of any brightness and contrast. If the range is filled, return `images` as they are.
    Integers may fill a small part of their data type's range, but must not be all equal.
    """
    low, high = quantization.real_range
    if np.ptp(images) > (0 if quantization.integral else SLIVER * (high - low)):
        return images
    rng = np.random.default_rng(0)
    shape = (OTHER_IMAGES, *[1] * (images.ndim - 1))
    brightness, contrast = rng.uniform(size=(2, *shape))
    pixels = rng.uniform(size=(OTHER_IMAGES, *images.shape[1:]))
    others = low + (high - low) * ((1 - contrast) * brightness + contrast * pixels)
    return np.concatenate([images[:PRIOR_IMAGES], quantization.real(quantization.nearest(others))])


def middle(quantization: Quantization) -> float:
    """Return the mean of uniform integers, counted from the integer of 0."""
    return (quantization.minimum + quantization.maximum) / 2 - quantization.zero_point


def uniform_variance(quantization: Quantization) -> float:
    """Return the variance of uniform integers."""
    steps = quantization.maximum - quantization.minimum
    return steps * (steps + 2) / 12


def trust(images: float, weights: float = 0.0) -> float:
    """Return the share that `images` independent images have beside the prior, from 0 to 1.

    `weights` is the number of weights that are fitted at once, divided by the windows of each image: more
    weights need more images.

    Example:
        >>> trust(30)
        0.75
    """
    return images / (images + PRIOR_IMAGES + PRIOR_WINDOWS * weights)


def trust_in_mean(images: float) -> float:
    """Return the share that the mean over `images` independent images has beside that of uniform inputs."""
    return min(images / PRIOR_IMAGES, 1.0)


class Mixture(NamedTuple):
    """Describes a mixture of inputs: `share` (n,) of the calibration images, the rest uniform.

    `variance` (n,) is that of the uniform inputs. `apart` (n,) is the difference of the means, times
    √(1 − share), where the means are mixed alike.
    """

    variance: Array
    apart: Array
    share: Array

    def covariance(self, moment: Array) -> Array:
        """Return the covariance (n, n) of the mixture, from that on the calibration images."""
        root, rest = np.sqrt(self.share), (1 - self.share) * self.variance
        mixed: Array = (moment + np.outer(self.apart, self.apart)) * np.outer(root, root) + np.diag(rest)
        return mixed

    def with_sums(self, target: Array, weights: Array) -> Array:
        """Return the covariance (n, K) of the mixture with sums that weights (K, n) make of it.

        `target` (n, K) is that on the calibration images, with sums of the weights times √share.
        """
        root, rest = np.sqrt(self.share), (1 - self.share) * self.variance
        sums = target + np.outer(self.apart, (weights * root) @ self.apart)
        mixed: Array = root[:, None] * sums + rest[:, None] * weights.T
        return mixed


def least_squares(moment: Array, target: Array, weights: Array, free: Array) -> Array:
    """Return the weights (K, n) of least squared error, with a small penalty for leaving `weights`.

    `moment` (n, n) is the covariance of the inputs, `target` (n, K) that of the inputs and the float sums.
    `free` (K, n) is a mask of the weights that each row has; the others stay 0.
    """
    ridge = RIDGE * float(np.trace(moment)) / max(len(moment), 1)
    if not ridge > 0:  # constant inputs do not determine the weights
        return weights
    moment, target = moment + ridge * np.eye(len(moment)), target + ridge * weights.T
    common = free.all(axis=0)
    own, held = np.flatnonzero(~common), np.flatnonzero(common)
    across = moment[np.ix_(held, own)]
    # What all rows have is eliminated at once. Then few unknowns of each row are left (Schur complement).
    solved = scipy.linalg.solve(
        moment[np.ix_(held, held)], np.concatenate([target[held], across], axis=1), assume_a="pos"
    )
    fitted = np.zeros(weights.shape)
    fitted[:, held] = solved[:, : len(weights)].T
    left = target[own] - across.T @ solved[:, : len(weights)]
    for row in np.flatnonzero(free[:, own].any(axis=1)):
        some = np.flatnonzero(free[row, own])
        shared = solved[:, len(weights) + some]
        rest = moment[np.ix_(own[some], own[some])] - across[:, some].T @ shared
        fitted[row, own[some]] = scipy.linalg.solve(rest, left[some, row], assume_a="pos")
        fitted[row, held] -= shared @ fitted[row, own[some]]
    return fitted
