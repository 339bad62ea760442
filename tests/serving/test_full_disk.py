"""A disk that is full, or refuses in other ways: one request fails with the right answer; nothing stays."""

import contextlib
import os
import resource
import signal
import subprocess
import time

import httpx
import pytest

import fheconv
from fheconv.circuits.keys import EvaluationKeys
from fheconv.serving import admission
from fheconv.serving.disk import StoreFull
from fheconv.serving.keystore import KeyStore
from tests.support import serving

CIRCUIT, KEYSET = "c" * 64, "e" * 64
SIZE = 3 * 2**20


def keys(number=0, size=SIZE):
    return EvaluationKeys(fingerprint=CIRCUIT, key_id=f"owner {number}", payload=os.urandom(size))


def send(store, some):
    with store.receive() as upload:
        for chunk in some.chunks():
            upload.feed(chunk)
        upload.keep(some.name)


@contextlib.contextmanager
def files_of_at_most(size):
    """Let the kernel refuse to write more than this into a file, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores this signal, and another library may have asked for it, which would end the process.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def opened(folder):
    store = KeyStore(folder, {CIRCUIT: KEYSET}, max_bytes=2 * SIZE, quota=2 * SIZE, expiry=1000.0)
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
def store(tmp_path):
    with opened(tmp_path) as made:
        yield made


def left(store):
    return sorted(path.name for path in store.folder.iterdir() if path.name != ".lock")


@pytest.mark.parametrize("limit", [0, 100, 2**20])
def test_what_the_disk_refuses_leaves_neither_file_nor_accounting(store, limit):
    for number in range(5):
        with files_of_at_most(limit), pytest.raises(StoreFull, match="cannot be stored"):
            send(store, keys(number))
        assert left(store) == []
    # The quota holds one set and some: had one of the five been counted, this one would not fit.
    some = keys()
    send(store, some)
    assert left(store) == [f"{some.name}.keys"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end(store, monkeypatch, call):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        with pytest.raises(StoreFull, match="No space left"):
            send(store, keys())
    assert left(store) == []
    send(store, keys(1))


def test_a_real_disk_that_is_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE * 3 // 2}", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a small disk")
    try:
        with opened(disk) as store:
            first = keys(0)
            send(store, first)
            with pytest.raises(StoreFull, match="No space left"):
                send(store, keys(1, SIZE - 1000))
            assert left(store) == [f"{first.name}.keys"]
            store.delete(first.name)
            send(store, keys(1, SIZE - 1000))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def stuck(monkeypatch):
    """Files that cannot be removed."""

    def refuse(self, missing_ok=False):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.unlink", refuse)


def test_files_that_cannot_be_removed_still_count_and_the_log_says_so(store, stuck, caplog, monkeypatch):
    some = keys()
    send(store, some)
    with pytest.raises(StoreFull, match="does not let go"):
        store.delete(some.name)
    assert "Read-only file system" in caplog.text
    assert store.size_of(some.name) == len(some.to_bytes())
    with pytest.raises(StoreFull, match="no room"):
        send(store, keys(1))
    later = time.time() + 10_000  # all are expired
    monkeypatch.setattr(time, "time", lambda: later)
    store.expire()
    assert store.size_of(some.name)


def test_a_use_that_cannot_be_noted_is_a_use_all_the_same(store, monkeypatch):
    some = keys()
    send(store, some)

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    with store.use(some.name) as found:
        assert found.key_id == some.key_id


@pytest.mark.slow
def test_the_answer_is_507_and_the_next_upload_finds_room(tmp_path, monkeypatch):
    serving.save(tmp_path)
    server = fheconv.load_server(tmp_path / "server.zip")
    monkeypatch.setattr(fheconv.Server, "beside", lambda self, *_: self)
    some = serving.keyed_client(tmp_path).evaluation_keys
    body = some.to_bytes()
    store = tmp_path / "keys"
    # What the disk refuses is the last kilobyte, which Python still holds, and tries again when it closes.
    monkeypatch.setattr(admission, "PIECE", len(body) - 1000)

    def in_two():
        yield body[:-1000]
        time.sleep(0.3)
        yield body[-1000:]

    with (
        serving.serving(server, store, quota=len(body) * 3 // 2) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        for _ in range(3):
            with files_of_at_most(len(body) - 500):
                answer = http.put(f"/keys/{some.name}", content=in_two())
            assert answer.status_code == 507, answer.text
            assert answer.json()["error"] == "RemoteError"
            assert "File too large" in answer.json()["message"]
        assert not list(store.rglob(".incoming-*"))
        assert http.put(f"/keys/{some.name}", content=body).status_code == 200
