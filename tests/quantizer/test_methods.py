from typing import get_args

import numpy as np
import pytest

import fheconv
from fheconv.basics.config import Method
from fheconv.networks.floats import Network
from fheconv.quantizer.rounding.methods import METHODS, chosen_method
from tests.support.nets import integer_images, quantize, quantized, random_net

NET = ("conv", "residual")  # with these blocks, seed 3 is a net of 4 layers


def test_every_method_of_a_configuration_is_in_the_table():
    assert set(METHODS) == set(get_args(Method)) - {"auto"}


def test_auto_looks_at_the_images_wherever_they_tell_something():
    conv = Network.of(fheconv.Conv.of(np.ones((2, 2))), (1, 4, 4))
    chosen = {
        "one": chosen_method(conv, fheconv.QuantConfig()),
        "one within a budget": chosen_method(conv, fheconv.QuantConfig(accumulator_bits=7)),
        "many": chosen_method(quantized(3, *NET).source, fheconv.QuantConfig()),
    }
    assert chosen["one"] is METHODS["mse"]
    assert chosen["one within a budget"] is chosen["many"] is METHODS["accumulator"]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_chosen_by_its_name(method):
    network = quantized(3, *NET).source
    assert chosen_method(network, fheconv.QuantConfig(method=method)) is METHODS[method]


@pytest.mark.parametrize("method", METHODS)
def test_enough_bits_come_near_to_the_float_network(method):
    module, images = random_net(3, *NET)
    network = quantize(module, images, method=method, weight_bits=6, activation_bits=5, input_bits=6)
    expected = network.source(images)
    assert np.abs(network(images) - expected).max() < 0.15 * np.ptp(expected)
    assert network.budget().proved


def test_methods_that_look_at_the_images_lose_less_than_those_that_do_not():
    module, images = random_net(3, *NET)
    expected = quantized(3, *NET).source(images)
    error = {
        method: np.square(
            quantize(module, images, method=method, weight_bits=2, activation_bits=5, input_bits=6)(images)
            - expected
        ).mean()
        for method in METHODS
    }
    assert max(error["gptq"], error["accumulator"]) < min(error["minmax"], error["mse"])


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"accumulator"}))
def test_a_width_that_a_method_misses_is_refused_with_the_one_that_keeps_to_it(method):
    module, images = random_net(3, *NET)
    with pytest.raises(
        fheconv.AccumulatorOverflowError, match=r'accumulator_bits=6 .*"accumulator"'
    ) as error:
        quantize(module, images, accumulator_bits=6, method=method)
    assert error.value.layer in [layer.name for layer in quantized(3, *NET).layers]
    assert error.value.value > error.value.limit == 63
    assert quantize(module, images, accumulator_bits=6, method="accumulator").budget(6).fits


@pytest.mark.parametrize("method", METHODS)
def test_rounding_limits_only_the_accumulators_that_keep_to_limits(method):
    network = quantized(3, *NET, rounding_bits=3, weight_bits=6, method=method)
    widest = max(layer.lookup.bits for layer in network.layers[:-1])
    assert (widest <= 7) == (method == "accumulator")
    q = integer_images(network, 0, 4)
    assert network.accumulate(q).shape == (len(q), *network.accumulator_shape)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", METHODS)
def test_the_weights_of_every_method_run_encrypted(method):
    rng = np.random.default_rng(0)
    images = rng.random((20, 1, 4, 4))
    config = fheconv.QuantConfig(method=method, weight_bits=4, input_bits=4)
    circuit = fheconv.compile(fheconv.quantize(rng.normal(size=(2, 1, 3, 3)), images, config))
    circuit.keygen()
    assert circuit.verify(images[:2]).wrong == 0
