"""Writes and reads a circuit as two files: `client.zip` for the keys' owner, `server.zip` for the server.

Both hold `manifest.json`, `interface.json` (see the modules of these names) and `specs.json` (Concrete's
parameters). `server.zip` also holds `circuit.mlir`, the circuit as Concrete's text, and `config.json`, the
configuration to compile it with. `sha256.json` holds the digest of each of the others. The files contain no
pickle and no native library. The server compiles the text, so a file from elsewhere is only data.
"""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fheconv.basics.compile_config import CompileConfig, ParameterRange
from fheconv.basics.errors import ArtifactError, InvalidArgumentError
from fheconv.basics.files import write_file
from fheconv.circuits.cost import Cost
from fheconv.circuits.files.interface import interface_from_dict, interface_to_dict
from fheconv.circuits.files.manifest import Manifest
from fheconv.circuits.files.security import check_security
from fheconv.circuits.native.protocol import fingerprint_of
from fheconv.lowering.interface import Interface

CLIENT = ("manifest.json", "interface.json", "specs.json")
SERVER = (*CLIENT, "circuit.mlir", "config.json")
DIGESTS = "sha256.json"
# The most bytes of a file, and of each part of it.
MOST_BYTES = 2**30
# The fields of a `CompileConfig` that `config.json` holds: those on which the parameters depend.
_CONFIG = (
    "p_error",
    "global_p_error",
    "security_level",
    "compress_input",
    "compress_evaluation_keys",
    "parameters",
)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A compiled circuit as plain data, which `save` writes. `specs` are Concrete's parameters."""

    interface: Interface
    fingerprint: str
    specs: bytes
    mlir: str
    cost: Cost
    config: CompileConfig


@dataclass(frozen=True, kw_only=True)
class ClientParts:
    """The checked contents of a `client.zip`."""

    manifest: Manifest
    interface: Interface
    specs: bytes


@dataclass(frozen=True, kw_only=True)
class ServerParts:
    """The checked contents of a `server.zip`. `file` is the zip itself."""

    manifest: Manifest
    specs: bytes
    mlir: str
    config: CompileConfig
    file: bytes


def save(
    exported: Exported, folder: str | Path, *, class_names: Sequence[str] | None = None
) -> tuple[Path, Path]:
    """Write `client.zip` and `server.zip` into a folder, and return their paths.

    The folder is made if it does not exist. The files hold the circuit for one image in each ciphertext. They
    hold no key, and nothing of the calibration images. `class_names` are names for the results.

    Raises `ArtifactError` if they cannot be written, `InvalidArgumentError` if there is not one name for each
    result.
    """
    interface = exported.interface
    manifest = Manifest(
        fingerprint=exported.fingerprint,
        fheconv=version("fheconv"),
        concrete=version("concrete-python"),
        input_shape=interface.input_shape,
        output_shape=interface.output_shape,
        class_names=_class_names(class_names, interface.output_shape),
        cost=exported.cost,
    )
    config = {name: value for name, value in asdict(exported.config).items() if name in _CONFIG}
    parts = {
        "manifest.json": _json(manifest.to_dict()),
        "interface.json": _json(interface_to_dict(interface)),
        "specs.json": exported.specs,
        "circuit.mlir": exported.mlir.encode(),
        "config.json": _json(config),
    }
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"There can be no folder {folder}: {error}.") from error
    paths = folder / "client.zip", folder / "server.zip"
    for path, names in zip(paths, (CLIENT, SERVER), strict=True):
        write_file(path, [_zipped(_only(parts, names))])
    return paths


def read_client(file: str | Path | bytes) -> ClientParts:
    """Return the contents of a `client.zip`, or of its bytes.

    Raises `ArtifactError` for a file that is damaged, altered or of another version, or whose parameters
    would not hide the images (`fheconv.circuits.files.security`).
    """
    _, parts = _read(file, CLIENT)
    check_security(parts["specs.json"])
    manifest, interface = _manifest(parts), interface_from_dict(_loaded(parts, "interface.json"))
    if (interface.input_shape, interface.output_shape) != (manifest.input_shape, manifest.output_shape):
        raise ArtifactError("The manifest or the interface is altered: they tell of different shapes.")
    return ClientParts(manifest=manifest, interface=interface, specs=parts["specs.json"])


