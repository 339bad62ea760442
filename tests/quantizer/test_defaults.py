"""What a model gets for which no option is set."""

import dataclasses

import numpy as np
import pytest
from torch import nn

import fheconv
import train_rescnn_digits
import train_tinycnn_digits
from digits import digits
from tests.support.nets import random_net

MODELS = {"tinycnn": train_tinycnn_digits, "rescnn": train_rescnn_digits}


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_shipped_models_are_accurate_and_cheap_without_options(name, data):
    model = MODELS[name].shipped()
    images, labels = data.test_images, data.test_labels
    right = (model(images).argmax(1) == labels).float().mean().item()
    network = fheconv.quantize(model, data.train_images)
    circuit = fheconv.compile(network)  # a CostWarning would be an error here
    assert circuit.score(images, labels) >= right - 0.012
    simulated = [circuit.score(images, labels, "simulate") for _ in range(3)]
    assert np.mean(simulated) >= right - 0.015
    assert circuit.cost.complexity <= 8e7 * circuit.cost.lookups
    assert circuit.cost.key_bytes <= 200e6
    assert network.forecast().complexity == pytest.approx(circuit.cost.complexity, rel=0.25)


def test_options_mean_what_they_say():
    module, images = random_net(11)
    default = fheconv.quantize(module, images)
    named = fheconv.quantize(module, images, fheconv.QuantConfig(overflow="defined", rounding_bits=5))
    assert default.config == named.config
    np.testing.assert_array_equal(default(images), named(images))
    exact = fheconv.quantize(module, images, fheconv.QuantConfig())
    assert exact.config == fheconv.QuantConfig()
    assert exact.budget().proved


@pytest.mark.parametrize("filters", [[[1.0, -2.0]], nn.Conv2d(1, 2, 3)])
def test_one_filter_is_exact_without_options(filters):
    network = fheconv.quantize(filters, np.arange(36).reshape(1, 1, 6, 6) % 16)
    assert network.config == fheconv.QuantConfig()
    assert network.budget().proved


def test_only_rounded_lookups_may_fail_often():
    module, images = random_net(15, "conv", size=(1, 4, 4))
    rounded = fheconv.quantize(module, images)
    small = fheconv.QuantConfig(weight_bits=2, activation_bits=2, input_bits=2)
    exact = fheconv.quantize(module, images, small)
    assert fheconv.compile(rounded).config.p_error == 0.03
    assert fheconv.compile(exact).cost.global_p_error <= 1e-5
    for chosen in ({"p_error": 1e-3}, {"global_p_error": 1e-3}):
        config = fheconv.compile(rounded, fheconv.CompileConfig(**chosen)).config
        assert config == dataclasses.replace(fheconv.CompileConfig(), **chosen)


def test_the_failure_probability_goes_with_the_files(tmp_path):
    module, images = random_net(15, "conv", size=(1, 4, 4))
    fheconv.compile(fheconv.quantize(module, images)).save(tmp_path)
    assert fheconv.load_server(tmp_path / "server.zip").config.p_error == 0.03
