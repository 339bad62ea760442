"""Saved circuits taken apart and put together again, and secret keys found in any bytes and objects."""

import gc
import hashlib
import io
import json
import types
import zipfile

import numpy as np

from fheconv.circuits.files.archive import DIGESTS
from fheconv.circuits.files.identity import Identity, digest, first_fingerprint


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


def reachable(thing):
    """All that an object holds, and what that holds, and so on: attributes, items and what closures see.

    Classes, modules and the globals of functions are nobody's own.
    """
    seen, waiting = {id(thing): thing}, [thing]
    while waiting:
        one = waiting.pop()
        held = (
            [one.__closure__, one.__defaults__]
            if isinstance(one, types.FunctionType)
            else gc.get_referents(one)
        )
        for part in held:
            if id(part) not in seen and not isinstance(part, type | types.ModuleType):
                seen[id(part)] = part
                waiting.append(part)
    return list(seen.values())


def secrets_held(thing):
    """Return the secret keys that an object holds, as bytes."""
    return [part for part in reachable(thing) if isinstance(part, bytes | bytearray) and secret_rows(part)]


def shown(thing):
    """Return how each object of fheconv that an object holds shows itself."""
    mine = (part for part in reachable(thing) if type(part).__module__.partition(".")[0] == "fheconv")
    return "".join(map(repr, mine))


def parts_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sealed(parts):
    """The parts with a manifest whose fingerprint fits whatever is in them."""
    manifest = json.loads(parts["manifest.json"])
    program = parts.get("circuit.mlir")
    identity = Identity(
        parameters=digest(parts["specs.json"]),
        program=manifest["identity"]["program"] if program is None else digest(program),
        interface=digest(parts["interface.json"]),
    )
    manifest.update(identity=vars(identity), fingerprint=identity.fingerprint)
    return {**parts, "manifest.json": json.dumps(manifest).encode()}


def of_first_format(folder, name):
    """A file as fheconv wrote it when the fingerprint was of parameters and program alone."""
    whole = parts_of(folder / "server.zip")
    parts = parts_of(folder / name)
    manifest = json.loads(parts["manifest.json"])
    del manifest["identity"], manifest["cost"]["sent_key_bytes"]
    manifest["format"] = 1
    manifest["fingerprint"] = first_fingerprint(whole["specs.json"], whole["circuit.mlir"])
    return zipped({**parts, "manifest.json": json.dumps(manifest).encode()})


def zipped(parts, *, digests=True, method=zipfile.ZIP_DEFLATED):
    """A zip of the parts, with digests that fit unless told otherwise."""
    buffer = io.BytesIO()
    if digests:
        rest = {name: part for name, part in parts.items() if name != DIGESTS}
        fitting = {name: hashlib.sha256(part).hexdigest() for name, part in rest.items()}
        parts = {**parts, DIGESTS: json.dumps(fitting).encode()}
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return buffer.getvalue()
