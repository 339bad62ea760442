"""A circuit's name covers all that its results depend on: what is retrained is another circuit."""

import io
import json
import zipfile
from dataclasses import replace

import httpx
import numpy as np
import pytest
import torch
from torch import nn

import fheconv
from fheconv.circuits.files.archive import load_manifest
from fheconv.circuits.files.identity import Identity, identity_of
from fheconv.lowering.lower import lower
from tests.support.files import of_first_format, parts_of, zipped
from tests.support.serving import serving

IMAGES = np.arange(32).reshape(2, 1, 4, 4) % 16


def trained(scale, offset=0.0, name="conv"):
    """A network whose integers are always the same, whatever it was trained to."""
    weight = np.array([[[[1, -1], [2, 3]]], [[[0, 3], [1, -2]]]])
    conv = fheconv.Conv.of(weight * scale, np.full(2, offset), name=name)
    return fheconv.quantize(conv, IMAGES, fheconv.QuantConfig(method="minmax", weight_bits=3))


OLD, NEW = trained(0.01), trained(1.0, 100.0)


@pytest.fixture(scope="module")
def circuits():
    made = [fheconv.compile(network) for network in (OLD, NEW)]
    for circuit in made:
        circuit.keygen()
    return made


@pytest.fixture(scope="module")
def folders(circuits, tmp_path_factory):
    made = [tmp_path_factory.mktemp("saved") for _ in circuits]
    for circuit, folder in zip(circuits, made, strict=True):
        circuit.save(folder)
    return made


@pytest.fixture(scope="module")
def sides(folders):
    """The client of the old network, and the client and the server of the new one."""
    old, new = (fheconv.load_client(folder / "client.zip") for folder in folders)
    old.keygen()
    new.keygen()
    return old, new, fheconv.load_server(folders[1] / "server.zip")


def test_circuits_that_differ_in_their_results_only_have_other_fingerprints(circuits, folders):
    """Otherwise this file would test nothing: the parameters and the program are the same."""
    old, new = (load_manifest(folder / "server.zip").identity for folder in folders)
    assert (old.parameters, old.program) == (new.parameters, new.program)
    assert old.interface != new.interface
    assert circuits[0].fingerprint != circuits[1].fingerprint
    clear = [network(IMAGES) for network in (OLD, NEW)]
    assert not np.allclose(*clear)


def test_the_fingerprint_of_a_circuit_is_that_of_its_files(circuits, folders):
    for circuit, folder in zip(circuits, folders, strict=True):
        exported = circuit.exported()
        found = identity_of(exported.specs, exported.mlir.encode(), exported.interface)
        for name in ("client.zip", "server.zip"):
            manifest = load_manifest(folder / name)
            assert manifest.format == 2
            assert manifest.identity == found
            assert manifest.fingerprint == found.fingerprint == circuit.fingerprint


def test_the_same_circuit_compiled_again_has_the_same_fingerprint(circuits):
    assert fheconv.compile(trained(0.01)).fingerprint == circuits[0].fingerprint
    assert fheconv.compile(trained(0.01, name="other")).fingerprint == circuits[0].fingerprint


def test_an_old_client_gets_no_result_of_a_retrained_server(sides):
    old, new, server = sides
    for keys in (new.evaluation_keys, old.evaluation_keys):
        with pytest.raises(fheconv.ArtifactError, match="ciphertext belongs to another circuit"):
            server.run(old.encrypt(IMAGES), keys)
    with pytest.raises(fheconv.ArtifactError, match="made with other keys"):
        server.run(new.encrypt(IMAGES), old.evaluation_keys)
    results = server.run(new.encrypt(IMAGES), new.evaluation_keys)
    np.testing.assert_allclose(new.decrypt(results), NEW(IMAGES))
    with pytest.raises(fheconv.ArtifactError, match="another circuit"):
        old.decrypt(results)


def test_ciphertexts_of_compiled_circuits_do_not_cross_over_even_under_the_same_keys(circuits, tmp_path):
    old, new = circuits
    assert old.keyset == new.keyset
    old.save_keys(tmp_path / "keys")
    new.load_keys(tmp_path / "keys")
    with pytest.raises(fheconv.ArtifactError, match="another circuit"):
        new.run(old.encrypt(IMAGES[0]))
    with pytest.raises(fheconv.ArtifactError, match="another circuit"):
        new.decrypt(old.run(old.encrypt(IMAGES[0])))


@pytest.mark.slow
def test_an_old_client_gets_no_result_over_http(sides, folders, tmp_path):
    old, new, server = sides
    first = of_first_format(folders[1], "client.zip")
    with serving(server, tmp_path) as url:
        remote = fheconv.RemoteCircuit(url, new)
        np.testing.assert_allclose(remote.predict(IMAGES), NEW(IMAGES))
        with pytest.raises(fheconv.ArtifactError, match="serves the circuit"):
            fheconv.RemoteCircuit(url, old)
        with pytest.raises(fheconv.ArtifactError, match="file format 2, and the client is of format 1"):
            fheconv.RemoteCircuit(url, fheconv.load_client(first))
        keys, mine = old.evaluation_keys, new.evaluation_keys
        sent = httpx.put(f"{url}/keys/{keys.name}", content=keys.to_bytes(), timeout=60)
        assert sent.status_code == 200
        for name in (keys.name, mine.name):
            body = old.encrypt(IMAGES[0]).to_bytes()
            refused = httpx.post(f"{url}/run/{name}", content=body, timeout=60)
            assert refused.status_code == 409
            assert "another circuit" in refused.json()["message"]


