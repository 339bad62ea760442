"""Writes files whole or not at all, and reads files of a bounded size."""

import os
import secrets
from collections.abc import Iterable
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
    """Return the first `most` + 1 bytes of a file: enough to see that it is too large.

    Raises `ArtifactError`, naming `what` it should hold, if it cannot be read.
    """
    data = bytearray()
    try:
        with path.open("rb") as file:
            # In pieces, because `read` takes the memory for all that it may return.
            while len(data) <= most and (piece := file.read(min(PIECE, most + 1 - len(data)))):
                data += piece
    except OSError as error:
        raise ArtifactError(f"{what} cannot be read from {path}: {error}.") from error
    return bytes(data)
