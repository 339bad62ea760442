"""Products of two encrypted values are differences of two squares, and equal torch's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tests.support.captured import Fn, check, conv, cost

SHAPE = (2, 4, 4)


def squares(network):
    """The number of values of the layers that square sums and differences."""
    return sum(math.prod(layer.shape) for layer in network.layers if "square" in layer.kind)


# Each makes one factor from m.a, m.b and an image, with the number of lookups that it takes itself.
FACTORS = {
    "linear": (lambda m, x: m.a(x), 0),
    "another": (lambda m, x: m.b(x), 0),
    "activation": (lambda m, x: F.relu(m.a(x)), 32),
    "gate": (lambda m, x: torch.sigmoid(m.b(x.mean((2, 3), keepdim=True))), 2),
    "one a position": (lambda m, x: m.b(x).amax(1, keepdim=True), 32 + 16),
    "a number": (lambda m, x: m.b(x).mean((1, 2, 3), keepdim=True), 0),
    "large": (lambda m, x: 1e3 * m.b(x), 0),
    "pooled": (lambda m, x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2), 0),
    "image": (lambda m, x: x, 0),
    "moved": (lambda m, x: x.flip(3), 0),
}
READERS = {
    "nothing": lambda m, y: y,
    "convolution": lambda m, y: m.c(y),
    "sum": lambda m, y: F.relu(y).sum(1),
    "mean": lambda m, y: y.mean((2, 3)),
    "linear": lambda m, y: m.d(y.flatten(1)),
    "product": lambda m, y: y * m.c(y),
}


def parts():
    return {"a": conv(2, 2), "b": conv(2, 2), "c": conv(2, 2), "d": nn.Linear(32, 3)}


@pytest.mark.slow
@settings(max_examples=15)
@given(st.sampled_from([*FACTORS]), st.sampled_from([*FACTORS]), st.sampled_from([*READERS]), st.booleans())
def test_products_give_what_torch_does(one, other, reader, divides):
    def function(m, x):
        x, y = (FACTORS[name][0](m, x) for name in (one, other))
        product = x / (1 + y * y) if divides else x * y
        return READERS[reader](m, product.expand(-1, *SHAPE))

    check(Fn(function, **parts()), SHAPE)


@pytest.mark.parametrize(("one", "other"), [("linear", "another"), ("activation", "gate"), ("gate", "image")])
def test_a_product_takes_two_lookups(one, other):
    network = check(Fn(lambda m, x: m.c(FACTORS[one][0](m, x) * FACTORS[other][0](m, x)), **parts()), SHAPE)
    assert squares(network) == 2 * math.prod(SHAPE)
    assert cost(network) == squares(network) + FACTORS[one][1] + FACTORS[other][1]


def test_products_of_functions_of_one_value_take_one_lookup():
    network = check(Fn(lambda m, x: (y := m.a(x)) * torch.sigmoid(y) * y, **parts()), SHAPE)
    assert cost(network) == 0  # the client computes it
    assert not squares(network)


@pytest.mark.parametrize("dim", [1, -1])
def test_gated_linear_units(dim):
    network = check(
        Fn(lambda m, x: m.c(F.glu(m.a(x), dim).expand(x.shape)) if dim == 1 else F.glu(x), **parts()), SHAPE
    )
    assert squares(network) >= 32


def test_products_of_vectors_and_of_numbers():
    for function in (
        lambda m, x: m.d(x.flatten(1)) * m.e(x.flatten(1)),
        lambda m, x: m.d(x.flatten(1))[:, 0] * m.e(x.flatten(1))[:, 1],
        lambda m, x: m.d(x.flatten(1))[:, 0] * m.e(x.flatten(1)).sum(1),
    ):
        check(Fn(function, **parts(), e=nn.Linear(32, 3)), SHAPE)


def test_a_factor_may_be_constant_after_all():
    network = check(Fn(lambda m, x: m.a(x) * torch.full_like(x, 3.0), **parts()), SHAPE)
    assert not squares(network)


def test_local_response_normalization():
    check(Fn(lambda m, x: m.c(F.local_response_norm(m.a(x), 2)), **parts()), SHAPE)
