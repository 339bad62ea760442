"""Checks that the parts of a file are all of one circuit, and that what it needs fits in files."""

from collections.abc import Mapping
from dataclasses import asdict

from fheconv.basics.errors import ArtifactError
from fheconv.circuits.files.envelope import MAX_BYTES
from fheconv.circuits.files.identity import Identity, digest, first_fingerprint
from fheconv.circuits.files.manifest import Manifest
from fheconv.circuits.files.specs import Specs
from fheconv.circuits.keys import MAX_BYTES as KEY_BYTES
from fheconv.circuits.sizes import Sizes
from fheconv.lowering.interface import Interface


def check_fingerprint(manifest: Manifest, parts: Mapping[str, bytes], what: str) -> None:
    """Raise `ArtifactError` unless the manifest's fingerprint is that of the parts.

    A client has no program, and takes the manifest's word for it. In format 1 it can check nothing.
    """
    mlir, claimed = parts.get("circuit.mlir"), manifest.identity
    found, same = manifest.fingerprint, True
    if claimed is not None:
        identity = Identity(
            parameters=digest(parts["specs.json"]),
            program=claimed.program if mlir is None else digest(mlir),
            interface=digest(parts["interface.json"]),
        )
        found, same = identity.fingerprint, identity == claimed
    elif mlir is not None:
        found = first_fingerprint(parts["specs.json"], mlir)
    if found != manifest.fingerprint or not same:
        raise ArtifactError(
            f"{what} is altered: its contents have the fingerprint {found}, and its manifest says "
            f"{manifest.fingerprint}. Get it again, from whoever compiled it."
        )


def check_values(specs: Specs, interface: Interface) -> None:
    """Raise `ArtifactError` unless the parameters and the interface tell of as many values."""
    for name, side, positions in (
        ("An image", specs.input, interface.inputs),
        ("A result", specs.output, interface.outputs),
    ):
        if side.values != len(positions):
            raise ArtifactError(
                f"The parts of the file do not belong together: {name.lower()} has {side.values:,} values in "
                f"one, and {len(positions):,} in another. Get it again."
            )


def check_lanes(specs: Specs, interface: Interface, manifest: Manifest) -> None:
    """Raise `ArtifactError` unless all parts tell of as many images in a ciphertext, which has no lookups."""
    lanes = interface.lanes.count
    if lanes != manifest.lanes or (lanes > 1 and specs.bootstraps):
        raise ArtifactError(
            f"The parts of the file do not belong together: {lanes} images share a ciphertext in one, and "
            f"{manifest.lanes} in another, or there are lookups. Get it again."
        )


def check_sizes(sizes: Sizes, manifest: Manifest) -> None:
    """Raise `ArtifactError` unless the manifest tells the right sizes, and ciphertexts and keys have room."""
    for name, size in asdict(sizes).items():
        declared = getattr(manifest.cost, name)
        if size != declared:
            raise ArtifactError(
                f"The parts of the file do not belong together: {name} is {size:,} by the parameters, and "
                f"{declared:,} by the manifest. Get it again."
            )
    for name, size in (("An image", sizes.input_bytes), ("A result", sizes.output_bytes)):
        if size > MAX_BYTES:
            raise ArtifactError(
                f"{name} takes {size:,} bytes encrypted; a ciphertext has at most {MAX_BYTES:,}. Smaller "
                "images or tiles (fheconv.compile_tiled) take less; so do images with compress_input=True."
            )
    if sizes.sent_key_bytes > KEY_BYTES:
        raise ArtifactError(
            f"The evaluation keys would take {sizes.sent_key_bytes:,} bytes; a key file has at most "
            f"{KEY_BYTES:,}. Compiled with most_key_bytes={KEY_BYTES}, it is refused at once, and what makes "
            "keys smaller is tried."
        )
