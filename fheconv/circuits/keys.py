"""Holds evaluation keys for the server, and writes and reads the owner's files of all keys."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fheconv.basics.errors import ArtifactError
from fheconv.basics.files import PIECE, check_regular, naming, read_file, write_file
from fheconv.circuits.files.envelope import Envelope, Incoming

_NAMES = {"names": ("fingerprint", "key_id"), "later": ("keyset",)}
ENVELOPE = Envelope(magic=b"fhekeys\0", what="key file", maker="save_keys()", **_NAMES)
EVALUATION = Envelope(magic=b"fheevalk", what="evaluation key file", maker="to_bytes()", **_NAMES)
MAX_BYTES = 2**36


@dataclass(frozen=True, kw_only=True)
class KeyNames:
    """The names of keys in hexadecimal.

    fingerprint: the circuit that they were made with.
    key_id: their own id. Those of every `keygen` are others.
    keyset: the key set of their parameters (`fheconv.circuits.files.identity`). Every circuit of that key set
        runs under them. None in files of earlier versions, whose keys go with the one circuit only.

    Raises `ArtifactError` for other names.
    """

    fingerprint: str
    key_id: str
    keyset: str | None = None

    def __post_init__(self) -> None:
        for name, value in self.names().items():
            if not isinstance(value, str) or not value:
                raise ArtifactError(f"The keys' {name} is {value!r:.50}, not a name.")

    def names(self) -> dict[str, str]:
        """Return those names that there are, as headers have them."""
        later = {} if self.keyset is None else {"keyset": self.keyset}
        return {"fingerprint": self.fingerprint, "key_id": self.key_id, **later}

    def belong_to(self, fingerprint: str, keyset: str) -> bool:
        """Return True if the circuit with that fingerprint and key set runs under these keys."""
        return self.fingerprint == fingerprint if self.keyset is None else self.keyset == keyset


@dataclass(frozen=True, kw_only=True)
class EvaluationKeys(KeyNames):
    """The keys that a server needs to run a circuit. They cannot decrypt anything.

    `payload` is the keys as Concrete writes them.

    Example:
        >>> import numpy as np
        >>> from fheconv import compile, quantize
        >>> image = np.arange(9).reshape(1, 3, 3)
        >>> circuit = compile(quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), image))
        >>> circuit.keygen()
        >>> keys = circuit.evaluation_keys
        >>> keys.fingerprint == circuit.fingerprint
        True
        >>> EvaluationKeys.from_bytes(keys.to_bytes()) == keys
        True
    """

    payload: bytes = field(repr=False)

    @cached_property
    def name(self) -> str:
        """The unique name of these keys: the SHA-256 at the end of `to_bytes`, in hexadecimal."""
        *_, digest = self.chunks()
        return digest.hex()

    def chunks(self) -> Iterator[bytes]:
        """Yield `to_bytes` in pieces, without a copy of the keys."""
        return EVALUATION.chunks(self.names(), [self.payload])

    def to_bytes(self) -> bytes:
        """Return everything as bytes, in the format of `fheconv.circuits.files.envelope`."""
        return b"".join(self.chunks())

    def save(self, path: str | Path) -> None:
        """Write `to_bytes` to a file. Raises `ArtifactError` if it cannot be written."""
        write_file(Path(path), self.chunks())

    @classmethod
    def load(cls, path: str | Path, *, max_bytes: int = MAX_BYTES) -> "EvaluationKeys":
        """Return the keys of a file that `save` wrote, of at most `max_bytes` bytes.

        Raises `ArtifactError` for a file that cannot be read, is damaged, or holds something else.
        """
        path = Path(path)
        data = read_file(path, "The evaluation keys", max_bytes)
        with naming(path):
            return cls.from_bytes(data, max_bytes=max_bytes)

    @classmethod
    def from_bytes(
        cls, data: bytes | bytearray | memoryview, *, max_bytes: int = MAX_BYTES
    ) -> "EvaluationKeys":
        """Return the keys that `to_bytes` turned into `data`, of at most `max_bytes` bytes.

        Raises `ArtifactError` that says what is wrong with `data`.
        """
        fields, payload = EVALUATION.unpack(data, max_bytes)
        return cls(**fields, payload=bytes(payload))


@dataclass(frozen=True, kw_only=True)
class StoredKeys(KeyNames):
    """Evaluation keys that stay on the disk, in a checked file of `EvaluationKeys.to_bytes`.

    The keys begin at byte `start` and take `size` bytes. `name` is the name of the `EvaluationKeys`.
    """

    path: Path
    start: int
    size: int
    name: str

    @classmethod
    def of(cls, path: str | Path, *, max_bytes: int = MAX_BYTES) -> "StoredKeys":
        """Return the keys of a file of at most `max_bytes` bytes. It is read once, piece by piece.

        Raises `ArtifactError` that says what is wrong with it.
        """
        path, incoming = Path(path), Incoming(EVALUATION, max_bytes)
        with naming(path):
            try:
                check_regular(path)
                with path.open("rb") as file:
                    while piece := file.read(PIECE):
                        incoming.feed(piece)
            except OSError as error:
                raise ArtifactError(f"The evaluation keys cannot be read: {error}.") from error
            return cls.arrived(path, incoming)

    @classmethod
    def arrived(cls, path: Path, incoming: Incoming) -> "StoredKeys":
        """Return the keys in a file whose bytes have all been fed to `incoming`.

        Raises `ArtifactError` that says what is wrong with it.
        """
        fields = incoming.close()
        start = incoming.payload_start
        path = path.absolute()  # the worker that reads it works in another folder
        return cls(**fields, path=path, start=start, size=incoming.payload_size, name=incoming.digest)

    def read(self) -> bytes:
        """Return the keys as Concrete writes them."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


def write_keys(path: Path, names: KeyNames, keys: bytes, *, overwrite: bool) -> None:
    """Write a key file that only its owner may read. It is written completely or not at all.

    Raises `ArtifactError` if the file exists and `overwrite` is False, or if it cannot be written.
    """
    write_file(path, ENVELOPE.chunks(names.names(), [keys]), private=True, overwrite=overwrite)


def read_keys(path: Path, fingerprint: str, keyset: str) -> tuple[KeyNames, bytes]:
    """Return the names and the keys of a file, for the circuit of that fingerprint and key set.

    Raises `ArtifactError` for a file that cannot be read, is damaged, or does not go with the circuit.
    """
    names, keys = read_key_file(path)
    if not names.belong_to(fingerprint, keyset):
        raise ArtifactError(
            f"The keys of {path} belong to another circuit, with other parameters; compile the one they were "
            "made for, or this one with keys_of=. Keys made for files of format 1 go with a client.zip of "
            "format 1."
        )
    return names, keys


def read_key_file(path: Path) -> tuple[KeyNames, bytes]:
    """Return the names and the secret keys of a file.

    Raises `ArtifactError` for a file that cannot be read or is damaged.
    """
    try:
        check_regular(path)
        if path.stat().st_size > MAX_BYTES:
            raise ArtifactError(
                f"{path} has {path.stat().st_size:,} bytes; no key file has more than {MAX_BYTES:,}."
            )
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"The keys cannot be read from {path}: {error}.") from error
    with naming(path):
        fields, payload = ENVELOPE.unpack(data, MAX_BYTES)
        return KeyNames(**fields), bytes(payload)
