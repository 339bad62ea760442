"""HTTPS with certificates of one's own, of the server and of clients."""

import subprocess
import sys

import httpx
import numpy as np
import pytest
import trustme
from typer.testing import CliRunner

import fheconv
from fheconv import InvalidArgumentError, RemoteError, Tls
from fheconv.cli.main import app
from tests.support import serving


class Files:
    """An authority, and certificates that it signs, as PEM files in a folder."""

    def __init__(self, folder):
        folder.mkdir()
        self.folder, self.signer = folder, trustme.CA()
        self.authority = folder / "authority.pem"
        self.signer.cert_pem.write_to_path(self.authority)

    def of(self, name):
        """The certificate of a name, with its key in a file of its own."""
        made, files = self.signer.issue_cert(name), [self.folder / f"{name}.pem", self.folder / f"{name}.key"]
        files[0].write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        made.private_key_pem.write_to_path(files[1])
        return dict(zip(("certificate", "private_key"), files, strict=True))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def certified(files):
    return files.of("127.0.0.1")


@pytest.fixture(scope="module")
def https(server, certified, files, tmp_path_factory):
    """A server that asks clients for a certificate."""
    tls = Tls(**certified, authority=files.authority)
    with serving.serving(server, tmp_path_factory.mktemp("keys"), tls=tls) as made:
        yield made


@pytest.mark.slow
def test_an_image_goes_through_https_and_back(https, client, files):
    remote = fheconv.RemoteCircuit(https, client, tls=Tls(**files.of("someone"), authority=files.authority))
    serving.check(remote.predict(serving.images(1)), serving.images(1))


@pytest.mark.slow
def test_a_client_without_a_certificate_is_turned_away(https, client, files):
    with pytest.raises(RemoteError, match=r"tls=fheconv\.Tls"):
        fheconv.RemoteCircuit(https, client, tls=Tls(authority=files.authority))


def test_a_client_of_another_authority_is_turned_away(https, client, files, tmp_path):
    others = Files(tmp_path / "others")
    with pytest.raises(RemoteError, match=r"tls=fheconv\.Tls"):
        fheconv.RemoteCircuit(https, client, tls=Tls(**others.of("someone"), authority=files.authority))


def test_a_server_of_an_unknown_authority_is_not_believed(https, client, files):
    with pytest.raises(RemoteError, match="CERTIFICATE_VERIFY_FAILED"):
        fheconv.RemoteCircuit(https, client, tls=Tls(**files.of("someone")))


@pytest.mark.slow
def test_a_server_with_the_certificate_of_another_name_is_not_believed(server, client, files, tmp_path):
    tls = Tls(**files.of("example.org"))
    with (
        serving.serving(server, tmp_path, tls=tls) as url,
        pytest.raises(RemoteError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        fheconv.RemoteCircuit(url, client, tls=Tls(authority=files.authority))


def test_files_that_do_not_go_together_are_refused(certified, files, tmp_path):
    other, text = files.of("other"), tmp_path / "text"
    text.write_text("no certificate")
    for given in (
        {"certificate": certified["certificate"], "private_key": other["private_key"]},
        {"certificate": certified["certificate"]},
        {"certificate": tmp_path / "missing"},
        {"authority": text},
        {"private_key": other["private_key"]},
    ):
        with pytest.raises(InvalidArgumentError):
            Tls(**given)


def test_a_key_with_a_passphrase_is_refused_without_asking_for_it(certified, tmp_path):
    locked = tmp_path / "locked.key"
    command = ["openssl", "pkey", "-aes256", "-passout", "pass:secret"]
    subprocess.run([*command, "-in", certified["private_key"], "-out", locked], check=True)
    with pytest.raises(InvalidArgumentError, match="passphrase"):
        Tls(certificate=certified["certificate"], private_key=locked)


def test_other_machines_need_a_token_or_a_certificate(server, certified, files, monkeypatch, tmp_path):
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    options = {"host": "0.0.0.0", "port": 0, "folder": tmp_path}
    with pytest.raises(InvalidArgumentError, match="token"):
        fheconv.serve.serve(server, **options, tls=Tls(**certified))
    fheconv.serve.serve(server, **options, tls=Tls(**certified, authority=files.authority))


@pytest.mark.slow
def test_the_commands_take_certificates(client, certified, files, folder, tmp_path):
    one = files.of("shell")
    options = ["--certificate", str(certified["certificate"]), "--private-key", str(certified["private_key"])]
    client.save_keys(tmp_path / "keys.secret")
    client.encrypt(serving.images(1)).save(tmp_path / "image.ct")
    with serving.commands(folder / "server.zip", tmp_path / "keys") as start:
        _, url = start(*options, "--authority", str(files.authority))
        assert url.startswith("https://")
        command = [sys.executable, "-m", "fheconv", "run", str(folder / "client.zip"), "--url", url]
        command += ["--keys", "keys.secret", "--input", "image.ct", "--output", "result.ct"]
        mine = ["--certificate", str(one["certificate"]), "--private-key", str(one["private_key"])]
        subprocess.run([*command, *mine, "--authority", str(files.authority)], cwd=tmp_path, check=True)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
    result = client.decrypt(fheconv.Ciphertext.load(tmp_path / "result.ct"))
    np.testing.assert_array_equal(result, serving.network()(serving.images(1)))


def test_certificates_without_a_server_are_refused_by_the_command(files, folder):
    arguments = ["run", str(folder / "server.zip"), "--evaluation-keys", "k", "--input", "i", "--output", "o"]
    done = CliRunner().invoke(app, [*arguments, "--authority", str(files.authority)])
    assert isinstance(done.exception, InvalidArgumentError)
    assert "--url" in str(done.exception)
