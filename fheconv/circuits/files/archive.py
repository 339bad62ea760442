"""Writes and reads a circuit as two files: `client.zip` for the keys' owner, `server.zip` for the server.

Both hold `manifest.json`, `interface.json` (see the modules of these names) and `specs.json` (Concrete's
parameters). `server.zip` also holds `circuit.mlir`, the program as Concrete's text, and `config.json`, the
recipe to compile it with. `sha256.json` holds the digest of each of the others. The files contain no
pickle and no native library. The server compiles the text, so a file from elsewhere is only data.

Nothing is unpacked or made that is out of proportion to the file (`LIMITS`, `PACKED`).
"""

import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fheconv.basics.errors import ArtifactError, InvalidArgumentError
from fheconv.basics.files import read_file, write_file
from fheconv.circuits.cost import Cost
from fheconv.circuits.files.consistency import check_fingerprint, check_lanes, check_sizes, check_values
from fheconv.circuits.files.identity import digest, identity_of
from fheconv.circuits.files.interface import interface_from_dict, interface_text
from fheconv.circuits.files.manifest import FORMAT, Manifest
from fheconv.circuits.files.plain import read_json
from fheconv.circuits.files.recipe import Recipe
from fheconv.circuits.files.security import MOST_BYTES as SPECS_BYTES
from fheconv.circuits.files.security import check_security
from fheconv.circuits.sizes import sizes_of
from fheconv.lowering.interface import Interface

CLIENT = ("manifest.json", "interface.json", "specs.json")
SERVER = (*CLIENT, "circuit.mlir", "config.json")
DIGESTS = "sha256.json"
# The most bytes of a file, and of all that is in it.
MOST_BYTES = 2**30
# The most bytes of each part. What `MOST_BYTES` allows is for the program, which only a server compiles.
LIMITS = {
    DIGESTS: 2**12,
    "manifest.json": 2**22,
    "interface.json": 2**26,
    "specs.json": SPECS_BYTES,
    "config.json": 2**18,
    "circuit.mlir": MOST_BYTES,
}
# The JSON in a file has at most so many times the file's own bytes, or so many bytes if that is more. Numbers
# that do not repeat take about a third of their digits when they are packed.
PACKED, FREE = 16, 2**22
# The same for the program, whose tables repeat more.
PROGRAM_PACKED, PROGRAM_FREE = 256, 2**26


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A compiled circuit as plain data, which `save` writes. `specs` are Concrete's parameters."""

    interface: Interface
    specs: bytes
    mlir: str
    cost: Cost
    recipe: Recipe


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
    recipe: Recipe
    file: bytes


def save(
    exported: Exported, folder: str | Path, *, class_names: Sequence[str] | None = None
) -> tuple[Path, Path]:
    """Write `client.zip` and `server.zip` into a folder, and return their paths.

    The folder is made if it does not exist. The files hold no key, and nothing of the calibration images.
    `class_names` are names for the results.

    Raises `ArtifactError` if they cannot be written, or could not be read again because the circuit is larger
    than files may be, `InvalidArgumentError` if there is not one name for each result.
    """
    interface, mlir = exported.interface, exported.mlir.encode()
    identity = identity_of(exported.specs, mlir, interface)
    manifest = Manifest(
        format=FORMAT,
        fingerprint=identity.fingerprint,
        identity=identity,
        fheconv=version("fheconv"),
        concrete=version("concrete-python"),
        input_shape=interface.input_shape,
        output_shape=interface.output_shape,
        class_names=_class_names(class_names, interface.output_shape),
        lanes=interface.lanes.count,
        cost=exported.cost,
    )
    parts = {
        "manifest.json": _json(manifest.to_dict()),
        "interface.json": interface_text(interface),
        "specs.json": exported.specs,
        "circuit.mlir": mlir,
        "config.json": _json(exported.recipe.to_dict()),
    }
    files = [_zipped(_only(parts, names)) for names in (CLIENT, SERVER)]
    try:
        read_client(files[0])
        read_server(files[1])
    except ArtifactError as error:
        raise ArtifactError(f"The circuit has no files that could be read again: {error}") from error
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"There can be no folder {folder}: {error}.") from error
    paths = folder / "client.zip", folder / "server.zip"
    for path, file in zip(paths, files, strict=True):
        write_file(path, [file])
    return paths


def read_client(file: str | Path | bytes) -> ClientParts:
    """Return the contents of a `client.zip`, or of its bytes.

    Raises `ArtifactError` for a file that is damaged, altered or of another version, or whose parameters
    would not hide the images (`fheconv.circuits.files.security`).
    """
    _, parts = _read(file, CLIENT)
    manifest, interface = _checked(parts, _name(file))
    return ClientParts(manifest=manifest, interface=interface, specs=parts["specs.json"])


