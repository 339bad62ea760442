"""Tells what a file is: a side of a circuit, keys or a ciphertext. Nothing is compiled or decrypted."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from fheconv.basics.errors import ArtifactError
from fheconv.basics.report import Report
from fheconv.circuits.ciphertext import Ciphertext
from fheconv.circuits.files.archive import load_manifest
from fheconv.circuits.files.manifest import Manifest
from fheconv.circuits.keys import StoredKeys, read_key_file
from fheconv.cli.kinds import kind_of


@dataclass(frozen=True, kw_only=True, repr=False)
class Inspection(Report):
    """The description of a file: its kind, and the circuit it belongs to.

    kind: "client", "server", "secret keys", "evaluation keys", "encrypted images" or "encrypted results".
    size: the size of the file in bytes.
    fingerprint: the circuit's fingerprint, in hexadecimal.
    key_id: the id of the key set, None for the sides of a circuit.
    images: the number of images or results, None for other files.
    manifest: the manifest of a side of a circuit, with its cost, None for other files.
    """

    kind: str
    size: int
    fingerprint: str
    key_id: str | None = None
    images: int | None = None
    manifest: Manifest | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, ready for JSON."""
        return {
            "kind": self.kind,
            "bytes": self.size,
            "fingerprint": self.fingerprint,
            "key_id": self.key_id,
            "images": self.images,
            "manifest": self.manifest and self.manifest.to_dict(),
        }

    def __rich__(self) -> RenderableType:
        table = Table(title="File", title_justify="left", show_header=False)
        rows = {
            "kind": self.kind,
            "size": decimal(self.size),
            "circuit": self.fingerprint,
            **({} if self.key_id is None else {"key set": self.key_id}),
            **({} if self.images is None else {"images": f"{self.images:,}"}),
        }
        for name, value in rows.items():
            table.add_row(name, Text(value))  # plain text: a file may hold text that looks like rich's markup
        return table if self.manifest is None else Group(table, self.manifest)


def inspect_file(path: Path) -> Inspection:
    """Check the digests of a file, and return its description.

    Raises `ArtifactError` for a file that cannot be read, is damaged, or does not come from fheconv.
    """
    try:
        size, kind = path.stat().st_size, kind_of(path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from error
    if kind in ("client.zip", "server.zip"):
        manifest = load_manifest(path)
        return Inspection(
            kind=kind.removesuffix(".zip"), size=size, fingerprint=manifest.fingerprint, manifest=manifest
        )
    if kind == "a file of secret keys":
        names, _ = read_key_file(path)
        return Inspection(kind="secret keys", size=size, fingerprint=names.fingerprint, key_id=names.key_id)
    if kind == "a file of evaluation keys":
        stored = StoredKeys.of(path)
        return Inspection(
            kind="evaluation keys", size=size, fingerprint=stored.fingerprint, key_id=stored.key_id
        )
    if kind == "a ciphertext":
        held = Ciphertext.load(path)
        return Inspection(
            kind="encrypted images" if held.kind == "input" else "encrypted results",
            size=size,
            fingerprint=held.fingerprint,
            key_id=held.key_id,
            images=held.images,
        )
    raise ArtifactError(
        f"{path} is no file of fheconv's: it begins like neither client.zip or "
        "server.zip, nor keys, nor a ciphertext."
        if kind is None
        else f"{path} is {kind}, which is no file of fheconv's: neither client.zip or server.zip, nor keys, "
        "nor a ciphertext."
    )
