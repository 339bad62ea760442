"""Evaluation keys on the disk of a server, each set in a file by its name, which is its content's digest.

A set is written beside its place, flushed to the disk and moved there: what has a name is whole, whenever the
server dies. When a set was last used is the file's own time, and so outlives the server too.
"""

import contextlib
import fcntl
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from fheconv.basics.checks import check_integer, check_number
from fheconv.basics.errors import ArtifactError, InvalidArgumentError, RemoteError
from fheconv.circuits.files.envelope import Incoming
from fheconv.circuits.keys import EVALUATION, StoredKeys

QUOTA = 10 * 10**9
EXPIRY = 30 * 86_400
NAME = re.compile(r"[0-9a-f]{64}")
_ENDING = ".keys"
_HALF = ".incoming-"


class UnknownKeys(ArtifactError):
    """No keys have that name here: they never came, have expired, or made room for others."""


class ForeignKeys(ArtifactError):
    """The keys are of another circuit, or do not have the name that they were sent by."""


class KeysInUse(RemoteError):
    """The keys cannot be removed while something runs with them."""


class StoreFull(RemoteError):
    """There is no room for more keys, or the disk takes none."""


@dataclass(kw_only=True)
class _Entry:
    """A file of the store: its size, when it was used last, and by how many it is being used.

    `keys` are None until the file was checked by this process.
    """

    size: int
    used: float
    users: int = 0
    keys: StoredKeys | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class KeyStore:
    """The evaluation keys of one circuit, in a folder that no other process uses.

    They are in the folder of that circuit's fingerprint inside `folder`, which only their owner may enter.
    Together they take at most `quota` bytes: those used longest ago make room. Those not used for `expiry`
    seconds are removed. One set has at most `max_bytes`.

    Its methods may be called by several threads at once. Raises `InvalidArgumentError` for limits that have
    no meaning, a folder that another server uses, and one that cannot be made.
    """

    def __init__(
        self, folder: str | Path, fingerprint: str, *, max_bytes: int, quota: int, expiry: float
    ) -> None:
        check_integer("quota", quota, 1)
        check_number("expiry", expiry, 0)
        self.folder = Path(folder).absolute() / fingerprint  # workers have other working directories
        self.fingerprint, self.max_bytes = fingerprint, max_bytes
        self._quota, self._expiry = quota, expiry
        self._arriving = 0
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.folder.chmod(0o700)
            self._guard = self._guarded()
            self._read_folder()
        except OSError as error:
            raise InvalidArgumentError(
                f"Keys cannot be stored in {self.folder}: {error}; choose another folder."
            ) from error

    def _guarded(self) -> IO[bytes]:
        """Keep other processes out, as long as this one lives."""
        guard = (self.folder / ".lock").open("ab")
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            guard.close()
            raise InvalidArgumentError(
                f"Another server stores its keys in {self.folder}; choose another folder for this one."
            ) from error
        return guard

    def _read_folder(self) -> None:
        """Take up what an earlier process left, and remove what it had not finished."""
        for path in self.folder.iterdir():
            if path.name.startswith(_HALF):
                path.unlink()
            elif path.suffix == _ENDING and NAME.fullmatch(path.stem):
                found = path.stat()
                self._entries[path.stem] = _Entry(size=found.st_size, used=found.st_mtime)
        self.expire()

    def close(self) -> None:
        """Let other processes use the folder."""
        self._guard.close()

    def size_of(self, name: str) -> int:
        """Return how many bytes the keys of that name take. Raises `UnknownKeys`."""
        self.expire()
        with self._lock:
            return self._entry(name).size

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[StoredKeys]:
        """Keep the keys of that name here while the block runs.

        A file that an earlier process wrote is read through and checked first. Raises `UnknownKeys`.
        """
        self.expire()
        with self._lock:
            entry = self._entry(name)
            entry.users += 1
        try:
            yield self._checked(name, entry)
        finally:
            with self._lock:
                entry.users -= 1
                entry.used = time.time()
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._path(name))

    def delete(self, name: str) -> None:
        """Remove the keys of that name. Raises `UnknownKeys`, `KeysInUse`."""
        with self._lock:
            if self._entry(name).users:
                raise KeysInUse("Something runs with these keys; remove them when it is done.")
            self._remove(name)

    def expire(self) -> None:
        """Remove the keys that were not used for too long."""
        oldest = time.time() - self._expiry
        with self._lock:
            for name, entry in list(self._entries.items()):
                if entry.used < oldest and not entry.users:
                    self._remove(name)

    def receive(self) -> "Upload":
        """Return a place for keys that arrive piece by piece."""
        return Upload(self)

    def reserve(self, size: int) -> None:
        """Make room for so many bytes more that arrive. Raises `StoreFull`."""
        with self._lock:
            held = self._arriving + sum(entry.size for entry in self._entries.values())
            unused = sorted(
                (name for name, entry in self._entries.items() if not entry.users),
                key=lambda name: self._entries[name].used,
            )
            for name in unused:
                if held + size <= self._quota:
                    break
                held -= self._entries[name].size
                self._remove(name)
            if held + size > self._quota:
                raise StoreFull(
                    f"There is no room for these keys: the server stores at most {self._quota:,} bytes, with "
                    "those that are in use. Try again later, or start it with a larger quota."
                )
            self._arriving += size

    def keep(self, keys: StoredKeys, size: int) -> None:
        """Move keys that arrived to their place, in the room of `size` bytes that was reserved for them."""
        place = self._path(keys.name)
        with self._lock:
            keys.path.replace(place)
            entry = self._entries.setdefault(keys.name, _Entry(size=size, used=0.0))
            entry.used, entry.keys = time.time(), replace(keys, path=place)
            self._arriving -= size

    def release(self, size: int) -> None:
        """Give back room that was reserved."""
        with self._lock:
            self._arriving -= size

    def _checked(self, name: str, entry: _Entry) -> StoredKeys:
        with entry.lock:
            if entry.keys is None or not entry.keys.path.exists():
                try:
                    keys = StoredKeys.of(self._path(name), max_bytes=self.max_bytes)
                    self.check(keys, name)
                except ArtifactError as error:
                    with self._lock:
                        if self._entries.get(name) is entry:
                            self._remove(name)
                    raise UnknownKeys(f"The keys {name} were lost on the disk; send them again.") from error
                entry.keys = keys
            return entry.keys

    def check(self, keys: StoredKeys, name: str) -> None:
        """Raise `ForeignKeys` for keys of another circuit or of another name."""
        if keys.fingerprint != self.fingerprint:
            raise ForeignKeys(
                "The evaluation keys belong to another circuit; make keys with this one's client."
            )
        if keys.name != name:
            raise ForeignKeys(f"The evaluation keys are sent as {name}, and their digest is {keys.name}.")

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise UnknownKeys(f"There are no evaluation keys {name:.64} here; send them.")
        return self._entries[name]

    def _remove(self, name: str) -> None:
        self._entries.pop(name, None)
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_ENDING}"


