"""Tells what kind of file a file is by its first bytes, to say which one was mixed up with which."""

import zipfile
from pathlib import Path

from fheconv.basics.errors import InvalidArgumentError
from fheconv.basics.files import check_regular
from fheconv.circuits import ciphertext, keys

_ZIP = b"PK\3\4"
_BEGINNINGS = {
    keys.ENVELOPE.magic: "a file of secret keys",
    keys.EVALUATION.magic: "a file of evaluation keys",
    ciphertext.ENVELOPE.magic: "a ciphertext",
    b"\x93NUMPY": "a .npy file",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x80\x02": "a pickle",
}
_GIVE = {
    "client.zip": "the client.zip that compile wrote",
    "server.zip": "the server.zip that compile wrote",
    "a file of secret keys": "the file that keygen wrote with --keys",
    "a file of evaluation keys": "the file that keygen wrote with --evaluation-keys",
    "a ciphertext": "the ciphertext that encrypt or run wrote",
}


def kind_of(path: Path) -> str | None:
    """Return what kind of file it is, or None if it is of no known kind.

    Raises `OSError` if it cannot be read.
    """
    check_regular(path)
    with path.open("rb") as file:
        head = file.read(8)
    if not head.startswith(_ZIP):
        return next((kind for start, kind in _BEGINNINGS.items() if head.startswith(start)), None)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return None
    if "manifest.json" in names:
        return "server.zip" if "circuit.mlir" in names else "client.zip"
    if any(name.endswith("data.pkl") for name in names):
        return "a file of torch.save"
    return "an .npz file" if names and all(name.endswith(".npy") for name in names) else None


def check_model(path: Path) -> None:
    """Raise `InvalidArgumentError` for a file that cannot be read, or is of a known kind and no model.

    Whoever reads the file says what to do with files of `torch.save`.
    """
    found = _kind(path, f"The model {path}")
    if path.suffix.lower() == ".json":
        raise InvalidArgumentError(f"{path} is no model; give the .safetensors file that it is the card of.")
    if found not in (None, "a pickle", "a file of torch.save"):
        raise InvalidArgumentError(
            f"{path} is {_with_article(found)}, and no model; give an .onnx, .safetensors or .pt2 file."
        )


def check_kind(path: Path, wanted: str, option: str) -> None:
    """Raise `InvalidArgumentError` if a file is of another known kind than is `wanted`.

    Whoever reads the file says what is wrong with files of no known kind.
    """
    found = _kind(path, f"{option}={path}")
    if found not in (None, wanted):
        raise InvalidArgumentError(f"{option}={path} is {_with_article(found)}; give {_GIVE[wanted]}.")


def _kind(path: Path, shown: str) -> str | None:
    """Return `kind_of` a file. Raise `InvalidArgumentError`, which says `shown`, if it cannot be read."""
    try:
        return kind_of(path)
    except OSError as error:
        raise InvalidArgumentError(f"{shown} cannot be read: {error}.") from error


def _with_article(kind: str) -> str:
    """Return a kind of file as part of a sentence."""
    return f"a {kind}" if kind.endswith(".zip") else kind
