"""Holds encrypted images and results, and turns them into bytes and back.

The format is that of `fheconv.circuits.files.envelope`. The header is an object with the fields `kind`,
`fingerprint`, `key_id`, `images`, `batched` and `lengths`. The payload is the ciphertexts one after another;
`lengths` are their lengths.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fheconv.basics.errors import ArtifactError
from fheconv.basics.files import naming, read_file, write_file
from fheconv.circuits.files.envelope import MAX_BYTES, Envelope

OTHER_KEYS = "The ciphertext was made with other keys; encrypt again with the present ones."


ENVELOPE = Envelope(
    magic=b"fheconv\0",
    what="ciphertext",
    maker="to_bytes()",
    names=("kind", "fingerprint", "key_id", "images", "batched", "lengths"),
)


@dataclass(frozen=True, kw_only=True)
class Ciphertext:
    """Encrypted images or results, bound to a circuit and a key set.

    kind: "input" for what `encrypt` returns, "output" for what `run` returns.
    fingerprint, key_id: the circuit and the key set, in hexadecimal.
    images: the number of images.
    batched: True if the images came with a batch axis. Without it there is one image.
    values: the serialized ciphertexts, one for each image, or for each group of images that share one.

    Raises `ArtifactError` for other fields.

    Example:
        >>> import numpy as np
        >>> from fheconv import compile, quantize
        >>> image = np.arange(9).reshape(1, 3, 3)
        >>> circuit = compile(quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), image))
        >>> circuit.keygen()
        >>> encrypted = circuit.encrypt(image)
        >>> encrypted.kind, encrypted.images, encrypted.batched
        ('input', 1, False)
        >>> Ciphertext.from_bytes(encrypted.to_bytes()) == encrypted
        True
    """

    kind: Literal["input", "output"]
    fingerprint: str
    key_id: str
    images: int
    batched: bool
    values: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if self.kind not in ("input", "output"):
            raise ArtifactError(f'A ciphertext of kind {self.kind!r:.50}; it must be "input" or "output".')
        for name in ("fingerprint", "key_id"):
            if not isinstance(getattr(self, name), str):
                raise ArtifactError(f"The ciphertext's {name} is {getattr(self, name)!r:.50}, not a string.")
        if not isinstance(self.batched, bool):
            raise ArtifactError(f"The ciphertext's batched is {self.batched!r:.50}, not True or False.")
        if not isinstance(self.values, tuple) or not all(isinstance(v, bytes) for v in self.values):
            raise ArtifactError("The ciphertext's values are not a tuple of bytes.")
        if type(self.images) is not int or self.images < len(self.values):
            raise ArtifactError(f"A ciphertext of {self.images!r:.50} images has {len(self.values)} values.")
        if not self.batched and (self.images, len(self.values)) != (1, 1):
            raise ArtifactError(f"A ciphertext without a batch has {self.images} images.")

    def part(self, start: int, stop: int, lanes: int) -> "Ciphertext":
        """Return a ciphertext of the values from `start` to `stop`, of `lanes` images each.

        The last value may hold fewer images.
        """
        images = min(self.images, stop * lanes) - start * lanes
        return replace(self, images=images, values=self.values[start:stop])

    def with_results(self, values: Iterable[bytes]) -> "Ciphertext":
        """Return a ciphertext of the results of these images. `values` holds one result for each value."""
        return replace(self, kind="output", values=tuple(values))

    def answers(self, images: "Ciphertext") -> bool:
        """Return True if these results have the circuit, the key set and the number of `images`."""
        return len(self.values) == len(images.values) and self == images.with_results(self.values)

    @property
    def nbytes(self) -> int:
        """The size of all the ciphertexts in bytes."""
        return sum(map(len, self.values))

    def to_bytes(self) -> bytes:
        """Return everything as bytes, in the format of `fheconv.circuits.files.envelope`.

        Raises `ArtifactError` for batches whose header would be longer than `from_bytes` reads.
        """
        header = {
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "key_id": self.key_id,
            "images": self.images,
            "batched": self.batched,
            "lengths": [len(value) for value in self.values],
        }
        return ENVELOPE.pack(header, self.values)

    def save(self, path: str | Path) -> None:
        """Write `to_bytes` to a file. Raises `ArtifactError` if it cannot be written."""
        write_file(Path(path), [self.to_bytes()])

    @classmethod
    def load(cls, path: str | Path, *, max_bytes: int = MAX_BYTES) -> "Ciphertext":
        """Return the ciphertext of a file of at most `max_bytes` bytes.

        Raises `ArtifactError` that says what is wrong with the file.
        """
        path = Path(path)
        data = read_file(path, "The ciphertext", max_bytes)
        with naming(path):
            return cls.from_bytes(data, max_bytes=max_bytes)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, *, max_bytes: int = MAX_BYTES) -> "Ciphertext":
        """Return the ciphertext that `to_bytes` turned into `data`, of at most `max_bytes` bytes.

        Sizes are checked first, then the digest. Only then is anything read. Nothing is unpickled.
        Raises `ArtifactError` that says what is wrong with `data`.
        """
        fields, payload = ENVELOPE.unpack(data, max_bytes)
        lengths = fields.pop("lengths")
        whole = isinstance(lengths, list) and all(type(n) is int and n >= 0 for n in lengths)
        if not whole or sum(lengths) != len(payload):
            raise ArtifactError(
                f"The ciphertext's lengths do not add up to its payload of {len(payload):,} bytes."
            )
        values, start = [], 0
        for length in lengths:
            values.append(bytes(payload[start : start + length]))
            start += length
        return cls(**fields, values=tuple(values))

    def __repr__(self) -> str:
        images = f"{self.images} image{'' if self.images == 1 else 's'}"
        return f"Ciphertext({self.kind}, {images}, {self.nbytes:,} bytes)"


def check_ciphertext(
    ciphertext: Any, kind: str, step: str, fingerprint: str, key_id: str, lanes: int
) -> None:
    """Raise `ArtifactError` unless it is a ciphertext of this kind, circuit, key set and number of lanes."""
    if not isinstance(ciphertext, Ciphertext):
        raise ArtifactError(
            f"{step} takes a Ciphertext, not {type(ciphertext).__name__}; encrypt images first."
        )
    if ciphertext.kind != kind:
        needs = "what encrypt() returned" if kind == "input" else "what run() returned"
        raise ArtifactError(f"{step} takes {needs}; this ciphertext is an {ciphertext.kind}.")
    if ciphertext.fingerprint != fingerprint:
        raise ArtifactError(
            "The ciphertext belongs to another circuit; encrypt with this one, with the client.zip that was "
            "saved together with the server.zip. (With one of file format 1, a client of format 1 goes.)"
        )
    if ciphertext.key_id != key_id:
        raise ArtifactError(OTHER_KEYS)
    if len(ciphertext.values) != -(-ciphertext.images // lanes):
        raise ArtifactError(
            f"The ciphertext says it holds {ciphertext.images} images, in {len(ciphertext.values)} values of "
            f"{lanes} each."
        )
