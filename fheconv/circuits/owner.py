"""Makes and keeps keys, encrypts and decrypts, for a client and for a whole circuit."""

import os
import secrets
import threading
import weakref
from abc import abstractmethod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fheconv.basics.arrays import Array, Shape
from fheconv.basics.errors import ArtifactError, NotCompiledError
from fheconv.basics.keywords import answers_keywords
from fheconv.basics.progress import status
from fheconv.basics.report import Brief
from fheconv.circuits.ciphertext import Ciphertext, check_ciphertext
from fheconv.circuits.keys import EvaluationKeys, KeyNames, read_keys, write_keys
from fheconv.circuits.native.handle import Handle
from fheconv.circuits.native.protocol import UNLIMITED, Limits, Session
from fheconv.lowering.interface import Interface


class Keys:
    """The present keys of a key set, which several circuits may share.

    `key_id` is their name, "" before there are any, `held` the keys themselves. `maker` is the fingerprint of
    the circuit that they were made with. It is part of the names of evaluation keys, so that these are the
    same whichever of the circuits asks for them.
    """

    def __init__(self) -> None:
        self.key_id = self.maker = ""
        self.held: bytes | None = None

    def become(self, key_id: str, held: bytes, maker: str) -> None:
        """Replace the keys."""
        self.held, self.key_id, self.maker = held, key_id, maker


class KeyedHandle(Handle):
    """One compiled function and its keys.

    The native library holds the function with the keys named `key_id`. Every request says this name. A worker
    that holds the function with other keys, or with none, is given it again with these. `shared` are the keys
    of another circuit with the same key set, to have in common with it.
    """

    def __init__(
        self,
        session: Session,
        opening: tuple[str, tuple[Any, ...]],
        interface: Interface,
        limits: Limits = UNLIMITED,
        shared: Keys | None = None,
    ) -> None:
        self.interface = interface
        self.present = Keys() if shared is None else shared
        super().__init__(session, opening, limits)

    @property
    def key_id(self) -> str:
        """The name of the present keys, "" before there are any."""
        return self.present.key_id

    @property
    def keys(self) -> bytes | None:
        """The present keys, None before there are any."""
        return self.present.held

    def _request(self, method: str, arguments: tuple[Any, ...]) -> Any:
        return super()._request(method, (self.key_id, *arguments))

    def _open(self, *more: Any) -> Any:
        return super()._open(*(more or (self.key_id, self.keys)))

    def keygen(self, key_id: str) -> None:
        """Make new keys with the name `key_id`."""
        keys = self.request("keygen", key_id)
        self.present.become(key_id, keys, self.fingerprint)

    def save_keys(self, path: Path, *, overwrite: bool) -> None:
        """Write the keys to a file (see `KeyOwner.save_keys`)."""
        self.require_keys("save_keys")
        write_keys(path, self._names(), self.keys or b"", overwrite=overwrite)

    def load_keys(self, path: Path) -> None:
        """Use the keys of a file (see `KeyOwner.load_keys`)."""
        names, keys = read_keys(path, self.fingerprint, self.keyset)
        self._reopen(names.key_id, keys)
        self.present.become(names.key_id, keys, names.fingerprint)

    def evaluation_keys(self) -> EvaluationKeys:
        """Return the keys that a server needs, without the secret ones."""
        self.require_keys("evaluation_keys")
        payload = self.request("evaluation_keys")
        return EvaluationKeys(**self._names().names(), payload=payload)

    def _names(self) -> KeyNames:
        return KeyNames(fingerprint=self.present.maker, key_id=self.key_id, keyset=self.keyset)

    def encrypt(self, q: Array, batched: bool) -> Ciphertext:
        """Encrypt integer images (N, C, *S)."""
        self.require_keys("encrypt")
        values = self.request("encrypt", self.interface.prepare(q)) if len(q) else []
        return Ciphertext(
            kind="input",
            fingerprint=self.fingerprint,
            key_id=self.key_id,
            images=len(q),
            batched=batched,
            values=tuple(values),
        )

    def decrypt(self, ciphertext: Ciphertext) -> Array:
        """Return the accumulators (N, K, *Out) of results that `check` has accepted."""
        shape = (len(ciphertext.values), len(self.interface.outputs))
        results = np.zeros(shape, np.int64)
        if ciphertext.values:
            results = self.request("decrypt", list(ciphertext.values))
        if results.shape != shape:
            raise ArtifactError(
                f"The ciphertext holds results of shape {results.shape}, where this circuit has {shape}; "
                "decrypt what its own run() returned."
            )
        return self.interface.accumulators(results, ciphertext.images)

    def require_keys(self, step: str) -> None:
        """Raise `NotCompiledError` before `keygen`."""
        if self.keys is None:
            raise NotCompiledError(f"{step} needs keys and there are none yet; call keygen() first.")

    def check(self, ciphertext: Any, kind: str, step: str) -> None:
        """Raise `ArtifactError` for a ciphertext of another kind, circuit, key set or shape."""
        self.require_keys(step)
        check_ciphertext(ciphertext, kind, step, self.fingerprint, self.key_id, self.interface.lanes.count)


