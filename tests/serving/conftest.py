"""Gives the tests of a server a circuit of their own, its two sides, and a server of it over loopback."""

import threading

import pytest

import fheconv
from tests.support import serving


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("circuit")
    serving.save(made)
    return made


@pytest.fixture(scope="module")
def server(folder):
    return fheconv.load_server(folder / "server.zip")


@pytest.fixture(scope="module")
def client(folder):
    return serving.keyed_client(folder)


@pytest.fixture(scope="module")
def url(server, tmp_path_factory):
    with serving.serving(server, tmp_path_factory.mktemp("keys")) as made:
        yield made


@pytest.fixture
def unstarted(monkeypatch):
    """No worker starts for those who only get to where one would be asked."""
    monkeypatch.setattr(fheconv.Server, "beside", lambda self, *_: self)


@pytest.fixture
def blocked(monkeypatch, unstarted):
    """Runs that begin, and last until they are let go: (a semaphore of those begun, the event)."""
    begun, go = threading.Semaphore(0), threading.Event()

    def run_value(self, value, keys):
        begun.release()
        go.wait(60)
        return b"a result"

    monkeypatch.setattr(fheconv.Server, "run_value", run_value)
    yield begun, go
    go.set()
