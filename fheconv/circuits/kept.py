"""Keeps the encrypted values of a run that has not finished, in memory or in a folder.

A value is one result of a block (`fheconv.lowering.blocks`). Nothing here can be decrypted without the secret
key. A folder's files can be read and written by their owner only. Each says which circuit, key set and image
its value belongs to, and has a digest. A file that is damaged or belongs elsewhere is not used: its value is
computed again.
"""

import contextlib
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

from fheconv.basics.errors import ArtifactError
from fheconv.basics.files import read_file, write_file
from fheconv.circuits.ciphertext import Ciphertext
from fheconv.circuits.files.envelope import Envelope

ENVELOPE = Envelope(
    magic=b"fhekept\0", what="kept value", maker="a run with keep=", names=("image", "number")
)
SUFFIX = ".value"
# The most bytes of a value: more than those of any layer that fits into memory.
MOST_BYTES = 2**33


class Kept(Protocol):
    """A place for the values of images, each by its image's name (`name_of`) and its number."""

    def get(self, image: str, number: int) -> bytes | None:
        """Return a value, None if it is not here."""

    def put(self, image: str, number: int, value: bytes) -> None:
        """Keep a value."""

    def drop(self, image: str, number: int) -> None:
        """Remove a value that nobody reads any more."""

    def numbers(self, image: str) -> set[int]:
        """Return the numbers of the values that are here."""

    def opened(self) -> AbstractContextManager[None]:
        """Have the place alone while the block runs."""


def name_of(ciphertext: Ciphertext, place: int) -> str:
    """Return the name of an encrypted image, which is that of its circuit and keys too, in hexadecimal."""
    digest = hashlib.sha256(f"{ciphertext.fingerprint} {ciphertext.key_id} ".encode())
    digest.update(ciphertext.values[place])
    return digest.hexdigest()


class InMemory:
    """Values in memory. It is empty again when a run has finished."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, int], bytes] = {}

    def get(self, image: str, number: int) -> bytes | None:
        """Return a value, None if it is not here."""
        return self._values.get((image, number))

    def put(self, image: str, number: int, value: bytes) -> None:
        """Keep a value."""
        self._values[image, number] = value

    def drop(self, image: str, number: int) -> None:
        """Remove a value."""
        self._values.pop((image, number), None)

    def numbers(self, image: str) -> set[int]:
        """Return the numbers of the values that are here."""
        return {number for name, number in self._values if name == image}

    def opened(self) -> AbstractContextManager[None]:
        """Return at once: whoever runs a circuit holds its lock."""
        return nullcontext()

    def only(self, images: set[str]) -> None:
        """Remove the values of all images but these."""
        for image, number in list(self._values):
            if image not in images:
                self.drop(image, number)


class InFolder:
    """Values in a folder, which is made if it does not exist, and removed again when it is empty.

    Raises `ArtifactError` if others may read or write the folder, or if it cannot be made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Have the folder alone while the block runs. Raises `ArtifactError` if another run has it."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise ArtifactError(f"There can be no folder {self.path} to keep values in: {error}.") from error
        try:
            self._check(os.fstat(descriptor))
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ArtifactError(
                    f"Another run keeps its values in {self.path} now; wait for it, or choose another folder."
                ) from error
            for begun in self.path.glob(f".*{SUFFIX}.*"):  # by a process that was killed while it wrote
                begun.unlink(missing_ok=True)
            yield
            with contextlib.suppress(OSError):  # it holds values of other images
                self.path.rmdir()
        finally:
            os.close(descriptor)

    def get(self, image: str, number: int) -> bytes | None:
        """Return a value, None if it is not here, or damaged, or not what its name says."""
        path = self._file(image, number)
        with contextlib.suppress(ArtifactError):
            fields, payload = ENVELOPE.unpack(read_file(path, "A kept value", MOST_BYTES), MOST_BYTES)
            if fields == {"image": image, "number": number}:
                return bytes(payload)
        return None

    def put(self, image: str, number: int, value: bytes) -> None:
        """Write a value. Raises `ArtifactError` if it cannot be written."""
        chunks = ENVELOPE.chunks({"image": image, "number": number}, [value])
        write_file(self._file(image, number), chunks, private=True)

    def drop(self, image: str, number: int) -> None:
        """Remove a value."""
        with contextlib.suppress(OSError):
            self._file(image, number).unlink()

    def numbers(self, image: str) -> set[int]:
        """Return the numbers of the values that are here, and whole."""
        found = set()
        for path in self.path.glob(f"{image}-*{SUFFIX}"):
            number = path.name[len(image) + 1 : -len(SUFFIX)]
            if number.isdecimal() and self.get(image, int(number)) is not None:
                found.add(int(number))
        return found

    def _file(self, image: str, number: int) -> Path:
        return self.path / f"{image}-{number}{SUFFIX}"

    def _check(self, status: os.stat_result) -> None:
        """Raise `ArtifactError` for a folder that is not its owner's alone."""
        mode = stat.S_IMODE(status.st_mode)
        if status.st_uid != os.getuid() or mode & 0o077:
            raise ArtifactError(
                f"{self.path} has mode {mode:04o}, and user {status.st_uid} owns it; whoever can write there "
                "could exchange values. Give a folder that does not exist, or one of yours with mode 0700."
            )
