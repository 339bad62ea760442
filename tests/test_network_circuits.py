"""Whole networks compiled, and some of them really encrypted."""

import numpy as np
import pytest

import fheconv
from tests.nets import integer_images, quantize, quantized, random_net, real_images

# Small networks of two and three layers: a convolution, one with pooling, a residual block.
SMALL = [(3, (1, 5, 5)), (11, (1, 5, 5)), (7, (1, 4, 4))]


def dark_network(seed, size, **options):
    """A network calibrated on nearly black images only, which takes white ones."""
    module, images = random_net(seed, depth=1, size=size)
    return quantize(module, np.abs(images) * 0.05, input_range=(0, 1), input_bits=3, **options)


def encrypted(circuit, q):
    """The last accumulators of integer images, by an encrypted run."""
    images = real_images(circuit.network, q)
    return circuit.decrypt(circuit.run(circuit.encrypt(images)), dequantize=False)


@pytest.mark.parametrize("seed", range(12))
def test_compiled_networks_compute_the_clear_integers_when_simulated(seed):
    network = quantized(seed, size=(1, 5, 5), accumulator_bits=6, activation_bits=2, input_bits=3)
    circuit = fheconv.compile(network, fheconv.CompileConfig(p_error=1e-9))
    budget = network.budget()
    assert circuit.cost.lookups == budget.lookups
    assert circuit.cost.accumulator_bits <= 6
    assert circuit.cost.p_error <= 1e-9
    q = integer_images(network, seed, 2)
    x = real_images(network, q)
    np.testing.assert_array_equal(circuit.predict(x), network(x))
    np.testing.assert_array_equal(circuit.predict(x, fhe="simulate"), network(x))
    np.testing.assert_array_equal(circuit._integers(q, "simulate"), network.accumulate(q))


@pytest.mark.parametrize(("seed", "size"), SMALL)
def test_encrypted_results_are_the_clear_integers_on_images_unlike_calibration(seed, size):
    network = dark_network(seed, size, accumulator_bits=5)
    report = network.budget(5).require()
    assert report.proved
    assert 0 < report.lookups <= 40
    circuit = fheconv.compile(network)
    circuit.keygen()
    q = integer_images(network, seed, 3)
    expected = network.accumulate(q)
    assert len(np.unique(expected)) > 5
    np.testing.assert_array_equal(encrypted(circuit, q), expected)
    assert circuit.verify(real_images(network, q[1:2])).ok


def test_maxima_come_out_right_encrypted():
    network = dark_network(8, (1, 4, 4), accumulator_bits=5)
    assert [layer.name for layer in network.budget().layers if layer.kind.startswith("maximum")]
    circuit = fheconv.compile(network)
    circuit.keygen()
    q = integer_images(network, 8, 2)
    np.testing.assert_array_equal(encrypted(circuit, q), network.accumulate(q))
