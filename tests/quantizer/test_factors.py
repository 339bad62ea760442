"""The factors of a product are weighed against each other, whatever their sizes."""

import numpy as np
import pytest
import torch
from torch import nn

import fheconv
from fheconv.capture.model import capture
from fheconv.quantizer.factors import balanced
from tests.support.captured import Fn, conv, trained

SHAPE = (2, 5, 5)
FINE = fheconv.QuantConfig(
    overflow="defined",
    rounding_bits=8,
    accumulator_bits=16,
    weight_bits=8,
    activation_bits=8,
    input_bits=8,
    input_range=(-1, 1),
)


def images(count, seed):
    return np.random.default_rng(seed).uniform(-1, 1, (count, *SHAPE))


def product(large=1.0, gate=torch.sigmoid):
    """A network of one product, whose factors may have very different sizes."""
    model = Fn(
        lambda m, x: m.c(large * m.a(x) * gate(m.b(x))),
        a=conv(2, 4),
        b=conv(2, 4),
        c=conv(4, 3, 1, bias=False),
    )
    return trained(model).eval()


def spread_of_error(model, config=FINE):
    """The spread of the error, as a share of the spread of torch's results."""
    network = fheconv.quantize(model, images(60, 0), config)
    x = images(40, 1)
    with torch.no_grad():
        expected = model(torch.tensor(x)).numpy()
    return (network(x) - expected).std() / expected.std()


@pytest.mark.sampled(5)
@pytest.mark.parametrize("large", [1.0, 100.0, 0.01])
@pytest.mark.parametrize("gate", [torch.sigmoid, torch.tanh, nn.Identity()])
def test_quantized_products_are_close_to_torch(large, gate):
    errors = []
    for seed in range(4):
        torch.manual_seed(seed)
        errors.append(spread_of_error(product(large, gate)))
    assert np.mean(errors) < 0.2  # some gates without bounds are hard: 0.05 to 0.24


def test_the_sizes_of_factors_do_not_matter():
    errors = [spread_of_error(product(large)) for large in (1.0, 100.0, 0.01)]
    np.testing.assert_allclose(errors, errors[0], rtol=0.2)


@pytest.mark.parametrize("shape", [SHAPE, (2, 1, 1)])
def test_balanced_networks_have_equal_results_and_equal_factors(shape):
    def function(m, x):
        y = m.b(x) if shape == SHAPE else torch.sigmoid(m.b(x).mean((2, 3), keepdim=True))
        return m.c(torch.relu(m.a(x)) * 50 * y)

    model = trained(Fn(function, a=conv(2, 4), b=conv(2, 4), c=conv(4, 3, 1)))
    network, x = capture(model, SHAPE), images(10, 2)
    made = balanced(network, network.tensors(x))
    np.testing.assert_allclose(made(x), network(x), rtol=1e-9, atol=1e-9)
    assert all(getattr(layer, "factor_terms", None) is None for layer in made.layers)
    (number,) = (at for at, layer in enumerate(network.layers) if layer.factor_terms is not None)
    sums = made.layers[number].sums(made.tensors(x))
    sizes = [
        abs(both).max(axis=(0, 2, 3)) for both in (sums[:, ::2] + sums[:, 1::2], sums[:, ::2] - sums[:, 1::2])
    ]
    np.testing.assert_allclose(sizes[0], sizes[1], rtol=1e-9)


def test_a_factor_of_zeros_changes_nothing():
    model = trained(Fn(lambda m, x: m.c(torch.relu(m.a(x)) * x), a=conv(2, 2), c=conv(2, 3, 1)))
    network = capture(model, SHAPE)
    made = balanced(network, network.tensors(np.zeros((4, *SHAPE))))
    x = images(10, 2)
    np.testing.assert_allclose(made(x), network(x), rtol=1e-9, atol=1e-9)
