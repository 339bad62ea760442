"""Compares networks to the last bit."""

import numpy as np

from fheconv.networks.floats import Maximum
from fheconv.networks.integers import IntegerNetwork
from fheconv.networks.linear import Kernel


def same_network(a: IntegerNetwork, b: IntegerNetwork) -> None:
    """Whether two networks have the same integers, tables and scales, to the last bit."""
    for one, other in zip(a.layers, b.layers, strict=True):
        if isinstance(one, Maximum):
            continue
        for first, second in zip(one.terms, other.terms, strict=True):
            for step, again in zip(first.steps, second.steps, strict=True):
                if isinstance(step, Kernel):
                    np.testing.assert_array_equal(again.weight, step.weight)
        for name in ("scale", "bias", "real_bias"):
            np.testing.assert_array_equal(getattr(other, name), getattr(one, name))
        if one.lookup is not None:
            np.testing.assert_array_equal(other.lookup.tables, one.lookup.tables)
            np.testing.assert_array_equal(other.lookup.minimum, one.lookup.minimum)
            assert (other.lookup.bits, other.lookup.output) == (one.lookup.bits, one.lookup.output)
    for seen, again in zip(a.observed, b.observed, strict=True):
        np.testing.assert_array_equal(again, seen)
