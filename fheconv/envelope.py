"""The bytes in which ciphertexts and keys travel: a header, a payload, and a digest of both.

The bytes are, integers big-endian:

    8   magic: what it is
    2   format version, 1
    4   length of the header
    8   length of the payload
        header: JSON in UTF-8, an object
        payload
    32  SHA-256 of everything before it

The digest is there because the native library does not notice damage inside a ciphertext: it decrypts to
noise. It protects from accidents. Whoever alters bytes on purpose can compute it anew, and no check without
the secret key can tell: send ciphertexts over an authenticated channel.
"""

import hashlib
import json
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from fheconv.config import check_integer
from fheconv.errors import ArtifactError

VERSION = 1
MAX_BYTES = 2**31
# Far more than any batch needs (8 bytes an image); it bounds what parsing the JSON of a stranger can take.
HEADER_LIMIT = 2**24
_PREFIX = struct.Struct(">8sHIQ")
_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """One kind of bytes: its magic (8 bytes), what it is called, who makes it, and its header's names."""

    magic: bytes
    what: str
    maker: str
    names: Collection[str]

    def pack(self, header: dict[str, Any], payload: Sequence[bytes]) -> bytes:
        """Return header and payload as bytes. Raises `ArtifactError` for a header that `unpack` refuses."""
        encoded = json.dumps(header).encode()
        if len(encoded) > HEADER_LIMIT:
            raise ArtifactError(
                f"The header of {len(payload):,} images takes {len(encoded):,} bytes, more than "
                f"{HEADER_LIMIT:,}; encrypt fewer images at a time."
            )
        prefix = _PREFIX.pack(self.magic, VERSION, len(encoded), sum(map(len, payload)))
        body = b"".join((prefix, encoded, *payload))
        return body + hashlib.sha256(body).digest()

    def unpack(self, data: Any, max_bytes: int) -> tuple[dict[str, Any], memoryview]:
        """Return the header and the payload of what `pack` made, of at most `max_bytes` bytes.

        Sizes are checked first, then the digest, and only then is anything read. Nothing is unpickled.
        Raises `ArtifactError` that says what is wrong with `data`.
        """
        what = self.what
        check_integer("max_bytes", max_bytes, 1)
        if not isinstance(data, bytes | bytearray | memoryview):
            raise ArtifactError(f"from_bytes takes bytes, not {type(data).__name__}.")
        size = memoryview(data).nbytes
        if size > max_bytes:
            raise ArtifactError(
                f"The {what} has {size:,} bytes, more than {max_bytes:,}; pass a larger max_bytes "
                f"if you expect it."
            )
        data = memoryview(bytes(data))  # a copy that nobody changes between the check and the reading
        least = _PREFIX.size + _DIGEST_BYTES
        if bytes(data[: len(self.magic)]) != self.magic[: len(data)] or not data:
            raise ArtifactError(f"These bytes are no {what}: they begin otherwise than {self.maker} begins.")
        if len(data) < least:
            raise ArtifactError(
                f"The {what} is truncated: {len(data):,} bytes, of at least {least}. Send it again."
            )
        _, version, header_size, payload_size = _PREFIX.unpack_from(data)
        if version != VERSION:
            raise ArtifactError(
                f"The {what} has format version {version}, and this fheconv reads version {VERSION}; "
                f"use the fheconv that wrote it."
            )
        if header_size > HEADER_LIMIT:
            raise ArtifactError(
                f"The {what}'s header claims {header_size:,} bytes, more than {HEADER_LIMIT:,}: it is "
                f"altered or not made by {self.maker}."
            )
        expected = least + header_size + payload_size
        if len(data) != expected:
            happened = "truncated" if len(data) < expected else "followed by other bytes, or altered"
            raise ArtifactError(
                f"The {what} is {happened}: {len(data):,} bytes where its prefix says {expected:,}. Send it "
                f"again."
            )
        if hashlib.sha256(data[:-_DIGEST_BYTES]).digest() != data[-_DIGEST_BYTES:]:
            raise ArtifactError(f"The {what} is altered: its SHA-256 does not fit. Send it again.")
        start = _PREFIX.size + header_size
        return self._parse(bytes(data[_PREFIX.size : start])), data[start:-_DIGEST_BYTES]

    def _parse(self, header: bytes) -> dict[str, Any]:
        try:
            fields = json.loads(header.decode())
        except (ValueError, RecursionError) as error:  # ValueError: of UTF-8, of JSON, of endless integers
            raise ArtifactError(f"The {self.what}'s header is not JSON: {error}.") from error
        if not isinstance(fields, dict) or set(fields) != set(self.names):
            raise ArtifactError(
                f"The {self.what}'s header must be an object of {', '.join(sorted(self.names))}."
            )
        return fields
