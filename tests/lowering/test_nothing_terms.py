"""Terms whose weights are all zero, and results that are constant, encrypted."""

import numpy as np
import pytest
import torch
from torch import nn

import fheconv
from fheconv.lowering.lower import lower

RANGES = {"unsigned": (0, 15), "signed": (-8, 7)}


class Two(nn.Module):
    """A sum of two convolutions, some of whose weights are zeros."""

    def __init__(self, zeros):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 2, 2), nn.Conv2d(1, 2, 2)
        for name in zeros:
            nn.init.zeros_(getattr(self, name).weight)

    def forward(self, x):
        return self.a(x)[:, :, :2, :2] + self.b(x.flip(-1))[:, :, 1:, 1:]


def quantized(model, shape, signs):
    low, high = RANGES[signs]
    torch.manual_seed(0)
    x = np.random.default_rng(0).integers(low, high + 1, (8, *shape)).astype(float)
    x.flat[:2] = low, high
    return fheconv.quantize(model, x), x


def verified(network, x, **options):
    circuit = fheconv.compile(network, fheconv.CompileConfig(p_error=1e-6, **options))
    circuit.keygen()
    images = x[:3]
    np.testing.assert_allclose(circuit.predict(images, fhe="execute"), network(images))


@pytest.mark.sampled(11)
@pytest.mark.parametrize("signs", RANGES)
@pytest.mark.parametrize(
    ("zeros", "engine"), [("a", "auto"), ("b", "auto"), ("ab", "auto"), ("a", "conv"), ("b", "conv")]
)
def test_a_term_of_zeros(signs, zeros, engine):
    network, x = quantized(Two(zeros), (1, 4, 4), signs)
    lowered = lower(network, engine)
    if zeros != "ab":  # of the two terms one is left
        assert lower(network, "conv").layers[-1].engine == "conv"
    q, _ = network.quantize_input(x)
    results = lowered.function(lowered.interface.prepare(q))
    np.testing.assert_array_equal(lowered.interface.accumulators(results, len(q)), network.accumulate(q))
    verified(network, x, engine=engine)


@pytest.mark.sampled(7)
@pytest.mark.parametrize("signs", RANGES)
@pytest.mark.parametrize("lanes", [1, 3])
def test_a_layer_of_zeros(signs, lanes):
    conv = nn.Conv2d(1, 2, 2)
    nn.init.zeros_(conv.weight)
    verified(*quantized(conv, (1, 3, 3), signs), lanes=lanes)
    verified(*quantized(Two("ab"), (1, 4, 4), signs), lanes=lanes)


@pytest.mark.parametrize("lanes", [1, 4])
def test_results_narrower_than_images(lanes):
    """Offset form takes less than two's complement, and images far from zero differ little."""
    x = np.random.default_rng(0).integers(-1, 201, (8, 1, 2, 2)).astype(float)
    x.flat[:2] = -1, 200
    network = fheconv.quantize(np.ones((1, 1, 1, 1)), x)
    verified(network, x, lanes=lanes)
    x = np.random.default_rng(0).integers(200, 204, (8, 1, 2, 2)).astype(float)
    verified(fheconv.quantize(np.ones((1, 1, 1, 1)), x), x, lanes=lanes)


@pytest.mark.slow
@pytest.mark.parametrize("signs", RANGES)
@pytest.mark.parametrize("place", [0, 2])
def test_a_layer_of_zeros_beside_lookups(signs, place):
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Conv2d(2, 2, 2))
    nn.init.zeros_(model[place].weight)
    verified(*quantized(model, (1, 3, 3), signs))


def test_weights_of_their_own_for_each_value():
    """Hundreds of groups, whose convolution would take Concrete minutes to compile."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 16, 16))

        def forward(self, x):
            return x * self.weight

    for signs in RANGES:
        verified(*quantized(Scaled(), (1, 16, 16), signs))
