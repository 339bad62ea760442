"""Packs ciphertexts and keys into bytes with a header, a payload and a digest, and unpacks them.

The format is as follows, with big-endian integers:

    8   magic: the kind of bytes
    2   format version, 1
    4   length of the header
    8   length of the payload
        header: JSON in UTF-8, an object
        payload
    32  SHA-256 of everything before it

The digest is needed because the native library does not notice damage inside a ciphertext: it decrypts to
noise. The digest protects against accidents only. Somebody who alters bytes on purpose can compute it anew,
and no check without the secret key can detect that. So send ciphertexts over an authenticated channel.
"""

import hashlib
import json
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fheconv.basics.checks import check_integer
from fheconv.basics.errors import ArtifactError
from fheconv.circuits.files.plain import read_json

VERSION = 1
MAX_BYTES = 2**31
# The most bytes of a header. This is far more than any batch needs (8 bytes an image). It bounds the cost of
# parsing JSON from a stranger.
HEADER_LIMIT = 2**24
_PREFIX = struct.Struct(">8sHIQ")
_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """One kind of bytes: its magic (8 bytes), its name, its maker, and the names in its header.

    `later` are names that bytes of earlier versions do not have.
    """

    magic: bytes
    what: str
    maker: str
    names: Collection[str]
    later: Collection[str] = ()

    def chunks(self, header: dict[str, Any], payload: Sequence[bytes]) -> Iterator[bytes]:
        """Yield header and payload as bytes. Raises `ArtifactError` for a header that `unpack` refuses."""
        encoded = json.dumps(header).encode()
        if len(encoded) > HEADER_LIMIT:
            raise ArtifactError(
                f"The header of {len(payload):,} images takes {len(encoded):,} bytes, more than "
                f"{HEADER_LIMIT:,}; encrypt fewer images at a time."
            )
        digest = hashlib.sha256()
        prefix = _PREFIX.pack(self.magic, VERSION, len(encoded), sum(map(len, payload)))
        for chunk in (prefix, encoded, *payload):
            digest.update(chunk)
            yield chunk
        yield digest.digest()

    def pack(self, header: dict[str, Any], payload: Sequence[bytes]) -> bytes:
        """Return header and payload as bytes. Raises `ArtifactError` for a header that `unpack` refuses."""
        return b"".join(self.chunks(header, payload))

    def unpack(self, data: Any, max_bytes: int) -> tuple[dict[str, Any], memoryview]:
        """Return the header and the payload of bytes that `pack` made, at most `max_bytes` of them.

        Sizes are checked first, then the digest. Only then is anything read. Nothing is unpickled.
        Raises `ArtifactError` that says what is wrong with `data`.
        """
        check_integer("max_bytes", max_bytes, 1)
        if not isinstance(data, bytes | bytearray | memoryview):
            raise ArtifactError(f"from_bytes takes bytes, not {type(data).__name__}.")
        incoming = Incoming(self, max_bytes)
        incoming.check_size(memoryview(data).nbytes)
        data = memoryview(bytes(data))  # a copy, which nobody can change after the check
        incoming.feed(data)
        fields = incoming.close()
        return fields, data[incoming.payload_start : -_DIGEST_BYTES]

    def parse(self, header: bytes) -> dict[str, Any]:
        """Return the fields of a header. Raises `ArtifactError` if it has other fields, or is no header."""
        fields = read_json(header, f"The {self.what}'s header", HEADER_LIMIT)
        if not isinstance(fields, dict) or set(fields) - set(self.later) != set(self.names):
            raise ArtifactError(
                f"The {self.what}'s header must be an object of {', '.join(sorted(self.names))}."
            )
        return fields


class Incoming:
    """Checks bytes that arrive piece by piece, so that they need not be in memory all at once.

    `feed` raises `ArtifactError` as soon as something is wrong with the bytes. `close` raises it if they end
    too early or their digest does not fit. `size` is the number of bytes so far. The payload begins at
    `payload_start` and has `payload_size` bytes. `digest` is the digest in hexadecimal.
    """

    def __init__(self, envelope: Envelope, max_bytes: int) -> None:
        self.size = 0
        self.payload_start = self.payload_size = 0
        self.digest = ""
        self._envelope, self._max_bytes = envelope, max_bytes
        self._expected: int | None = None
        self._hash = hashlib.sha256()
        self._head = bytearray()
        self._tail = b""

    def check_size(self, size: int) -> None:
        """Raise `ArtifactError` if `size` bytes are too many."""
        if size > self._max_bytes:
            raise ArtifactError(
                f"The {self._envelope.what} has {size:,} bytes, more than {self._max_bytes:,}; pass a larger "
                "max_bytes if you expect it."
            )

    def feed(self, chunk: bytes | memoryview) -> None:
        """Take the next bytes."""
        self.size += len(chunk)
        self.check_size(self.size)
        missing = (self.payload_start or _PREFIX.size) - len(self._head)
        if missing > 0:
            self._head += chunk[:missing]
            if self._head:
                self._check_head()
            self._head += chunk[missing : missing + self.payload_start - len(self._head)]
        # The last bytes are the digest. They are not part of what is digested.
        if len(chunk) >= _DIGEST_BYTES:
            self._hash.update(self._tail)
            self._hash.update(memoryview(chunk)[:-_DIGEST_BYTES])
            self._tail = bytes(chunk[-_DIGEST_BYTES:])
        else:
            last = self._tail + bytes(chunk)
            self._hash.update(last[:-_DIGEST_BYTES])
            self._tail = last[-_DIGEST_BYTES:]

    def close(self) -> dict[str, Any]:
        """Return the fields of the header, once everything has arrived."""
        what = self._envelope.what
        self._check_head()
        if self._expected is None:
            raise ArtifactError(
                f"The {what} is truncated: {self.size:,} bytes, of at least {_PREFIX.size + _DIGEST_BYTES}. "
                "Send it again."
            )
        if self.size != self._expected:
            happened = "truncated" if self.size < self._expected else "followed by other bytes, or altered"
            raise ArtifactError(
                f"The {what} is {happened}: {self.size:,} bytes where its prefix says {self._expected:,}. "
                "Send it again."
            )
        if self._hash.digest() != self._tail:
            raise ArtifactError(f"The {what} is altered: its SHA-256 does not fit. Send it again.")
        self.digest = self._tail.hex()
        return self._envelope.parse(bytes(self._head[_PREFIX.size :]))

    def _check_head(self) -> None:
        """Raise `ArtifactError` if the part of the prefix that has arrived is wrong."""
        envelope, head = self._envelope, self._head
        if bytes(head[: len(envelope.magic)]) != envelope.magic[: len(head)] or not head:
            raise ArtifactError(
                f"These bytes are no {envelope.what}: they begin otherwise than {envelope.maker} begins."
            )
        if len(head) < _PREFIX.size or self._expected is not None:
            return
        _, version, header_size, payload_size = _PREFIX.unpack_from(head)
        if version != VERSION:
            raise ArtifactError(
                f"The {envelope.what} has format version {version}, and this fheconv reads version "
                f"{VERSION}; use the fheconv that wrote it."
            )
        if header_size > HEADER_LIMIT:
            raise ArtifactError(
                f"The {envelope.what}'s header claims {header_size:,} bytes, more than {HEADER_LIMIT:,}: it "
                f"is altered or not made by {envelope.maker}."
            )
        self.payload_start = _PREFIX.size + header_size
        self.payload_size = payload_size
        self._expected = self.payload_start + payload_size + _DIGEST_BYTES
