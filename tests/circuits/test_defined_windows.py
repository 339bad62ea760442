"""Circuits with windows far narrower than the worst image needs compute the clear integers for it too."""

import numpy as np
import pytest
import torch
from torch import nn

import fheconv
from tests.support.nets import integer_images, quantize, real_images

ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.GELU, nn.LeakyReLU)


def narrow_network(seed, **options):
    """A small network, calibrated on dim images, with windows for these, and some images of all kinds."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    activation = ACTIVATIONS[seed % len(ACTIVATIONS)]
    blocks = [nn.Conv2d(1, 2, 3, padding=int(rng.integers(2))), activation()]
    if rng.integers(2):
        blocks.append(nn.MaxPool2d(2))
    blocks += [nn.Conv2d(2, 2, 2, padding=1), activation(), nn.Flatten(), nn.LazyLinear(3)]
    module = nn.Sequential(*blocks).eval()
    low = -1.0 if rng.integers(2) else 0.0
    images = rng.uniform(0.2 * low, 0.3, (12, 1, 4, 4))
    module(torch.tensor(images, dtype=torch.float32))  # gives the last layer its size
    settings = {"weight_bits": 3, "activation_bits": 3, "input_bits": 3, "input_range": (low, 1), "margin": 0}
    network = quantize(module.double(), images, overflow="defined", **{**settings, **options})
    return network, integer_images(network, seed, 20)


def outside(network, q):
    """The share of accumulators outside the windows of their lookups."""
    tensors, shares = network.tensors(q), []
    for layer in network.layers:
        if (table := getattr(layer, "lookup", None)) is not None:
            offset = layer.accumulate(tensors) - table.minimum.reshape(-1, *[1] * (len(layer.shape) - 1))
            shares.append(((offset < 0) | (offset >= 2**table.bits)).mean())
    return max(shares)


@pytest.mark.sampled(79)
@pytest.mark.parametrize("seed", range(80))
def test_exact_lookups_compute_the_clear_integers_when_simulated(seed):
    network, q = narrow_network(seed)
    assert not network.budget().proved
    assert outside(network, q) > 0
    circuit = fheconv.compile(network, fheconv.CompileConfig(p_error=2**-40))
    images = real_images(network, q)
    np.testing.assert_array_equal(circuit.predict(images, fhe="simulate"), network(images))
    np.testing.assert_array_equal(circuit.predict(images, fhe="disable"), network(images))


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.sampled(4)
def test_exact_lookups_compute_the_clear_integers_encrypted(seed):
    network, q = narrow_network(seed, weight_bits=2, activation_bits=2, input_bits=2)
    images = real_images(network, q)
    images = images[np.argsort([-outside(network, one[None]) for one in q])[:3]]
    assert outside(network, network.input.integers(images)) > 0
    circuit = fheconv.compile(network)
    circuit.keygen()
    np.testing.assert_array_equal(circuit.predict(images, fhe="execute"), network(images))


def one_lookup(seed):
    """A network whose results show each activation: the last layer multiplies each by one integer."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    last = nn.Conv2d(2, 2, 1, groups=2, bias=False)
    module = nn.Sequential(nn.Conv2d(1, 2, 3), ACTIVATIONS[seed % 4](), last).double().eval()
    images = rng.uniform(0, 0.3, (12, 1, 5, 5))
    network = quantize(
        module, images, overflow="defined", rounding_bits=3 + seed % 3, activation_bits=3, weight_bits=3,
        input_bits=4, input_range=(0, 1), margin=0,
    )  # fmt: skip
    return network, integer_images(network, seed, 3)


@pytest.mark.sampled(13)
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("fhe", ["simulate", "execute"])
def test_rounded_lookups_are_at_most_one_step_off_also_outside_the_window(seed, fhe):
    network, q = one_lookup(seed)
    layer, last = network.layers
    table = layer.lookup
    assert table.dropped_bits
    assert outside(network, q) > 0
    circuit = fheconv.compile(network, fheconv.CompileConfig(p_error=1e-3))
    if fhe == "execute":
        circuit.keygen()
    accumulators, step = layer.accumulate([q]), 2**table.dropped_bits
    possible = [last.accumulate([q, table(accumulators + away)]) for away in (-step, 0, step)]
    got = np.rint(circuit.predict(real_images(network, q), fhe=fhe) / last.scale).astype(int)
    assert (got == np.stack(possible)).any(axis=0).all()
    assert (got == possible[1]).mean() > 0.5
