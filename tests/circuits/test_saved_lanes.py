"""Saved circuits in which several images share a ciphertext."""

import json

import numpy as np
import pytest

import fheconv
from fheconv.circuits.files.archive import load_manifest
from fheconv.circuits.files.identity import Identity
from fheconv.serving import admission
from tests.support import serving
from tests.support.files import parts_of, sealed, zipped

IMAGES = np.random.default_rng(0).integers(0, 16, (7, 1, 5, 5))
NETWORK = fheconv.quantize(np.array([[1, -1], [2, 3]]), IMAGES)


@pytest.fixture(scope="module")
def circuit():
    return fheconv.compile(NETWORK, fheconv.CompileConfig(lanes=3))


@pytest.fixture(scope="module")
def folder(circuit, tmp_path_factory):
    made = tmp_path_factory.mktemp("lanes")
    circuit.save(made, lanes=3)
    return made


@pytest.fixture(scope="module")
def sides(folder):
    client = fheconv.load_client(folder / "client.zip")
    client.keygen()
    return client, fheconv.load_server(folder / "server.zip")


@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_images_share_ciphertexts_and_come_back_right(sides, count):
    client, server = sides
    encrypted = fheconv.Ciphertext.from_bytes(client.encrypt(IMAGES[:count]).to_bytes())
    assert (encrypted.images, len(encrypted.values)) == (count, -(-count // 3))
    results = server.run(encrypted, client.evaluation_keys)
    np.testing.assert_array_equal(client.decrypt(results), NETWORK(IMAGES[:count]))


def test_one_image_alone(sides):
    client, server = sides
    results = server.run(client.encrypt(IMAGES[0]), client.evaluation_keys)
    np.testing.assert_array_equal(client.decrypt(results), NETWORK(IMAGES[0]))


def test_a_part_of_a_ciphertext_has_the_images_of_its_values(sides):
    client, server = sides
    encrypted = client.encrypt(IMAGES)
    parts = [encrypted.part(start, start + 2, 3) for start in (0, 2)]
    assert [part.images for part in parts] == [6, 1]
    got = [client.decrypt(server.run(part, client.evaluation_keys)) for part in parts]
    np.testing.assert_array_equal(np.concatenate(got), NETWORK(IMAGES))


def test_the_files_tell_of_the_lanes_and_those_of_one_image_do_not(circuit, folder, tmp_path):
    circuit.save(tmp_path)
    for name in ("client.zip", "server.zip"):
        assert load_manifest(folder / name).lanes == 3
        assert load_manifest(tmp_path / name).lanes == 1
        assert "lanes" not in json.loads(parts_of(tmp_path / name)["manifest.json"])
    assert load_manifest(tmp_path / "client.zip").fingerprint == circuit.fingerprint
    assert load_manifest(folder / "client.zip").fingerprint != circuit.fingerprint


def test_lanes_that_the_circuit_does_not_have_are_refused(circuit, tmp_path):
    for lanes in (2, 4, 0):
        with pytest.raises(fheconv.InvalidArgumentError, match=f"lanes={lanes}"):
            circuit.save(tmp_path, lanes=lanes)


def altered(folder, name, change):
    """A file whose parts are changed, with the digests and the fingerprint made to fit."""
    parts = parts_of(folder / name)
    manifest, interface = json.loads(parts["manifest.json"]), json.loads(parts["interface.json"])
    change(manifest, interface)
    text = json.dumps(interface).encode()
    manifest["identity"]["interface"] = Identity.of(b"", b"", text).interface
    manifest["fingerprint"] = Identity(**manifest["identity"]).fingerprint
    return zipped(sealed({**parts, "interface.json": text, "manifest.json": json.dumps(manifest).encode()}))


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest, interface: manifest.update(lanes=2),
        lambda manifest, interface: manifest.pop("lanes"),
        lambda manifest, interface: interface.pop("lanes"),
        lambda manifest, interface: interface["lanes"].update(count=2),
    ],
    ids=["another number", "none in the manifest", "none in the interface", "another in the interface"],
)
def test_parts_that_tell_of_other_lanes_are_refused(folder, change):
    for name, load in (("client.zip", fheconv.load_client), ("server.zip", fheconv.load_server)):
        with pytest.raises(fheconv.ArtifactError, match="images share a ciphertext in one"):
            load(altered(folder, name, change))


def test_a_value_with_other_images_than_it_says_is_refused(sides):
    client, server = sides
    encrypted = client.encrypt(IMAGES)
    for images in (3, 6, 10):
        with pytest.raises(fheconv.ArtifactError, match=r"images"):
            server.run(fheconv.Ciphertext(**{**vars(encrypted), "images": images}), client.evaluation_keys)


@pytest.mark.parametrize("lanes", [1, 0, 65, True, "3", 3.0, None])
def test_lanes_as_no_file_has_them_are_refused(folder, lanes):
    data = altered(folder, "client.zip", lambda manifest, interface: manifest.update(lanes=lanes))
    with pytest.raises(fheconv.ArtifactError, match="manifest is altered"):
        fheconv.load_client(data)


@pytest.mark.slow
def test_images_share_ciphertexts_over_http(sides, tmp_path, monkeypatch):
    monkeypatch.setattr(admission, "MOST_IMAGES", 2)
    client, server = sides
    with serving.serving(server, tmp_path) as url:
        remote = fheconv.RemoteCircuit(url, client)
        np.testing.assert_array_equal(remote.predict(IMAGES), NETWORK(IMAGES))
