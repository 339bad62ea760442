import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fheconv
from fheconv.capture.model import capture
from fheconv.networks.floats import Layer
from fheconv.quantizer.activations import activation_quantizations, input_quantization
from fheconv.quantizer.equalization import equalized
from tests.support.nets import READERS, Readers, random_net


def changed(module, images, **options):
    network = capture(module, images.shape[1:])
    config = fheconv.QuantConfig(**options)
    return network, equalized(network, network.tensors(images), config), config


@settings(max_examples=10)  # torch takes most of a second to export each
@given(st.integers(0, 2**32))
@pytest.mark.slow
def test_the_network_computes_the_same(seed):
    module, images = random_net(seed)
    network, equal, _ = changed(module, images)
    want = network.tensors(images)[-1]
    np.testing.assert_allclose(equal.tensors(images)[-1], want, rtol=1e-9, atol=1e-9 * np.abs(want).max())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", READERS)
def test_the_channels_of_an_activation_get_one_size(name):
    torch.manual_seed(0)
    images = np.random.default_rng(0).normal(size=(20, 1, 6, 6))
    network, equal, _ = changed(Readers(READERS[name]), images)
    want = network.tensors(images)[-1]
    np.testing.assert_allclose(equal.tensors(images)[-1], want, rtol=1e-9, atol=1e-9)
    before, after = (np.abs(one.tensors(images)[1]).max(axis=(0, 2, 3)) for one in (network, equal))
    assert before.max() / before.min() > 10
    assert after.max() / after.min() < 3


def test_channels_that_one_weight_reads_together_stay_as_they_are():
    """PixelShuffle makes one channel of four, which a filter reads with one weight."""
    images = np.random.default_rng(0).normal(size=(4, 1, 6, 6))
    network, equal, _ = changed(
        Readers(lambda: nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(1, 2, 3))), images
    )
    assert equal is network


def test_what_is_added_up_as_it_is_stays_so():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(i, 2, 3, padding=1).double() for i in (1, 1, 2))

        def forward(self, x):
            return self.c(torch.relu(torch.relu(self.a(x)) + torch.relu(self.b(x))))

    images = np.random.default_rng(0).normal(size=(4, 1, 6, 6))
    network, equal, _ = changed(Residual(), images)
    added = equal.layers[2]
    assert isinstance(added, Layer)
    assert all(term.is_plain() for term in added.terms)
    # The sum is read by weights, and has its channels made equal.
    activations = zip(network.layers[:-1], equal.layers[:-1], strict=True)
    assert [a.activation is b.activation for a, b in activations] == [True, True, False]


@pytest.mark.parametrize("accumulator_bits", [5, 6])
def test_a_layer_that_reads_channels_of_unequal_size_loses_less(accumulator_bits):
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    images, others = rng.normal(size=(2, 100, 1, 6, 6))
    module = Readers(READERS["convolution"])
    network, equal, config = changed(module, images, accumulator_bits={"conv": 8, "reader": accumulator_bits})
    image = input_quantization(fheconv.quantize(module, images, config).calibrated, config)
    errors = []
    for one in (network, equal):
        tensors = one.tensors(others)
        quantization = activation_quantizations(one, one.tensors(images), image, config)[1]
        off = (quantization.nearest(tensors[1]) - quantization.zero_point) * quantization.scale - tensors[1]
        # By channel, as a share of what the channel holds.
        errors.append(
            (np.square(off).mean(axis=(0, 2, 3)) / np.square(tensors[1]).mean(axis=(0, 2, 3))).max()
        )
    assert errors[1] < errors[0] / 2
