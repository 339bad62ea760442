"""Saved circuits taken apart and put together again, and secret keys found in any bytes."""

import hashlib
import io
import json
import zipfile

import numpy as np

from fheconv.circuits.files.archive import DIGESTS


def secret_rows(data):
    """How many words of 64 bits end a row of 32 that are 0 or 1 and not all the same, at any offset."""
    found = 0
    for start in range(8):
        words = np.frombuffer(data[start : start + (len(data) - start) // 8 * 8], "<u8")
        small = (words <= 1).astype(int)
        ones = np.concatenate([[0], np.cumsum(small * (words == 1))])
        run = np.concatenate([[0], np.cumsum(small)])
        full = run[32:] - run[:-32] == 32
        mixed = ones[32:] - ones[:-32]
        found += int((full & (mixed >= 8) & (mixed <= 24)).sum())
    return found


def parts_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(parts, *, digests=True):
    """A zip of the parts, with digests that fit unless told otherwise."""
    buffer = io.BytesIO()
    if digests:
        rest = {name: part for name, part in parts.items() if name != DIGESTS}
        fitting = {name: hashlib.sha256(part).hexdigest() for name, part in rest.items()}
        parts = {**parts, DIGESTS: json.dumps(fitting).encode()}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return buffer.getvalue()