def read_server(file: str | Path | bytes) -> ServerParts:
    """Return the contents of a `server.zip`, or of its bytes, without compiling it.

    Raises `ArtifactError` for a file that is damaged, altered or of another version.
    """
    data, parts = _read(file, SERVER)
    try:
        given = _loaded(parts, "config.json")
        if given["parameters"] is not None:
            lists = {name: tuple(numbers) for name, numbers in given["parameters"].items()}
            given["parameters"] = ParameterRange(**lists)
        config = CompileConfig(**{name: given[name] for name in _CONFIG})
        mlir = parts["circuit.mlir"].decode()
    except (InvalidArgumentError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ArtifactError(f"The compile options in {_name(file)} are altered: {error!r:.200}.") from error
    manifest = _manifest(parts)
    found = fingerprint_of(parts["specs.json"], parts["circuit.mlir"])
    if found != manifest.fingerprint:
        raise ArtifactError(
            f"{_name(file)} is altered: its contents have the fingerprint {found}, and its manifest says "
            f"{manifest.fingerprint}. Get it again, from whoever compiled it."
        )
    return ServerParts(manifest=manifest, specs=parts["specs.json"], mlir=mlir, config=config, file=data)


def client_file(server_file: bytes) -> bytes:
    """Return the `client.zip` that belongs to the bytes of a `server.zip`."""
    return _zipped(_only(_read(server_file, SERVER)[1], CLIENT))


def load_manifest(file: str | Path) -> Manifest:
    """Return the manifest of a `client.zip` or a `server.zip`.

    Raises `ArtifactError` like `read_client` and `read_server`.
    """
    return _manifest(_read(file, SERVER, CLIENT)[1])


def _manifest(parts: Mapping[str, bytes]) -> Manifest:
    return Manifest.from_dict(_loaded(parts, "manifest.json"))


def _class_names(names: Sequence[str] | None, output_shape: tuple[int, ...]) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise InvalidArgumentError(f"class_names={names!r:.50}; it must be a sequence of words.")
    if output_shape != (len(names),):
        raise InvalidArgumentError(
            f"There are {len(names)} class_names, and the model's outputs for an image have shape "
            f"{output_shape}; give one for each score."
        )
    return tuple(names)


def _json(data: Any) -> bytes:
    return json.dumps(data).encode()


def _loaded(parts: Mapping[str, bytes], name: str) -> Any:
    try:
        return json.loads(parts[name])
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{name} is not JSON: {error}.") from error


def _only(parts: Mapping[str, bytes], names: Sequence[str]) -> dict[str, bytes]:
    return {name: parts[name] for name in names}


def _zipped(parts: Mapping[str, bytes]) -> bytes:
    """Return a zip of the parts and their digests. The same parts give the same bytes."""
    digests = {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in {DIGESTS: _json(digests), **parts}.items():
            archive.writestr(zipfile.ZipInfo(name), part, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _name(file: str | Path | bytes) -> str:
    return "The file" if isinstance(file, bytes) else str(file)


def _read(file: str | Path | bytes, *expected: Sequence[str]) -> tuple[bytes, dict[str, bytes]]:
    """Return the bytes and the contents of a zip that holds exactly one of the `expected` lists of names.

    Nothing is unpacked to the disk. No more bytes are read than the zip's sizes say and `MOST_BYTES` allows.
    """
    what = _name(file)
    try:
        size = len(file) if isinstance(file, bytes) else Path(file).stat().st_size
        if size > MOST_BYTES:
            raise ArtifactError(
                f"{what} has {size:,} bytes; no file of a circuit has more than {MOST_BYTES:,}."
            )
        data = file if isinstance(file, bytes) else Path(file).read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = _parts(archive, what, expected)
    except OSError as error:
        raise ArtifactError(f"{what} cannot be read: {error}.") from error
    # The errors that zipfile raises for damaged files are only partly documented.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ArtifactError(
            f"{what} is truncated, altered or no file of fheconv: {error}. Get it again."
        ) from error
    digests = _loaded(parts, DIGESTS)
    if not isinstance(digests, dict):
        raise ArtifactError(f"{what} is altered: {DIGESTS} is no object. Get it again.")
    for name, part in parts.items():
        if name != DIGESTS and hashlib.sha256(part).hexdigest() != digests.get(name):
            raise ArtifactError(f"{what} is altered: the SHA-256 of {name} does not fit. Get it again.")
    return data, parts


def _parts(archive: zipfile.ZipFile, what: str, expected: Sequence[Sequence[str]]) -> dict[str, bytes]:
    entries = archive.infolist()
    names = sorted(entry.filename for entry in entries)
    if names not in [sorted((DIGESTS, *wanted)) for wanted in expected]:
        raise ArtifactError(
            f"{what} holds {names!r:.300}, where {' or '.join(sorted((*expected[0], DIGESTS)))} belong; give "
            "the client.zip or the server.zip that circuit.save wrote, whichever is asked for."
        )
    if sum(entry.file_size for entry in entries) > MOST_BYTES:
        raise ArtifactError(
            f"{what} would unpack to more than {MOST_BYTES:,} bytes, which no file of a circuit does."
        )
    parts = {}
    for entry in entries:
        with archive.open(entry) as part:
            parts[entry.filename] = part.read(entry.file_size + 1)
        if len(parts[entry.filename]) != entry.file_size:
            raise zipfile.BadZipFile(f"{entry.filename} is not as long as it says")
    return parts
