"""Writes files whole or not at all, and reads regular files of a bounded size."""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from fheconv.basics.errors import ArtifactError

# The bytes that are read from a file at a time.
PIECE = 2**20


def write_file(path: Path, chunks: Iterable[bytes], *, private: bool = False, overwrite: bool = True) -> None:
    """Write a file beside `path` and then move it there; only the owner can read `private` files.

    Raises `ArtifactError` if the file exists and `overwrite` is False, or if it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            if overwrite:
                os.replace(beside, path)
            else:
                os.link(beside, path)  # fails if the file exists; an earlier check could not be sure
        finally:
            beside.unlink(missing_ok=True)
    except FileExistsError as error:
        raise ArtifactError(
            f"{path} exists, and may hold the only copy of other keys; choose another file, or pass "
            "overwrite=True."
        ) from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error}.") from error


def read_file(path: Path, what: str, most: int) -> bytes:
    """Return the first `most` + 1 bytes of a regular file: enough to see that it is too large.

    Raises `ArtifactError`, naming `what` it should hold, if it cannot be read.
    """
    data = bytearray()
    try:
        check_regular(path)
        with path.open("rb") as file:
            # In pieces, because `read` takes the memory for all that it may return.
            while len(data) <= most and (piece := file.read(min(PIECE, most + 1 - len(data)))):
                data += piece
    except OSError as error:
        raise ArtifactError(f"{what} cannot be read from {path}: {error}.") from error
    return bytes(data)


def check_regular(path: Path) -> None:
    """Raise `OSError` unless a path is that of a regular file. To read another one might never end."""
    mode = path.stat().st_mode
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    for is_kind, kind in kinds.items():
        if is_kind(mode):
            raise OSError(f"it is {kind}, not a file")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name of a file to the `ArtifactError` of its contents."""
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