class KeyOwner(Brief):
    """Makes, saves and loads keys. It is the base of a client, and of a circuit that is both sides."""

    _one: KeyedHandle

    def __init__(self) -> None:
        # Keys must not change between an encryption and the moment when its ciphertext gets their name.
        self._lock = threading.RLock()
        _owners.add(self)

    def _summary(self) -> tuple[str, list[tuple[str, ...]]]:
        inputs, outputs, rows = self._described()
        keys = "none; keygen() makes them" if self._one.keys is None else f"made, {self._one.key_id:.12}"
        title = f"{type(self).__name__} {self.fingerprint:.12}: {inputs} → {outputs}"
        return title, [*rows, ("keys", keys)]

    @abstractmethod
    def _described(self) -> tuple[Shape, Shape, list[tuple[str, str]]]:
        """Return the shapes of an image and of its results, and what matters most of the cost."""

    def _share_circuit_of(self, other: "KeyOwner") -> None:
        """Have the circuit in common with another owner, and so the keys."""
        self._one = other._one
        self._share_lock_of(other)

    def _share_lock_of(self, other: "KeyOwner") -> None:
        """Let the keys of both change only while neither uses them."""
        self._lock = other._lock
        _owners.add(self)

    def __reduce__(self) -> NoReturn:
        raise ArtifactError(
            "It holds secret keys, and its worker is this process's own: it cannot be copied or pickled. "
            "Copy circuit.network or client.zip, and make keys there."
        )

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the circuit, in hexadecimal."""
        return self._one.fingerprint

    @property
    def keyset(self) -> str:
        """The name of the key set, in hexadecimal: circuits with the same one run under the same keys."""
        return self._one.keyset

    @property
    def specs(self) -> bytes:
        """Concrete's parameters of the circuit, on which its keys depend."""
        return bytes(self._one.compiled.specs)

    @property
    def present_keys(self) -> Keys:
        """The keys, which other circuits of the key set may have in common with this one."""
        return self._one.present

    def has_keys_of(self, other: "KeyOwner") -> bool:
        """Return True if both have one set of keys, no matter which of the two makes new ones."""
        return self._one.present is other._one.present

    @property
    def evaluation_keys(self) -> EvaluationKeys:
        """The keys that a server needs. It computes with them and cannot decrypt anything.

        Raises `NotCompiledError` before `keygen`.
        """
        with self._lock:
            return self._one.evaluation_keys()

    @answers_keywords
    def keygen(self) -> None:
        """Generate new keys. Ciphertexts of earlier keys can no longer be used.

        Raises `ExecutionError` if the native library fails.
        """
        with self._lock, status("Generating keys…"):
            self._one.keygen(secrets.token_hex(16))

    def save_keys(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the keys, secret ones included, to a file that only its owner may read.

        Raises `NotCompiledError` before `keygen`, `ArtifactError` if the file exists or cannot be written.
        """
        with self._lock:
            self._one.save_keys(Path(path), overwrite=overwrite)

    def load_keys(self, path: str | Path) -> None:
        """Use the keys of a file that `save_keys` wrote for the same circuit, here or on its other side.

        It may also be of another circuit with the same key set (see `keys_of` of `fheconv.compile`). Raises
        `ArtifactError` for a file that is damaged or goes with another key set. Then the present keys stay.
        """
        with self._lock:
            self._one.load_keys(Path(path))


_owners: "weakref.WeakSet[KeyOwner]" = weakref.WeakSet()


def _unlock_all() -> None:
    """Give every owner a new lock: in a forked child, the thread that held the old one does not exist."""
    fresh: dict[int, threading.RLock] = {}
    for owner in list(_owners):  # those that shared a lock share the new one
        owner._lock = fresh.setdefault(id(owner._lock), threading.RLock())


os.register_at_fork(after_in_child=_unlock_all)