def read_server(file: str | Path | bytes) -> ServerParts:
    """Return the contents of a `server.zip`, or of its bytes, without compiling it.

    Raises `ArtifactError` for a file that is damaged, altered or of another version.
    """
    data, parts = _read(file, SERVER)
    try:
        recipe = Recipe.from_dict(_loaded(parts, "config.json"))
        mlir = parts["circuit.mlir"].decode()
    except (InvalidArgumentError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ArtifactError(f"The compile options in {_name(file)} are altered: {error!r:.200}.") from error
    manifest, _ = _checked(parts, _name(file))
    return ServerParts(manifest=manifest, specs=parts["specs.json"], mlir=mlir, recipe=recipe, file=data)


def client_file(server_file: bytes) -> bytes:
    """Return the `client.zip` that belongs to the bytes of a `server.zip`."""
    return _zipped(_only(_read(server_file, SERVER)[1], CLIENT))


def load_manifest(file: str | Path) -> Manifest:
    """Return the manifest of a `client.zip` or a `server.zip`.

    Raises `ArtifactError` like `read_client` and `read_server`.
    """
    _, parts = _read(file, SERVER, CLIENT)
    return _checked(parts, _name(file))[0]


def _checked(parts: Mapping[str, bytes], what: str) -> tuple[Manifest, Interface]:
    """Return what both files hold. Raises `ArtifactError` unless all the parts are of one circuit."""
    manifest = Manifest.from_dict(_loaded(parts, "manifest.json"))
    check_fingerprint(manifest, parts, what)
    specs = check_security(parts["specs.json"])
    interface = interface_from_dict(_loaded(parts, "interface.json"))
    if (interface.input_shape, interface.output_shape) != (manifest.input_shape, manifest.output_shape):
        raise ArtifactError("The manifest or the interface is altered: they tell of different shapes.")
    sizes = sizes_of(parts["specs.json"])
    if manifest.format == 1:  # where the sizes of keys were Concrete's figures, which are wrong
        cost = replace(manifest.cost, key_bytes=sizes.key_bytes, sent_key_bytes=sizes.sent_key_bytes)
        manifest = replace(manifest, cost=cost)
    check_values(specs, interface)
    check_lanes(specs, interface, manifest)
    check_sizes(sizes, manifest)
    return manifest, interface


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
    return read_json(parts[name], name, LIMITS[name])


def _only(parts: Mapping[str, bytes], names: Sequence[str]) -> dict[str, bytes]:
    return {name: parts[name] for name in names}


def _zipped(parts: Mapping[str, bytes]) -> bytes:
    """Return a zip of the parts and their digests. The same parts give the same bytes."""
    digests = {name: digest(part) for name, part in parts.items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in {DIGESTS: _json(digests), **parts}.items():
            archive.writestr(zipfile.ZipInfo(name), part, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _name(file: str | Path | bytes) -> str:
    return "The file" if isinstance(file, bytes) else str(file)


def _read(file: str | Path | bytes, *expected: Sequence[str]) -> tuple[bytes, dict[str, bytes]]:
    """Return the bytes and the contents of a zip that holds exactly one of the `expected` lists of names.

    Nothing is unpacked to the disk. No more bytes are read than the zip's sizes say, and these are limited.
    """
    what = _name(file)
    data = file if isinstance(file, bytes) else read_file(Path(file), "The circuit", MOST_BYTES)
    if len(data) > MOST_BYTES:
        raise ArtifactError(f"{what} has more than {MOST_BYTES:,} bytes; no file of a circuit has more.")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = _parts(archive, what, len(data), expected)
    # The errors that zipfile raises for damaged files are only partly documented.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ArtifactError(
            f"{what} is truncated, altered or no file of fheconv: {error}. Get it again."
        ) from error
    digests = _loaded(parts, DIGESTS)
    if not isinstance(digests, dict):
        raise ArtifactError(f"{what} is altered: {DIGESTS} is no object. Get it again.")
    for name, part in parts.items():
        if name != DIGESTS and digest(part) != digests.get(name):
            raise ArtifactError(f"{what} is altered: the SHA-256 of {name} does not fit. Get it again.")
    return data, parts


def _parts(
    archive: zipfile.ZipFile, what: str, size: int, expected: Sequence[Sequence[str]]
) -> dict[str, bytes]:
    """Return the contents of a zip of `size` bytes."""
    entries = archive.infolist()
    names = sorted(entry.filename for entry in entries)
    if names not in [sorted((DIGESTS, *wanted)) for wanted in expected]:
        for mine, other, wanted in (("server.zip", SERVER, CLIENT), ("client.zip", CLIENT, SERVER)):
            if names == sorted((DIGESTS, *other)) and wanted in expected:
                right = "client.zip" if wanted is CLIENT else "server.zip"
                raise ArtifactError(f"{what} is a {mine}; give the {right} that was saved with it.")
        raise ArtifactError(
            f"{what} holds {names!r:.300}, where {' or '.join(sorted((*expected[0], DIGESTS)))} belong; give "
            "the client.zip or the server.zip that circuit.save wrote, whichever is asked for."
        )
    if sum(entry.file_size for entry in entries) > MOST_BYTES:
        raise ArtifactError(
            f"{what} would unpack to more than {MOST_BYTES:,} bytes, which no file of a circuit does."
        )
    _check_declared(entries, what, size)
    parts = {}
    for entry in entries:
        with archive.open(entry) as part:
            parts[entry.filename] = part.read(entry.file_size + 1)
        if len(parts[entry.filename]) != entry.file_size:
            raise zipfile.BadZipFile(f"{entry.filename} is not as long as it says")
    return parts


def _check_declared(entries: Sequence[zipfile.ZipInfo], what: str, size: int) -> None:
    """Raise `ArtifactError` for parts that declare more than a file of `size` bytes can hold."""
    text = program = 0
    for entry in entries:
        name, unpacked = entry.filename, entry.file_size
        if unpacked > LIMITS[name]:
            raise ArtifactError(
                f"{what}: {name} would unpack to {unpacked:,} bytes; fheconv writes at most {LIMITS[name]:,}."
            )
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others may ask for memory
            raise ArtifactError(f"{what} is altered: {name} is packed otherwise than fheconv packs it.")
        if name == "circuit.mlir":
            program += unpacked
        else:
            text += unpacked
    for unpacked, most in (
        (text, max(PACKED * size, FREE)),
        (program, max(PROGRAM_PACKED * size, PROGRAM_FREE)),
    ):
        if unpacked > most:
            raise ArtifactError(
                f"{what} has {size:,} bytes and would unpack to {unpacked:,}; a file of a circuit unpacks to "
                f"at most {most:,}."
            )
