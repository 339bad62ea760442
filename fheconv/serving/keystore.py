"""Stores evaluation keys on the disk of a server, each set in a file named by the digest of its content.

A set is written to a temporary file, flushed to the disk and moved to its place. So a file with a name is
complete, whenever the server dies. The time of the last use is the file's own time, and so it survives the
server.
"""

import contextlib
import fcntl
import logging
import os
import re
import secrets
import stat
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from fheconv.basics.checks import check_integer, check_number
from fheconv.basics.errors import ArtifactError, InvalidArgumentError
from fheconv.circuits.files.envelope import Incoming
from fheconv.circuits.files.identity import digest
from fheconv.circuits.keys import EVALUATION, StoredKeys
from fheconv.serving.disk import ForeignKeys, KeysInUse, StoreFull, UnknownKeys, discard, private, writing

QUOTA = 10 * 10**9
EXPIRY = 30 * 86_400
NAME = re.compile(r"[0-9a-f]{64}")
_ENDING = ".keys"
_HALF = ".incoming-"
_GUARD = ".lock"
LOGGER = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Entry:
    """A file of the store: its size, the time of its last use, and the number of its present users.

    `keys` is None until this process has checked the file.
    """

    size: int
    used: float
    users: int = 0
    keys: StoredKeys | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class KeyStore:
    """The evaluation keys of the circuits of a server, in a folder that no other process uses.

    `circuits` has the fingerprint of each circuit, with its key set. The keys are in a folder inside `folder`
    that is named by these key sets: a server finds them again that serves further circuits of the same key
    sets. Only their owner may enter it.
    All keys together take at most `quota` bytes. If there is no room, the keys used longest ago are removed.
    Keys not used for `expiry` seconds are removed too. One set has at most `max_bytes` bytes.

    Several threads may call its methods at once. Raises `InvalidArgumentError` for invalid limits, for a
    folder that another server uses, and for one that cannot be made.
    """

    def __init__(
        self, folder: str | Path, circuits: Mapping[str, str], *, max_bytes: int, quota: int, expiry: float
    ) -> None:
        check_integer("quota", quota, 1)
        check_number("expiry", expiry, 0)
        keysets = sorted(set(circuits.values()))
        name = keysets[0] if len(keysets) == 1 else digest(" ".join(keysets).encode())
        self.folder = Path(folder).absolute() / name  # workers have other working directories
        self._circuits, self.max_bytes = dict(circuits), max_bytes
        self._quota, self._expiry = quota, expiry
        self._arriving = 0
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        _stores.add(self)
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
        """Keep other processes out of the folder as long as this process lives."""
        guard = os.fdopen(private(str(self.folder / _GUARD), os.O_RDWR | os.O_CREAT), "rb+")
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            guard.close()
            raise InvalidArgumentError(
                f"Another server stores its keys in {self.folder}; choose another folder for this one."
            ) from error
        return guard

    def _read_folder(self) -> None:
        """Read the files that an earlier process left, and remove unfinished ones. Ignore all others."""
        for path in self.folder.iterdir():
            found = path.lstat()
            half, keys = path.name.startswith(_HALF), path.suffix == _ENDING and NAME.fullmatch(path.stem)
            if path.name == _GUARD:
                continue
            if not stat.S_ISREG(found.st_mode) or not (half or keys):
                LOGGER.warning("%s is not of the server's making and is ignored.", path)
            elif half:
                discard(path)
            else:
                self._entries[path.stem] = _Entry(size=found.st_size, used=found.st_mtime)
        self.expire()

    def close(self) -> None:
        """Let other processes use the folder."""
        if not self._guard.closed:
            # A child that was forked a moment ago may still hold the file open.
            fcntl.flock(self._guard, fcntl.LOCK_UN)
        self._guard.close()

    def abandon(self) -> None:
        """Let go of the folder in a forked child: it is the parent's. No thread there holds a lock."""
        self._lock = threading.Lock()
        for entry in self._entries.values():
            entry.lock = threading.Lock()
        if hasattr(self, "_guard"):
            self._guard.close()  # or the child would keep other servers out after the parent's end

    def size_of(self, name: str) -> int:
        """Return the number of bytes of the keys of that name. Raises `UnknownKeys`."""
        self.expire()
        with self._lock:
            return self._entry(name).size

    def held(self) -> tuple[int, int]:
        """Return the number of sets of keys that are stored, and their bytes."""
        with self._lock:
            return len(self._entries), sum(entry.size for entry in self._entries.values())

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[StoredKeys]:
        """Keep the keys of that name in the store while the block runs.

        A file that an earlier process wrote is first read completely and checked. Raises `UnknownKeys`.
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
            with contextlib.suppress(OSError):  # the keys were removed, or the disk is read-only
                os.utime(self._path(name))

    def of_owner(self, key_id: str) -> dict[str, int]:
        """Return the names of the keys with that id, and their bytes.

        Files that an earlier process wrote are first read completely and checked.
        """
        self.expire()
        with self._lock:
            entries = dict(self._entries)
        found = {}
        for name, entry in entries.items():
            with contextlib.suppress(UnknownKeys):
                if self._checked(name, entry).key_id == key_id:
                    found[name] = entry.size
        return found

    def delete(self, name: str) -> None:
        """Remove the keys of that name. Raises `UnknownKeys`, `KeysInUse`, `StoreFull` if the disk fails."""
        with self._lock:
            if self._entry(name).users:
                raise KeysInUse("Something runs with these keys; remove them when it is done.")
            if not self._remove(name):
                raise StoreFull("The disk does not let go of these keys. Tell whoever runs the server.")

    def expire(self) -> None:
        """Remove the keys that were not used for `expiry` seconds."""
        oldest = time.time() - self._expiry
        with self._lock:
            for name, entry in list(self._entries.items()):
                if entry.used < oldest and not entry.users:
                    self._remove(name)

    def receive(self) -> "Upload":
        """Return a place for keys that arrive piece by piece."""
        return Upload(self)

    def reserve(self, size: int) -> None:
        """Make room for `size` more bytes that arrive. Raises `StoreFull`."""
        with self._lock:
            held = self._arriving + sum(entry.size for entry in self._entries.values())
            unused = sorted(
                (name for name, entry in self._entries.items() if not entry.users),
                key=lambda name: self._entries[name].used,
            )
            for name in unused:
                if held + size <= self._quota:
                    break
                size_of_unused = self._entries[name].size
                held -= size_of_unused if self._remove(name) else 0
            if held + size > self._quota:
                raise StoreFull(
                    f"There is no room for these keys: the server stores at most {self._quota:,} bytes, with "
                    "those that are in use. Try again later, or start it with a larger quota."
                )
            self._arriving += size

    def keep(self, keys: StoredKeys, size: int) -> None:
        """Move keys that arrived to their place, and use the `size` bytes that were reserved for them."""
        place = self._path(keys.name)
        with self._lock:
            keys.path.replace(place)
            entry = self._entries.setdefault(keys.name, _Entry(size=size, used=0.0))
            entry.used, entry.keys = time.time(), replace(keys, path=place)
            self._arriving -= size

    def release(self, size: int) -> None:
        """Give back reserved room."""
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
                            discard(self._path(name))
                            self._entries.pop(name)
                    raise UnknownKeys(f"The keys {name} were lost on the disk; send them again.") from error
                entry.keys = keys
            return entry.keys

    def check(self, keys: StoredKeys, name: str) -> None:
        """Raise `ForeignKeys` for keys that none of the circuits runs under, or of another name."""
        if not any(keys.belong_to(*circuit) for circuit in self._circuits.items()):
            raise ForeignKeys(
                "The evaluation keys belong to another circuit, with other parameters; make keys with this "
                "one's client."
            )
        if keys.name != name:
            raise ForeignKeys(f"The evaluation keys are sent as {name}, and their digest is {keys.name}.")

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise UnknownKeys(f"There are no evaluation keys {name:.64} here; send them.")
        return self._entries[name]

    def _remove(self, name: str) -> bool:
        """Remove the file of that name, and return whether it is gone. If it is not, it still counts."""
        gone = discard(self._path(name))
        if gone:
            self._entries.pop(name, None)
        return gone

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_ENDING}"


_stores: "weakref.WeakSet[KeyStore]" = weakref.WeakSet()


def _abandon_all() -> None:
    for store in list(_stores):
        store.abandon()


os.register_at_fork(after_in_child=_abandon_all)


class Upload:
    """A context manager for keys that arrive. Unless `keep` is called, nothing of them stays."""

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        self._incoming = Incoming(EVALUATION, store.max_bytes)
        self._path = store.folder / f"{_HALF}{secrets.token_hex(8)}"
        self._reserved = 0

    def __enter__(self) -> "Upload":
        with writing():
            self._file = open(self._path, "xb", opener=private)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with contextlib.suppress(OSError):  # it tries again to write what the disk has refused
                self._file.close()
            discard(self._path)
        finally:
            self._store.release(self._reserved)

    def feed(self, piece: bytes) -> None:
        """Take the next bytes.

        Raises `ArtifactError` as soon as something is wrong with them, `StoreFull` if there is no room.
        """
        self._incoming.feed(piece)
        self._store.reserve(len(piece))
        self._reserved += len(piece)
        with writing():
            self._file.write(piece)

    def keep(self, name: str) -> None:
        """Store the keys after all their bytes have arrived.

        Raises `ArtifactError` if they are damaged, `ForeignKeys` if they are not the keys of that name.
        """
        keys = StoredKeys.arrived(self._path, self._incoming)
        self._store.check(keys, name)
        with writing():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._store.keep(keys, self._reserved)
        self._reserved = 0
