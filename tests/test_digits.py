"""The two trained models of models/, from float to encrypted. Accuracies are on the 450 held-out images."""

import math

import numpy as np
import pytest
import torch

import fheconv
import train_rescnn_digits
import train_tinycnn_digits
from digits import digits
from fheconv import CompileConfig, QuantConfig

MODELS = {"tinycnn": train_tinycnn_digits, "rescnn": train_rescnn_digits}
# Rounded to 6 bits; the logits are kept to a width that makes the circuit no dearer.
ROUNDED = {
    "tinycnn": QuantConfig(rounding_bits=6),
    "rescnn": QuantConfig(rounding_bits=6, accumulator_bits={"fc1": 9}),
}


@pytest.fixture(scope="module")
def data():
    return digits()


def quantized(name, data, config):
    return fheconv.quantize(MODELS[name].shipped(), data.train_images, config)


def accuracy(logits, data):
    return (logits.argmax(axis=1) == data.test_labels.numpy()).mean()


@pytest.mark.filterwarnings("ignore::fheconv.CostWarning")  # on slow machines; it is only compiled
def test_seven_bits_proved_at_93_percent(data):
    network = quantized("tinycnn", data, QuantConfig(accumulator_bits=7))
    report = network.budget(accumulator_bits=7).require()
    assert report.proved
    assert max(layer.accumulator_bits for layer in report.layers) <= 7
    assert accuracy(network(data.test_images), data) >= 0.93
    assert fheconv.compile(network).cost.lookups == 296


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("tinycnn", 0.973), ("rescnn", 0.97)])
def test_rounded_to_six_bits(name, least, data):
    network = quantized(name, data, ROUNDED[name])
    assert accuracy(network(data.test_images), data) >= least
    assert network.budget().proved
    circuit = fheconv.compile(network, CompileConfig(p_error=0.05))
    simulated = circuit.predict(data.test_images, fhe="simulate")
    # Noise costs at most as much as quantizing did.
    assert accuracy(simulated, data) >= least - 0.02


def test_only_what_is_read_is_looked_up_and_encrypted(data):
    """384 activations, of which the strided second convolution leaves 88 unread, and the last row and column
    of the pixels with them."""
    network = quantized("tinycnn", data, QuantConfig(rounding_bits=6))
    activations = sum(math.prod(layer.shape) for layer in network.layers[:-1])
    circuit = fheconv.compile(network, CompileConfig(p_error=0.05))
    assert (activations, circuit.cost.lookups) == (384, 296)
    assert [layer.lookups for layer in circuit.cost.layers] == [200, 64, 32, 0]
    unread = data.test_images.numpy().copy()
    unread[:, :, 7, :] = 16 - unread[:, :, 7, :]
    unread[:, :, :, 7] = 16 - unread[:, :, :, 7]
    np.testing.assert_array_equal(network(unread), network(data.test_images))


@pytest.mark.parametrize(("name", "images", "agree"), [("tinycnn", 6, 5), ("rescnn", 3, 2)])
@pytest.mark.slow
def test_encrypted_classes_are_those_in_clear(name, images, agree, data):
    """Rounding is approximate, so that an image between two classes may go either way: these are the first
    images whose two greatest logits differ by more than a twentieth of all logits' range, nine in ten."""
    network = quantized(name, data, ROUNDED[name])
    logits = network(data.test_images)
    ordered = np.sort(logits, axis=1)
    clear_cut = np.flatnonzero(ordered[:, -1] - ordered[:, -2] > 0.05 * np.ptp(logits))
    assert len(clear_cut) > 0.9 * len(logits)
    chosen = clear_cut[:images]
    circuit = fheconv.compile(network, CompileConfig(p_error=0.05))
    circuit.keygen()
    encrypted = circuit.predict(data.test_images[chosen], fhe="execute")
    assert (encrypted.argmax(axis=1) == logits[chosen].argmax(axis=1)).sum() >= agree
    # More than the class: what rounding adds is small beside the logits.
    assert np.abs(encrypted - logits[chosen]).mean() < 0.1 * np.ptp(logits)


@pytest.mark.slow
def test_lookups_of_five_bits_are_exact_encrypted(data):
    """A small network on real digits, at Concrete's own failure probability of 1 in 100,000 an image."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.Conv2d(3, 4, 2),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 10),
    )
    network = fheconv.quantize(model, data.train_images[:200], QuantConfig(accumulator_bits=5, input_bits=3))
    assert network.budget(accumulator_bits=5).require().proved
    circuit = fheconv.compile(network)
    assert circuit.cost.lookups == 27 + 16
    circuit.keygen()
    images = data.test_images[:20]
    integers = circuit.decrypt(circuit.run(circuit.encrypt(images)), dequantize=False)
    np.testing.assert_array_equal(integers, network.integers(images))
