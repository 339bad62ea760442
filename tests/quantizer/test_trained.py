"""Networks that were trained for integers keep their integers: torch is the oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fheconv
from fheconv.networks.integers import QuantizedLayer
from fheconv.quantizer.trained import grid
from tests.support.trained import Quantizer, Weighted, outputs, trained_net


def assert_equal(network, model, images):
    """Torch multiplies scales in float32."""
    expected = outputs(model, images)
    np.testing.assert_allclose(network(images), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.sampled(7)
@pytest.mark.parametrize("seed", range(12))
def test_a_trained_network_gives_what_torch_gives_for_images_that_calibration_never_saw(seed):
    model, images = trained_net(seed)
    assert_equal(fheconv.quantize(model, images[:1]), model, images)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", [1, 5])
def test_calibration_chooses_nothing(seed):
    """Two networks of different images are the same."""
    model, images = trained_net(seed)
    a, b = (fheconv.quantize(model, batch) for batch in (images[:1], images[1:]))
    assert a.input == b.input or images.dtype.kind == "i"
    for one, other in zip(a.layers, b.layers, strict=True):
        if isinstance(one, QuantizedLayer):
            np.testing.assert_array_equal(one.scale, other.scale)
            if one.lookup is not None:
                np.testing.assert_array_equal(one.lookup.tables, other.lookup.tables)


def test_the_first_quantizer_is_applied_by_the_client_and_clips_as_torch_does():
    rng = np.random.default_rng(0)
    conv = Weighted(nn.Conv2d(1, 2, 3), rng)
    model = nn.Sequential(Quantizer(rng, 2.0, signed=True), conv, nn.ReLU(), Quantizer(rng, 3.0), conv2(rng))
    images = rng.normal(0, 3, (8, 1, 6, 6))
    network = fheconv.quantize(model, images)
    (first, _, _, last, _) = model
    assert (network.input.scale, network.input.maximum) == (first.scale, first.high)
    assert (network.quantizations[1].scale, network.quantizations[1].maximum) == (last.scale, last.high)
    assert len(network.layers) == 2
    assert_equal(network, model, 100 * images)


class Clipped(nn.Module):
    """Rounds to thirds, and clips at numbers that are no thirds."""

    def forward(self, x):
        return torch.clamp(torch.round(x * 3) / 3, -0.5, 0.5)


@pytest.mark.parametrize(
    ("middle", "words"),
    [(Clipped(), "What the activations round to in '0'"), (nn.ReLU(), "The weights in '0' cannot")],
)
def test_what_cannot_be_kept_is_said(middle, words):
    rng = np.random.default_rng(0)
    first = Weighted(nn.Conv2d(1, 2, 3), rng) if isinstance(middle, Clipped) else nn.Conv2d(1, 2, 3).double()
    model = nn.Sequential(first, middle, conv2(rng))
    with pytest.warns(fheconv.RequantizationWarning, match=words):
        fheconv.quantize(model, rng.normal(0, 1, (8, 1, 6, 6)))


def conv2(rng):
    return Weighted(nn.Conv2d(2, 2, 3), rng)


class ReadTwice(nn.Module):
    """Adds images as they are to those that a quantizer has rounded."""

    def __init__(self, other):
        super().__init__()
        rng = np.random.default_rng(0)
        self.first, self.conv, self.other = Quantizer(rng, 3.0), Weighted(nn.Conv2d(1, 1, 1), rng), other

    def forward(self, x):
        return self.conv(self.first(x)) + self.other(x)


def test_a_quantizer_that_not_all_read_takes_lookups():
    images = np.random.default_rng(0).integers(0, 4, (4, 1, 3, 3))
    model = ReadTwice(nn.Identity())
    network = fheconv.quantize(model, images, fheconv.QuantConfig(input_bits=2))
    assert network.input.scale == 1
    assert len(network.layers) == 2
    both = fheconv.quantize(ReadTwice(model.first), images)
    assert len(both.layers) == 1
    assert both.input.scale == model.first.scale


@pytest.mark.parametrize(("a", "b"), [(0.3, 0.3), (0.25, 0.5), (0.3, 0.7)])
def test_the_integers_of_branches_with_and_without_a_common_scale_are_exact(a, b):
    """For all pairs of what the branches can be."""

    class Sum(nn.Module):
        def forward(self, x):
            one = torch.fake_quantize_per_tensor_affine(x[:, :1], a, 2, 0, 15)
            two = torch.fake_quantize_per_tensor_affine(x[:, 1:], b, 0, 0, 15)
            return torch.fake_quantize_per_tensor_affine(one + two, 0.41, 1, 0, 15) * 2

    pairs = np.stack(np.meshgrid((np.arange(16) - 2) * a, np.arange(16) * b))[None]
    config = fheconv.QuantConfig(input_bits=10)
    network = fheconv.quantize(Sum(), pairs, config)
    quantized, model = network.quantizations, Sum()
    assert [q.maximum for q in quantized[1:]] == [15] * (len(quantized) - 1)
    assert_equal(network, model, pairs)


@given(st.integers(0, 2**32), st.integers(1, 255), st.floats(1e-6, 1e6))
def test_integers_are_read_off_their_products_with_a_float32_scale(seed, most, scale):
    rng = np.random.default_rng(seed)
    integers = rng.integers(-most, most + 1, (3, 7))
    integers[0] = 0
    found = grid((integers * np.float32(scale)).astype(np.float32))
    assert found is not None
    divisors = np.maximum(np.gcd.reduce(integers, axis=1), 1)
    np.testing.assert_array_equal(found[0], integers // divisors[:, None])
    np.testing.assert_allclose(
        found[1][1:], np.float32(scale) * divisors[1:] * found[0][1:].any(axis=1), 1e-6
    )


def test_weights_that_are_no_multiples_of_a_scale_have_no_grid():
    assert grid(np.random.default_rng(0).normal(size=(2, 9))) is None


def test_a_method_that_the_configuration_names_rounds_the_weights_anew():
    model, images = trained_net(1)
    config = fheconv.QuantConfig(method="minmax", weight_bits=2)
    rounded = fheconv.quantize(model, images, config)
    assert all(layer.weight_range == (-1, 1) for layer in rounded.layers if isinstance(layer, QuantizedLayer))
    assert rounded.quantizations[-1] == fheconv.quantize(model, images).quantizations[-1]


def test_the_configuration_of_a_trained_network_has_its_own_widths():
    rng = np.random.default_rng(0)
    layer = Weighted(nn.Conv2d(1, 2, 3), rng)
    network = fheconv.quantize(layer, rng.integers(0, 4, (2, 1, 5, 5)))
    assert network.config.of_layer("weight_bits", network.last.name) == layer.most.bit_length() + 1
