"""Gives the tests of a server a circuit of their own, its two sides, and a server of it over loopback."""

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
