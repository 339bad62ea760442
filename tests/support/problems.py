"""Random filters to round, with the inputs that they meet, and how far from them integers are."""

import numpy as np
from hypothesis import strategies as st

from fheconv.quantizer.rounding.base import DAMPING, IntegerWeight


@st.composite
def problems(draw):
    """Rows of weights, the second moment of correlated inputs, ranges and bits."""
    filters, taps = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    weight = rng.normal(size=(filters, taps)) * 10.0 ** draw(st.integers(-6, 6))
    weight[rng.random(weight.shape) < draw(st.sampled_from([0, 0.3, 0.9]))] = 0
    inputs = rng.normal(size=(draw(st.integers(1, 30)), taps)) @ rng.normal(size=(taps, taps))
    inputs[:, rng.random(taps) < draw(st.sampled_from([0, 0.3, 1]))] = 0  # dead ones
    moment = inputs.T @ inputs / len(inputs) * 100.0 ** draw(st.integers(-3, 3))
    return weight, moment, rng.integers(1, 64, taps), draw(st.integers(1, 8))


def damped(moment):
    variance = np.trace(moment) / len(moment)
    return moment + DAMPING * variance * np.eye(len(moment)) if variance else np.eye(len(moment))


def errors(weight, moment, rounded):
    """The output error of each row (K,)."""
    off = weight - rounded.scale[:, None] * rounded.values
    return np.einsum("kn,nm,km->k", off, damped(moment), off)


def nothing(weight):
    """No weights at all."""
    return IntegerWeight(np.zeros(weight.shape, np.int64), np.zeros(len(weight)), (0, 0))