class Upload:
    """Keys that arrive, a context manager: without `keep` nothing of them stays."""

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        self._incoming = Incoming(EVALUATION, store.max_bytes)
        self._path = store.folder / f"{_HALF}{secrets.token_hex(8)}"
        self._reserved = 0

    def __enter__(self) -> "Upload":
        with _writing():
            self._file = open(self._path, "xb", opener=_private)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)
        self._store.release(self._reserved)

    def feed(self, piece: bytes) -> None:
        """Take the next bytes.

        Raises `ArtifactError` as soon as something is wrong with them, `StoreFull` if there is no room.
        """
        self._incoming.feed(piece)
        self._store.reserve(len(piece))
        self._reserved += len(piece)
        with _writing():
            self._file.write(piece)

    def keep(self, name: str) -> None:
        """Store the keys, all of which have arrived.

        Raises `ArtifactError` if they are damaged, `ForeignKeys` if they are others than said.
        """
        keys = StoredKeys.arrived(self._path, self._incoming)
        self._store.check(keys, name)
        with _writing():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._store.keep(keys, self._reserved)
        self._reserved = 0


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Turn what the disk refuses into `StoreFull`."""
    try:
        yield
    except OSError as error:
        raise StoreFull(
            f"The keys cannot be stored: {error.strerror}. Tell whoever runs the server."
        ) from error
