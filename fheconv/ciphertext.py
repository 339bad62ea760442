"""Encrypted images and results, and the bytes in which they travel.

The bytes are, integers big-endian:

    8   magic, b"fheconv" and a zero byte
    2   format version, 1
    4   length of the header
    8   length of the payload
        header: JSON in UTF-8, an object of `kind`, `fingerprint`, `key_id`, `images`, `batched`, `lengths`
        payload: the ciphertexts one after another, their lengths as the header says
    32  SHA-256 of everything before it

The digest is there because the native library does not notice damage inside a ciphertext: it decrypts to
noise. It protects from accidents. Whoever alters bytes on purpose can compute it anew, and no check without
the secret key can tell: send ciphertexts over an authenticated channel.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from typing import Any, Literal

from fheconv.config import check_integer
from fheconv.errors import ArtifactError

MAGIC = b"fheconv\0"
VERSION = 1
MAX_BYTES = 2**31
# Far more than any batch needs (8 bytes an image); it bounds what parsing the JSON of a stranger can take.
HEADER_LIMIT = 2**24
_PREFIX = struct.Struct(">8sHIQ")
_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, kw_only=True)
class Ciphertext:
    """Encrypted images or results, bound to a circuit and a key set.

    kind: "input" for what `encrypt` returns, "output" for what `run` returns.
    fingerprint, key_id: the circuit and the key set, in hexadecimal.
    images: how many they are.
    batched: whether the images came with an axis for the batch; without it there is one.
    values: the serialized ciphertexts, one for each image or for as many as ride in one.

    Raises `ArtifactError` for fields that are not so.
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

    @property
    def nbytes(self) -> int:
        """The size of all the ciphertexts in bytes."""
        return sum(map(len, self.values))

    def to_bytes(self) -> bytes:
        """Return everything as bytes, in the format that this module documents.

        Raises `ArtifactError` for batches whose header would be longer than `from_bytes` reads.
        """
        header = json.dumps(
            {
                "kind": self.kind,
                "fingerprint": self.fingerprint,
                "key_id": self.key_id,
                "images": self.images,
                "batched": self.batched,
                "lengths": [len(value) for value in self.values],
            }
        ).encode()
        if len(header) > HEADER_LIMIT:
            raise ArtifactError(
                f"The header of {len(self.values):,} images takes {len(header):,} bytes, more than "
                f"{HEADER_LIMIT:,}; encrypt fewer images at a time."
            )
        prefix = _PREFIX.pack(MAGIC, VERSION, len(header), self.nbytes)
        body = b"".join((prefix, header, *self.values))
        return body + hashlib.sha256(body).digest()

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, *, max_bytes: int = MAX_BYTES) -> "Ciphertext":
        """Return the ciphertext that `to_bytes` turned into `data`, of at most `max_bytes` bytes.

        Sizes are checked first, then the digest, and only then is anything read. Nothing is unpickled.
        Raises `ArtifactError` that says what is wrong with `data`.
        """
        check_integer("max_bytes", max_bytes, 1)
        if not isinstance(data, bytes | bytearray | memoryview):
            raise ArtifactError(f"from_bytes takes bytes, not {type(data).__name__}.")
        size = memoryview(data).nbytes
        if size > max_bytes:
            raise ArtifactError(
                f"The ciphertext has {size:,} bytes, more than {max_bytes:,}; pass a larger max_bytes "
                f"if you expect it."
            )
        data = memoryview(bytes(data))  # a copy that nobody changes between the check and the reading
        least = _PREFIX.size + _DIGEST_BYTES
        if bytes(data[: len(MAGIC)]) != MAGIC[: len(data)] or not data:
            raise ArtifactError("These bytes are no ciphertext: they begin otherwise than to_bytes() begins.")
        if len(data) < least:
            raise ArtifactError(
                f"The ciphertext is truncated: {len(data):,} bytes, of at least {least}. Send it again."
            )
        _, version, header_size, payload_size = _PREFIX.unpack_from(data)
        if version != VERSION:
            raise ArtifactError(
                f"The ciphertext has format version {version}, and this fheconv reads version {VERSION}; "
                f"use the fheconv that wrote it."
            )
        if header_size > HEADER_LIMIT:
            raise ArtifactError(
                f"The ciphertext's header claims {header_size:,} bytes, more than {HEADER_LIMIT:,}: it is "
                f"altered or not made by to_bytes()."
            )
        expected = least + header_size + payload_size
        if len(data) != expected:
            what = "truncated" if len(data) < expected else "followed by other bytes, or altered"
            raise ArtifactError(
                f"The ciphertext is {what}: {len(data):,} bytes where its prefix says {expected:,}. Send it "
                f"again."
            )
        if hashlib.sha256(data[:-_DIGEST_BYTES]).digest() != data[-_DIGEST_BYTES:]:
            raise ArtifactError("The ciphertext is altered: its SHA-256 does not fit. Send it again.")
        start = _PREFIX.size + header_size
        fields = _parse(bytes(data[_PREFIX.size : start]))
        lengths = fields.pop("lengths")
        whole = isinstance(lengths, list) and all(type(n) is int and n >= 0 for n in lengths)
        if not whole or sum(lengths) != payload_size:
            raise ArtifactError(
                f"The ciphertext's lengths do not add up to its payload of {payload_size:,} bytes."
            )
        values = []
        for length in lengths:
            values.append(bytes(data[start : start + length]))
            start += length
        return cls(**fields, values=tuple(values))

    def __repr__(self) -> str:
        return f"Ciphertext({self.kind}, {self.images} images, {self.nbytes:,} bytes)"


def _parse(header: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(header.decode())
    except (ValueError, RecursionError) as error:  # ValueError: of UTF-8, of JSON, of endless integers
        raise ArtifactError(f"The ciphertext's header is not JSON: {error}.") from error
    names = {"kind", "fingerprint", "key_id", "images", "batched", "lengths"}
    if not isinstance(fields, dict) or set(fields) != names:
        raise ArtifactError(f"The ciphertext's header must be an object of {', '.join(sorted(names))}.")
    return fields
