"""Circuits of networks that were trained for integers."""

import numpy as np
import pytest
import torch
from torch import nn

import fheconv
from tests.support.trained import Quantizer, Weighted, outputs


@pytest.fixture(scope="module")
def trained():
    rng = np.random.default_rng(4)
    torch.manual_seed(4)
    first, second = nn.Conv2d(1, 2, 2, stride=2), nn.Linear(8, 3)
    image, activation = Quantizer(rng, 2.0, signed=True, bits=2), Quantizer(rng, 2.0, bits=2)
    head = nn.Flatten(), Weighted(second, rng, 3), Quantizer(rng, 5.0, signed=True)
    model = nn.Sequential(image, Weighted(first, rng, 1), nn.ReLU(), activation, *head)
    return model, rng.normal(0, 1, (3, 1, 4, 4))


@pytest.mark.slow
def test_an_encrypted_run_gives_what_the_trained_model_gives(trained, tmp_path):
    """Also for images beyond its first quantizer, and from files. Images take no lookups."""
    model, images = trained
    circuit = fheconv.compile(fheconv.quantize(model, images[:1]))
    assert 0 < circuit.cost.lookups <= 8  # the activations; 16 more would be those of the image
    expected = outputs(model, 3 * images)
    assert len({*expected.ravel()}) > 2
    np.testing.assert_allclose(circuit.predict(3 * images, fhe="disable"), expected, atol=1e-5)
    circuit.keygen()
    np.testing.assert_allclose(circuit.predict(3 * images[:1], fhe="execute"), expected[:1], atol=1e-5)
    circuit.save(tmp_path)
    client = fheconv.load_client(tmp_path / "client.zip")
    client.keygen()
    server = fheconv.load_server(tmp_path / "server.zip")
    results = server.run(client.encrypt(3 * images[1]), client.evaluation_keys)
    np.testing.assert_allclose(client.decrypt(results), expected[1], atol=1e-5)
