"""Expected seconds where nothing can be kept in a cache folder."""

import importlib
import importlib.metadata
import pathlib

import pytest

from fheconv.analysis import seconds
from fheconv.circuits.native import lookup_times


@pytest.fixture(autouse=True)
def nothing_measured():
    """A process that has not measured yet, and forgets afterwards."""
    importlib.reload(lookup_times)
    yield
    importlib.reload(lookup_times)


class Session:
    """Tells a time for each width."""

    def request(self, failure, method, bits, lookups):
        return 1e6 * 2**bits, 0.001 * bits


def no_home(*arguments):
    raise RuntimeError("could not determine the home directory")


def no_version(name):
    raise importlib.metadata.PackageNotFoundError(name)


def not_allowed(*arguments, **options):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (seconds.platformdirs, "user_cache_dir", no_home),
        (seconds, "version", no_version),
        (pathlib.Path, "mkdir", not_allowed),
        (pathlib.Path, "write_text", not_allowed),
        (pathlib.Path, "read_text", not_allowed),
    ],
)
def test_an_estimate_needs_no_cache_folder(monkeypatch, tmp_path, owner, name, broken):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(owner, name, broken)
    assert lookup_times.expected_seconds(Session(), 10, 10 * 1e6 * 2**4) == pytest.approx(10 * 0.004)