@pytest.mark.slow
def test_a_server_of_the_first_format_takes_clients_of_the_first_format_only(sides, folders, tmp_path):
    _, new, _ = sides
    server = fheconv.load_server(of_first_format(folders[1], "server.zip"))
    client = fheconv.load_client(of_first_format(folders[1], "client.zip"))
    assert client.manifest.format == server.manifest.format == 1
    assert client.manifest.identity is None
    client.keygen()
    np.testing.assert_allclose(
        client.decrypt(server.run(client.encrypt(IMAGES), client.evaluation_keys)), NEW(IMAGES)
    )
    with pytest.raises(fheconv.ArtifactError, match="format 1"):
        server.run(new.encrypt(IMAGES), client.evaluation_keys)
    with pytest.raises(fheconv.ArtifactError, match="other keys"):
        server.run(client.encrypt(IMAGES), new.evaluation_keys)
    with serving(server, tmp_path) as url:
        np.testing.assert_allclose(fheconv.RemoteCircuit(url, client).predict(IMAGES[0]), NEW(IMAGES[0]))
        with pytest.raises(fheconv.ArtifactError, match="file format 1, and the client is of format 2"):
            fheconv.RemoteCircuit(url, new)


def test_a_manifest_of_the_first_format_is_written_as_it_was_read(folders):
    parts = parts_of(folders[0] / "client.zip")
    old = of_first_format(folders[0], "client.zip")
    with zipfile.ZipFile(io.BytesIO(old)) as archive:
        given = json.loads(archive.read("manifest.json"))
    for data, expected in ((old, given), (zipped(parts), json.loads(parts["manifest.json"]))):
        assert json.loads(json.dumps(fheconv.load_client(data).manifest.to_dict())) == expected


CHANGES = {
    "a scale": lambda i: i["scale"]["values"].__setitem__(0, i["scale"]["values"][0] * 2),
    "a bias": lambda i: i["bias"]["values"].__setitem__(0, i["bias"]["values"][0] + 1),
    "a start": lambda i: i["start"]["values"].__setitem__(0, i["start"]["values"][0] + 1),
    "the factors": lambda i: i["factors"]["values"].__setitem__(0, 2),
    "the input's scale": lambda i: i["input"].update(scale=i["input"]["scale"] * 2),
    "the input's range": lambda i: i["input"].update(maximum=i["input"]["maximum"] - 1),
    "the input's zero-point": lambda i: i["input"].update(zero_point=i["input"]["zero_point"] + 1),
    "the finish": lambda i: i["finish"].update(last=None),
    "the activation": lambda i: i["finish"]["activation"].update(operator="abs"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A circuit with something left to do for the client."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Softmax(dim=1)
    network = fheconv.quantize(nn.Sequential(*layers).eval(), torch.rand(20, 1, 3, 3))
    folder = tmp_path_factory.mktemp("finished")
    fheconv.compile(network).save(folder)
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_each_part_of_the_interface_is_covered(finished, change):
    for name, load in (("client.zip", fheconv.load_client), ("server.zip", fheconv.load_server)):
        parts = parts_of(finished / name)
        interface = json.loads(parts["interface.json"])
        CHANGES[change](interface)
        assert json.dumps(interface).encode() != parts["interface.json"]
        with pytest.raises(fheconv.ArtifactError, match="altered: its contents have the fingerprint"):
            load(zipped({**parts, "interface.json": json.dumps(interface).encode()}))


@pytest.mark.parametrize("name", ["parameters", "program", "interface", "fingerprint"])
def test_an_identity_that_is_not_that_of_the_contents_is_refused(finished, name):
    parts = parts_of(finished / "client.zip")
    manifest = json.loads(parts["manifest.json"])
    place = manifest if name == "fingerprint" else manifest["identity"]
    place[name] = "0" * 64
    with pytest.raises(fheconv.ArtifactError, match="altered: its contents have the fingerprint"):
        fheconv.load_client(zipped({**parts, "manifest.json": json.dumps(manifest).encode()}))
    if name != "fingerprint":  # nor if the fingerprint was made to fit it, where the contents can tell
        manifest["fingerprint"] = Identity(**manifest["identity"]).fingerprint
        data = zipped({**parts_of(finished / "server.zip"), "manifest.json": json.dumps(manifest).encode()})
        with pytest.raises(fheconv.ArtifactError, match="altered: its contents have the fingerprint"):
            fheconv.load_server(data)


def test_images_that_share_a_ciphertext_otherwise_have_another_identity():
    interfaces = [lower(OLD, "auto", lanes).interface for lanes in (1, 2, 3)]
    wider = replace(interfaces[1], lanes=replace(interfaces[1].lanes, bits=interfaces[1].lanes.bits + 1))
    names = {identity_of(b"", b"", interface).fingerprint for interface in (*interfaces, wider)}
    assert len(names) == 4


def test_digests_do_not_run_into_each_other():
    names = {
        Identity.of(*parts).fingerprint
        for parts in ((b"ab", b"c", b""), (b"a", b"bc", b""), (b"", b"ab", b"c"))
    }
    assert len(names) == 3
