"""Files in the key store that the server did not put there."""

import os
import socket
import time

import pytest

import fheconv
from fheconv.serving.disk import UnknownKeys
from fheconv.serving.keystore import KeyStore

CIRCUIT, KEYSET = "c" * 64, "e" * 64
NAME = "a" * 64


def opened(folder):
    return KeyStore(folder, {CIRCUIT: KEYSET}, max_bytes=10**6, quota=10**6, expiry=1000.0)


def folder(path):
    path.mkdir()
    (path / "inside").write_text("kept")


def pipe(path):
    os.mkfifo(path)


def dangling(path):
    path.symlink_to("nowhere")


def endless(path):
    path.symlink_to("/dev/zero")


def listening(path):
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(path))


@pytest.mark.parametrize("name", ["notes", f"{NAME}.keys", ".incoming-0123", "short.keys", "lost+found"])
@pytest.mark.parametrize("make", [folder, pipe, dangling, endless, listening])
def test_what_is_no_file_is_ignored_and_stays(tmp_path, monkeypatch, caplog, make, name):
    place = tmp_path / KEYSET
    place.mkdir()
    monkeypatch.chdir(place)
    make(place / name)
    store = opened(tmp_path)
    try:
        assert name in caplog.text
        with pytest.raises(UnknownKeys):
            store.size_of(NAME)
        later = time.time() + 10_000  # all are expired
        monkeypatch.setattr(time, "time", lambda: later)
        store.expire()
    finally:
        store.close()
    assert os.path.lexists(place / name)


def test_a_file_with_another_name_is_ignored_and_what_a_crash_left_goes(tmp_path, caplog):
    place = tmp_path / KEYSET
    place.mkdir()
    (place / "README").write_text("kept")
    (place / ".incoming-0123").write_text("half")
    opened(tmp_path).close()
    assert "README" in caplog.text
    assert {path.name for path in place.iterdir()} == {"README", ".lock"}
    opened(tmp_path).close()
    assert ".lock" not in caplog.text


@pytest.mark.parametrize("make", [folder, pipe, listening])
def test_a_lock_that_is_no_file_is_a_clear_error(tmp_path, monkeypatch, make):
    place = tmp_path / KEYSET
    place.mkdir()
    monkeypatch.chdir(place)
    make(place / ".lock")
    with pytest.raises(fheconv.InvalidArgumentError, match="choose another folder"):
        opened(tmp_path)
