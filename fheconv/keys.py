"""Key files: the secret and the evaluation keys of a circuit, for their owner alone."""

import os
import secrets
from pathlib import Path

from fheconv.envelope import Envelope
from fheconv.errors import ArtifactError

ENVELOPE = Envelope(magic=b"fhekeys\0", what="key file", maker="save_keys()", names=("fingerprint", "key_id"))
MAX_BYTES = 2**36


def write_keys(path: Path, fingerprint: str, key_id: str, keys: bytes, *, overwrite: bool) -> None:
    """Write a key file that only its owner may read, whole or not at all.

    Raises `ArtifactError` if the file exists and `overwrite` is False, or it cannot be written.
    """
    data = ENVELOPE.pack({"fingerprint": fingerprint, "key_id": key_id}, [keys])
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if overwrite:
                os.replace(beside, path)
            else:
                os.link(beside, path)  # fails if the file exists, as no check beforehand could
        finally:
            beside.unlink(missing_ok=True)
    except FileExistsError as error:
        raise ArtifactError(
            f"{path} exists, and may hold the only copy of other keys; choose another file, or pass "
            "overwrite=True."
        ) from error
    except OSError as error:
        raise ArtifactError(f"The keys cannot be written to {path}: {error}.") from error


def read_keys(path: Path, fingerprint: str) -> tuple[str, bytes]:
    """Return the key id and the keys of a file made for the circuit of that fingerprint.

    Raises `ArtifactError` for a file that cannot be read, is damaged, or belongs to another circuit.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ArtifactError(
                f"{path} has {path.stat().st_size:,} bytes; no key file has more than {MAX_BYTES:,}."
            )
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"The keys cannot be read from {path}: {error}.") from error
    fields, payload = ENVELOPE.unpack(data, MAX_BYTES)
    if fields["fingerprint"] != fingerprint:
        raise ArtifactError(
            f"The keys of {path} belong to another circuit; compile the one they were made for."
        )
    if not isinstance(fields["key_id"], str) or not fields["key_id"]:
        raise ArtifactError(f"The key file {path} names no key set.")
    return fields["key_id"], bytes(payload)
