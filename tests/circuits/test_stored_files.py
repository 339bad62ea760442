"""Files of an earlier version still open. tests/circuits/stored/make.py made them."""

import json
import zipfile

import numpy as np
import pytest
from scipy.signal import correlate2d

import fheconv
from tests.circuits.stored.make import BIAS, FOLDER, IMAGE, WEIGHT

EXPECTED = correlate2d(IMAGE[0], WEIGHT[0, 0], mode="valid")[None] + BIAS


@pytest.fixture
def client():
    client = fheconv.load_client(FOLDER / "filter" / "client.zip")
    client.load_keys(FOLDER / "filter" / "keys.secret")
    return client


def test_a_stored_result_is_decrypted_with_the_stored_keys(client):
    result = fheconv.Ciphertext.load(FOLDER / "filter" / "result.ct")
    np.testing.assert_array_equal(client.decrypt(result), EXPECTED)


def test_a_stored_server_runs_a_stored_image_under_stored_keys(client):
    server = fheconv.load_server(FOLDER / "filter" / "server.zip")
    keys = fheconv.EvaluationKeys.load(FOLDER / "filter" / "evaluation.keys")
    image = fheconv.Ciphertext.load(FOLDER / "filter" / "image.ct")
    np.testing.assert_array_equal(client.decrypt(server.run(image, keys)), EXPECTED)


def test_new_ciphertexts_and_stored_keys_go_together(client):
    server = fheconv.load_server(FOLDER / "filter" / "server.zip")
    other = 15 - IMAGE
    expected = correlate2d(other[0], WEIGHT[0, 0], mode="valid")[None] + BIAS
    results = server.run(client.encrypt(other), client.evaluation_keys)
    np.testing.assert_array_equal(client.decrypt(results), expected)


@pytest.mark.slow
def test_a_stored_circuit_with_lookups_runs_with_new_keys():
    client = fheconv.load_client(FOLDER / "network" / "client.zip")
    server = fheconv.load_server(FOLDER / "network" / "server.zip")
    client.keygen()
    image = np.random.default_rng(9).integers(0, 4, (1, 5, 5))
    expected = np.maximum(correlate2d(image[0], np.sign(WEIGHT[0, 0]), mode="valid") + BIAS, 0).sum()
    result = client.decrypt(server.run(client.encrypt(image), client.evaluation_keys))
    # Nine activations of 5 bits, none above 3 · 3 + 3: each is within half a step.
    assert result.item() == pytest.approx(expected, abs=9 * 12 / 31 / 2 + 1e-6)


def test_keys_that_are_missing_or_larger_than_allowed_are_refused(tmp_path):
    path = FOLDER / "filter" / "evaluation.keys"
    size = path.stat().st_size
    assert fheconv.EvaluationKeys.load(path, max_bytes=size) == fheconv.EvaluationKeys.load(path)
    with pytest.raises(fheconv.ArtifactError, match=f"{size - 1:,}"):
        fheconv.EvaluationKeys.load(path, max_bytes=size - 1)
    with pytest.raises(fheconv.ArtifactError, match="evaluation keys cannot be read from"):
        fheconv.EvaluationKeys.load(tmp_path / "missing")


@pytest.mark.parametrize("name", ["client.zip", "server.zip"])
def test_stored_circuits_are_of_the_first_format(name):
    """Made again by mistake, they would test nothing."""
    with zipfile.ZipFile(FOLDER / "filter" / name) as archive:
        assert json.loads(archive.read("manifest.json"))["format"] == 1


@pytest.mark.parametrize("name", ["evaluation.keys", "image.ct", "result.ct"])
def test_stored_bytes_are_of_the_first_format(name):
    assert int.from_bytes((FOLDER / "filter" / name).read_bytes()[8:10]) == 1
