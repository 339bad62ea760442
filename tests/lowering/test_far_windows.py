"""Circuits count from the blank image: it costs nothing where windows and activations lie."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import fheconv
from fheconv.basics.arrays import along_channels, frozen
from fheconv.lowering.lower import lower
from fheconv.networks.integers import IntegerNetwork
from tests.support.nets import integer_images, quantize, real_images

ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.GELU, nn.LeakyReLU)
WINDOWS = {
    "exact": {"activation_bits": 2},
    "rounded": {"activation_bits": 3, "rounding_bits": 4},
    "proved": {"activation_bits": 2, "overflow": "proved"},
}


def padded_network(seed, **options):
    """Three convolutions, two of which pad, of images that may be negative."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    activation = ACTIVATIONS[seed % len(ACTIVATIONS)]
    module = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=int(rng.integers(3))), activation(),
        nn.Conv2d(2, 3, 3, stride=2, padding=1), activation(), nn.Conv2d(3, 2, 2),
    )  # fmt: skip
    images = rng.uniform(float(rng.choice([-1.0, 0.0])), 1, (12, 1, 6, 6))
    settings = {"weight_bits": 3, "input_bits": 2, "overflow": "defined"}
    return quantize(module.double().eval(), images, **{**settings, **options})


def moved(network, by):
    """The same network, with `by` added to all activations of its first layer."""
    first, second, *rest = network.layers
    output = first.lookup.output
    output = replace(
        output,
        minimum=output.minimum + by,
        maximum=output.maximum + by,
        zero_point=output.zero_point + by,
    )
    table = replace(first.lookup, tables=frozen(first.lookup.tables + by), output=output)
    reader = replace(second, inputs=(output,))
    blank = np.zeros((1, *first.shape), np.int64)
    by_channel = (reader.accumulate([None, blank + output.zero_point]) -
                  second.accumulate([None, blank + output.zero_point - by]))[0, :, 0, 0]  # fmt: skip
    window = replace(second.lookup, minimum=frozen(second.lookup.minimum + by_channel))
    layers = (replace(first, lookup=table), replace(reader, lookup=window), *rest)
    return replace(IntegerNetwork.of(network), layers=layers)


@pytest.mark.sampled(17)
@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("engine", ["auto", "conv", "matrix", "shifts"])
@pytest.mark.parametrize("seed", range(8))
def test_the_function_is_what_torch_computes(seed, engine, windows):
    network = padded_network(seed, **WINDOWS[windows])
    lowered = lower(network, engine)
    q = integer_images(network, seed, 5)
    x = torch.tensor(q, dtype=torch.float64)
    for layer, quantization in zip(network.layers, network.quantizations, strict=True):
        kernel = layer.convolution
        (above, below), (left, right) = kernel.geometry.padding
        x = functional.pad(x, (left, right, above, below), value=float(quantization.zero_point))
        x = functional.conv2d(
            x, torch.tensor(kernel.weight, dtype=torch.float64), stride=kernel.geometry.stride
        )
        if layer.lookup is not None:
            x = torch.tensor(layer.lookup(x.numpy().astype(np.int64)), dtype=torch.float64)
    results = lowered.function(lowered.interface.prepare(q))
    assert results.min() >= 0
    expected = x.numpy() + network.last.bias
    np.testing.assert_array_equal(lowered.interface.accumulators(results, len(q)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("by", [-1000, -14, 300])
@pytest.mark.parametrize("windows", ["exact", "rounded"])
@pytest.mark.parametrize("seed", range(4))
def test_moved_activations_cost_the_same_and_give_the_same(seed, windows, by):
    network = padded_network(seed, **WINDOWS[windows])
    other = fheconv.QuantizedNetwork.of(moved(network, by))
    x = real_images(network, integer_images(network, seed, 5))
    np.testing.assert_array_equal(network(x), other(x))
    config = fheconv.CompileConfig(p_error=2**-40)
    one, two = (fheconv.compile(each, config) for each in (network, other))
    assert two.cost.complexity == one.cost.complexity == network.forecast(config).complexity
    assert two.cost.key_bytes == one.cost.key_bytes
    if windows == "exact":
        np.testing.assert_array_equal(two.predict(x, fhe="simulate"), network(x))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("seed", range(12))
def test_a_constant_is_an_accumulator_of_the_blank_image(seed):
    """Concrete sees the blank image: whatever windows are, it sees values inside them."""
    network = padded_network(seed, activation_bits=3, rounding_bits=4)
    blank = lower(network).inputset()
    tensors = network.tensors(blank.reshape(1, *network.input_shape))
    for layer in network.layers[:-1]:
        offset = layer.accumulate(tensors) - along_channels(layer.lookup.minimum, len(layer.shape))
        assert offset.min() >= 0
        assert offset.max() < 2**layer.lookup.bits
