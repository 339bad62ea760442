"""A server with two versions of a model, and a client that made keys once."""

import httpx
import numpy as np
import pytest
import trustme

import fheconv
from fheconv import Tls
from tests.support import serving
from tests.support.nets import integer_images, quantized

NEW = quantized(8, depth=1, size=(1, 4, 4), accumulator_bits=4)


@pytest.fixture(scope="module")
def later(folder, tmp_path_factory):
    """The folder of a retrained model, compiled for the keys of the first one."""
    made = tmp_path_factory.mktemp("later")
    config = fheconv.CompileConfig(p_error=1e-4)
    fheconv.compile(NEW, config, keys_of=folder / "client.zip").save(made)
    return made


@pytest.fixture(scope="module")
def servers(server, later):
    return [server, fheconv.load_server(later / "server.zip")]


def image():
    q = integer_images(NEW, 0, 3)[2:]
    return (q - NEW.input.zero_point) * NEW.input.scale


@pytest.mark.slow
def test_a_client_that_made_keys_once_uses_both_versions_over_https(servers, client, later, tmp_path):
    signer, authority = trustme.CA(), tmp_path / "authority.pem"
    signer.cert_pem.write_to_path(authority)
    issued, certificate = signer.issue_cert("127.0.0.1"), tmp_path / "server.pem"
    issued.private_key_and_cert_chain_pem.write_to_path(certificate)
    tls = Tls(authority=authority)
    with serving.serving(servers, tmp_path / "keys", tls=Tls(certificate=certificate), metrics=True) as url:
        old = fheconv.RemoteCircuit(url, client, tls=tls)
        retrained = fheconv.load_client(later / "client.zip", keys_of=client)
        new = fheconv.RemoteCircuit(url, retrained, tls=tls)
        serving.check(old.predict(serving.images(1)), serving.images(1))
        np.testing.assert_allclose(new.predict(image()), NEW(image()))
        key_id = client.evaluation_keys.key_id
        asked = httpx.get(f"{url}/keys", params={"key_id": key_id}, verify=tls.context())
        assert [stored["name"] for stored in asked.json()] == [client.evaluation_keys.name]
        assert client.evaluation_keys == new.evaluation_keys
        told = httpx.get(f"{url}/metrics", verify=tls.context()).text.splitlines()
        assert 'fheconv_requests_total{method="POST",route="run",status="200"} 2' in told
        assert "fheconv_keys 1" in told


@pytest.fixture
def http(servers, tmp_path, unstarted):
    with serving.serving(servers, tmp_path) as url, httpx.Client(base_url=url, timeout=60) as asking:
        yield asking


def test_all_circuits_are_listed_with_their_key_set(http, servers):
    listed = http.get("/circuits").json()
    assert [one["manifest"]["fingerprint"] for one in listed] == [one.fingerprint for one in servers]
    assert {one["keyset"] for one in listed} == {servers[0].keyset}
    assert all(one["limits"]["images"] >= 1 for one in listed)


def test_a_circuit_is_found_by_its_fingerprint_and_the_first_one_without(http, servers, folder, later):
    for server, where in zip(servers, (folder, later), strict=True):
        asked = {"fingerprint": server.fingerprint}
        found = http.get("/circuit", params=asked).json()["manifest"]
        assert found["fingerprint"] == server.fingerprint
        assert http.get("/client", params=asked).content == (where / "client.zip").read_bytes()
    assert http.get("/circuit").json()["manifest"]["fingerprint"] == servers[0].fingerprint
    assert http.get("/client").content == (folder / "client.zip").read_bytes()
    for path in ("/circuit", "/client"):
        assert http.get(path, params={"fingerprint": "f" * 64}).status_code == 404
        assert http.get(path, params={"fingerprint": "f"}).status_code == 422


def test_only_those_who_know_the_id_see_which_keys_are_stored(http, client):
    keys = client.evaluation_keys
    assert http.put(f"/keys/{keys.name}", content=keys.to_bytes()).status_code == 200
    assert http.get("/keys", params={"key_id": "another"}).json() == []
    (stored,) = http.get("/keys", params={"key_id": keys.key_id}).json()
    assert stored == {"name": keys.name, "bytes": len(keys.to_bytes())}
    assert http.get("/keys").status_code == 422
    assert http.delete(f"/keys/{keys.name}").status_code == 204
    assert http.get("/keys", params={"key_id": keys.key_id}).json() == []


def test_a_circuit_that_is_not_among_them_is_named(http, servers, tmp_path):
    other = quantized(5, depth=1, size=(1, 4, 4), accumulator_bits=4)
    fheconv.compile(other).save(tmp_path)
    with pytest.raises(fheconv.ArtifactError, match=f"serves the circuit {servers[0].fingerprint}"):
        fheconv.RemoteCircuit(str(http.base_url), tmp_path / "client.zip")


def test_nothing_and_the_same_circuit_twice_cannot_be_served(server, tmp_path):
    for servers in ([], [server, server]):
        with pytest.raises(fheconv.InvalidArgumentError, match="circuits to serve"):
            fheconv.serve.application(servers, folder=tmp_path)


@pytest.mark.slow
def test_the_command_serves_all_files_that_it_is_given(servers, folder, later, tmp_path):
    with serving.commands(folder / "server.zip", tmp_path) as start:
        _, url = start(str(later / "server.zip"))
        listed = httpx.get(f"{url}/circuits", timeout=60).json()
    assert [one["manifest"]["fingerprint"] for one in listed] == [one.fingerprint for one in servers]
