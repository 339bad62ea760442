"""A URL where nothing answers: it is said soon, and what is tried meanwhile is said too."""

import re
import socket
import subprocess
import sys
import time

import pytest

import fheconv
from fheconv.serving import remote
from tests.support import serving


@pytest.fixture
def closed():
    """The URL of a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def silent():
    """The URL of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_a_dead_url_is_said_within_seconds(closed, caplog):
    started = time.monotonic()
    with pytest.raises(fheconv.RemoteError, match=r"refused.*Given up after 3 attempts in \d+ s"):
        fheconv.RemoteCircuit(closed)
    assert time.monotonic() - started < 10
    lines = [record.getMessage() for record in caplog.records if record.name == remote.LOGGER.name]
    assert [re.search(r"Attempt (\d of \d) follows in \d", line)[1] for line in lines] == ["2 of 3", "3 of 3"]
    assert all(closed in line for line in lines)


@pytest.mark.slow
def test_a_server_that_says_nothing_has_less_than_the_time_of_a_run(silent, monkeypatch):
    monkeypatch.setattr(remote, "ANSWER_TIMEOUT", 0.3)
    started = time.monotonic()
    with pytest.raises(fheconv.RemoteError, match=r"timed out.*Given up after 3 attempts"):
        fheconv.RemoteCircuit(silent, timeout=600)
    assert time.monotonic() - started < 10


def test_fewer_retries_are_fewer(closed):
    with pytest.raises(fheconv.RemoteError, match="after 1 attempt in"):
        fheconv.RemoteCircuit(closed, retries=0)


@pytest.mark.slow
def test_one_who_has_answered_is_waited_for_longer(tmp_path, monkeypatch, caplog):
    serving.save(tmp_path)
    monkeypatch.setattr(fheconv.Server, "beside", lambda self, *_: self)
    waits = []
    monkeypatch.setattr("fheconv.serving.remote.time.sleep", waits.append)
    with serving.serving(fheconv.load_server(tmp_path / "server.zip"), tmp_path / "keys") as url:
        circuit = fheconv.RemoteCircuit(url)
    circuit.keygen()
    with pytest.raises(fheconv.RemoteError, match=f"after {remote.RETRIES + 1} attempts"):
        circuit.predict(serving.images(1))
    assert len(waits) == remote.RETRIES
    assert f"Attempt {remote.RETRIES + 1} of {remote.RETRIES + 1}" in caplog.text


@pytest.mark.slow
def test_the_shell_says_on_standard_error_what_it_tries(tmp_path, closed):
    serving.save(tmp_path)
    client = serving.keyed_client(tmp_path)
    client.save_keys(tmp_path / "keys")
    client.encrypt(serving.images(1)).save(tmp_path / "x.ct")
    code = "from fheconv.cli.main import main; main()"
    command = ["run", "client.zip", "--url", closed, "--keys", "keys", "--input", "x.ct", "--output", "y.ct"]
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stdout == ""
    *tried, last = done.stderr.splitlines()
    assert [re.search(r"Attempt (\d) of 3", line)[1] for line in tried] == ["2", "3"]
    assert last.startswith("RemoteError: ")
    assert "Traceback" not in done.stderr
