"""Predicting and scoring, with the circuit in hand and with the keys alone."""

import numpy as np
import pytest

import fheconv
from fheconv.basics.samples import share_right
from tests.support.nets import quantize, random_net


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A circuit of a classifier with keys, its client with the same keys, its server, images and classes."""
    for seed in range(100):
        module, images = random_net(seed, "conv", size=(1, 5, 5))
        network = quantize(module, images, weight_bits=2, activation_bits=2, input_bits=2)
        if network.output_shape == (3,):
            break
    circuit = fheconv.compile(network)
    circuit.keygen()
    folder = tmp_path_factory.mktemp("circuit")
    circuit.save(folder)
    circuit.save_keys(folder / "keys")
    client = fheconv.load_client(folder / "client.zip")
    client.load_keys(folder / "keys")
    outputs = network(images)
    classes = outputs.argmax(axis=1)
    classes[::3] = (classes[::3] + 1) % 3
    return circuit, client, fheconv.load_server(folder / "server.zip"), images, classes


@pytest.mark.slow
def test_a_client_predicts_what_the_circuit_predicts(made):
    circuit, client, server, images, _ = made
    np.testing.assert_array_equal(client.predict(images[:2], server=server), circuit.predict(images[:2]))
    assert client.predict(images[0], server=server).shape == (3,)


@pytest.mark.parametrize("fhe", ["disable", "simulate"])
def test_the_score_is_the_share_right(made, fhe):
    circuit, _, _, images, classes = made
    assert circuit.score(images, classes, fhe=fhe) == pytest.approx(2 / 3)
    assert circuit.score(images, classes, fhe) == circuit.score(images, classes)
    assert circuit.network.score(images, classes) == circuit.score(images, classes)


def test_the_score_of_encrypted_images(made):
    circuit, client, server, images, classes = made
    assert circuit.score(images[:3], classes[:3], "execute") == pytest.approx(2 / 3)
    assert client.score(images[:3], classes[:3], server=server) == pytest.approx(2 / 3)


def test_a_client_says_what_it_lacks(made):
    _, client, server, images, _ = made
    with pytest.raises(fheconv.InvalidArgumentError, match="server="):
        client.predict(images)
    with pytest.raises(fheconv.InvalidArgumentError, match="not here"):
        client.predict(images, "simulate", server=server)


@pytest.mark.parametrize(
    ("outputs", "classes"),
    [
        (np.zeros((2, 3)), [0]),
        (np.zeros((2, 3)), [0.0, 1.0]),
        (np.zeros((2, 3, 1)), [0, 1]),
        (np.zeros((0, 3)), np.zeros(0, int)),
        (np.zeros((2, 3)), [[0, 1]]),
    ],
)
def test_scores_need_a_class_for_each_image(outputs, classes):
    with pytest.raises(fheconv.InvalidArgumentError, match="a class"):
        share_right(outputs, classes)
