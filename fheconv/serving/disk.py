"""Writes and removes the files of evaluation keys, and names what goes wrong with them."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from fheconv.basics.errors import ArtifactError, RemoteError

LOGGER = logging.getLogger(__name__)


class UnknownKeys(ArtifactError):
    """There are no keys of that name: they never came, have expired, or were removed to make room."""


class ForeignKeys(ArtifactError):
    """The keys belong to another circuit, or do not have the name under which they were sent."""


class KeysInUse(RemoteError):
    """The keys cannot be removed while something runs with them."""


class StoreFull(RemoteError):
    """There is no room for more keys, or the disk cannot store them."""


def private(path: str, flags: int) -> int:
    """Open a file that only its owner may read. It is an `opener` of `open`."""
    return os.open(path, flags | os.O_NONBLOCK, 0o600)  # without this flag, a named pipe would block


def discard(path: Path) -> bool:
    """Remove a file, and return whether it is gone. If the disk refuses, the log says so."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        LOGGER.warning("%s cannot be removed: %s.", path, error.strerror)
        return False
    return True


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Turn errors of the disk into `StoreFull`."""
    try:
        yield
    except OSError as error:
        raise StoreFull(
            f"The keys cannot be stored: {error.strerror}. Try again later, or tell whoever runs the server."
        ) from error
