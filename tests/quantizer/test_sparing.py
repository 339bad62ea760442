"""Coarse networks are quantized with a bit less where that is as good."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fheconv
from fheconv.capture.model import capture
from fheconv.quantizer.layerwise import quantize_network
from fheconv.quantizer.sparing import SHARE, results_error

COARSE = fheconv.QuantConfig(overflow="defined", rounding_bits=3, activation_bits=5)


def network_and_images(seed, images=40):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4))
    return module.eval(), torch.rand(images, 1, 6, 6)


@settings(max_examples=5)
@given(st.integers(0, 2**32), st.integers(3, 5), st.integers(3, 5), st.integers(3, 4))
def test_fewer_bits_are_taken_exactly_where_more_do_not_pay(seed, weights, activations, kept):
    module, images = network_and_images(seed)
    given_config = replace(COARSE, weight_bits=weights, activation_bits=activations, rounding_bits=kept)
    quantized = fheconv.quantize(module, images, given_config)
    source, x = capture(module, images.shape[1:]), images.numpy()
    meant = module(images).detach().numpy()

    def error(**fewer):
        config = replace(given_config, **fewer)
        return results_error(quantize_network(source, x, quantized.calibrated, config), x, meant)

    whole = error()
    others = []
    if min(kept, activations) <= 3:
        others = [error(weight_bits=weights - 1), error(activation_bits=activations - 1)]
    paying = all(other >= whole * (1 + SHARE) for other in others)
    best = whole if paying else min(others)
    assert results_error(quantized, x, meant) == best
    assert (quantized.config == given_config) == paying


@pytest.mark.parametrize(
    "change",
    [
        {"rounding_bits": 4, "activation_bits": 4},
        {"overflow": "proved"},
        {"activation_bits": None, "activation_levels": 9},
        {"weight_bits": {"0": 5}},
        {"method": "minmax"},
    ],
)
def test_other_configurations_mean_what_they_say(change):
    module, images = network_and_images(0)
    config = replace(COARSE, **change)
    assert fheconv.quantize(module, images, config).config == config


def test_few_images_do_not_tell_which_is_better():
    module, images = network_and_images(0, images=5)
    assert fheconv.quantize(module, images, COARSE).config == COARSE


def test_the_results_error_is_that_of_real_results():
    module, images = network_and_images(3)
    quantized = fheconv.quantize(module, images, COARSE)
    meant = module(images).detach().numpy()
    expected = np.square(quantized(images.numpy()) - meant).mean()
    assert results_error(quantized, images.numpy(), meant) == pytest.approx(expected)
