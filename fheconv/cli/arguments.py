"""Prints messages, and reads the arguments and files of the commands."""

import io
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console

from fheconv.basics.arrays import Array
from fheconv.basics.config import QuantConfig
from fheconv.basics.errors import InvalidArgumentError, MissingExtraError
from fheconv.basics.files import check_regular, write_file
from fheconv.networks.floats import Conv

if TYPE_CHECKING:
    from fheconv.quantized import QuantizedNetwork
    from fheconv.serving.tls import Tls

# The most values of the image, the padded image or the result that `check` accepts: a gigabyte of int64.
MOST_VALUES = 2**27

# Text from files may look like rich's markup. It is printed as it is.
out = Console(markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)
# Options that several commands take.
LayerName = Annotated[str | None, typer.Option("--layer", help="One convolution of a .safetensors file.")]
Bits = Annotated[str | None, typer.Option(help="As for compile.")]
PError = Annotated[float | None, typer.Option(help="As for compile.")]
Trusted = Annotated[bool, typer.Option(help="Load a .pt2 file, which RUNS what is in it.")]
Certificate = Annotated[Path | None, typer.Option(help="Your own certificate for TLS, a PEM file.")]
PrivateKey = Annotated[Path | None, typer.Option(help="Its private key, if not in the same file.")]
Authority = Annotated[Path | None, typer.Option(help="Who signs the other side's certificates, a PEM file.")]
Force = Annotated[bool, typer.Option("--force", help="Write over a file that exists.")]
# Image files that a folder of calibration images may hold.
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def integers(text: str | None, name: str, words: Collection[str] = ()) -> Any:
    """Turn "2" or "2,1" into an int or a list; leave None and `words` as they are."""
    if text is None or text in words:
        return text
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError as error:
        also = "".join(f", or {word}" for word in words)
        raise InvalidArgumentError(
            f"{name}={text!r} must be integers with commas between them{also}."
        ) from error
    return values[0] if len(values) == 1 else values


def bits_of(**options: str | int | None) -> dict[str, Any]:
    """Return the numbers of bits that a command was given, by their names in `QuantConfig`."""
    given = {name: value for name, value in options.items() if value is not None}
    return {
        name: value if isinstance(value, int) else integers(value, f"--{name.replace('_', '-')}", ("auto",))
        for name, value in given.items()
    }


def quantized_model(
    model: Path, calibration: Path, layer: str | None, bits: dict[str, Any], trusted: bool
) -> "QuantizedNetwork":
    """Return the integer network of a model file, with the numbers of bits that `bits_of` returned."""
    from fheconv.capture.checkpoint import load_model
    from fheconv.cli.kinds import check_model
    from fheconv.quantized import quantize

    check_model(model)
    images = load_images(calibration)
    return quantize(load_model(model, layer, trusted=trusted), images, QuantConfig(**bits) if bits else None)


def say(message: str) -> None:
    """Print a message."""
    out.print(message, highlight=False, soft_wrap=True)


def print_error(message: str) -> None:
    """Print a message in red on standard error."""
    err.print(message, style="red", highlight=False, soft_wrap=True)


def print_warning(message: str) -> None:
    """Print a message in yellow on standard error."""
    err.print(message, style="yellow", highlight=False, soft_wrap=True)


def check_output(
    output: Path,
    endings: Collection[str] = (),
    option: str = "--output",
    *,
    force: bool,
    secrets: bool = False,
) -> None:
    """Raise `InvalidArgumentError` unless a file can be written, before any work is done for it.

    With `endings`, its name must have one of these endings. A file that exists is written over only with
    `force`, and if it holds secret keys only with `secrets` too.
    """
    from fheconv.circuits.keys import ENVELOPE

    if endings and output.suffix.removeprefix(".").lower() not in endings:
        raise InvalidArgumentError(f"{option}={output} must end in {' or '.join(f'.{e}' for e in endings)}.")
    folder = output.absolute().parent
    if not folder.is_dir():
        raise InvalidArgumentError(f"{option}={output}: there is no folder {folder}; make it first.")
    regular = output.is_file() or not output.exists()
    if not regular or not os.access(output if output.exists() else folder, os.W_OK):
        raise InvalidArgumentError(f"{option}={output} cannot be written; choose another file.")
    if output.exists() and os.access(output, os.R_OK) and not secrets:
        with output.open("rb") as file:
            if file.read(len(ENVELOPE.magic)) == ENVELOPE.magic:
                raise InvalidArgumentError(
                    f"{option}={output} holds secret keys, perhaps the only copy; choose another file."
                )
    if output.exists() and not force:
        raise InvalidArgumentError(f"{option}={output} exists; choose another file, or pass --force.")


def check_circuit_folder(output: Path, *, force: bool) -> None:
    """Raise `InvalidArgumentError` if a folder holds a circuit, unless it may be written over."""
    for name in ("client.zip", "server.zip"):
        if (output / name).exists() and not force:
            raise InvalidArgumentError(
                f"{output / name} exists, and keys may have been made for it; choose another --output, or "
                "pass --force."
            )


def load_array(path: Path, option: str) -> Array:
    """Return the array of a .npy file. Raises `InvalidArgumentError` if the file holds none."""
    try:
        check_regular(path)
        array: Any = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            array.close()
            raise ValueError("it is a zip archive (.npz), not one array")
    except Exception as error:  # the errors that numpy raises for broken files are not documented
        raise _unreadable(path, option, error) from error
    return array


def load_image(path: Path, channels: int, axes: int) -> Array:
    """Return the image of --input, with `channels` channels and `axes` spatial axes.

    An image file becomes (C, M, N). A .npy file is taken as it is, and may leave out the axis of a single
    channel. Raises `InvalidArgumentError` for a file that cannot be read or has other channels,
    `MissingExtraError` if image files cannot be read.
    """
    if path.suffix == ".npy":
        pixels = load_array(path, "--input")
        return pixels[None] if pixels.ndim == axes else pixels
    if channels not in (1, 3) or axes != 2:
        raise InvalidArgumentError(
            f"What is computed takes {channels} channels and {axes} spatial axes, an image file has 1 or 3 "
            "channels and 2 axes; give --input as .npy."
        )
    return _picture(path, "--input", channels)


def load_images(path: Path, option: str = "--calibration") -> Array:
    """Return the images of an option: a .npy file, an image file, or a folder of image files, by name.

    Image files become (n, C, M, N), grey ones with one channel and others with three. Raises
    `InvalidArgumentError` for files that cannot be read or have different sizes, `MissingExtraError` if image
    files cannot be read.
    """
    if not path.is_dir():
        return load_array(path, option) if path.suffix == ".npy" else _pictures(path, option, [path])
    return _pictures(path, option, pictures_in(path))


def pictures_in(folder: Path) -> list[Path]:
    """Return the image files of a folder, by name."""
    return sorted(one for one in folder.iterdir() if one.suffix.lower() in PICTURES)


def _pictures(path: Path, option: str, files: list[Path]) -> Array:
    if not files:
        raise InvalidArgumentError(
            f"{option}={path} is a folder without image files; give one with files that end in "
            f"{', '.join(PICTURES)}, or .npy."
        )
    images = [_picture(one, option) for one in files]
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise InvalidArgumentError(
            f"{option}={path} has image files of {len(shapes)} shapes {sorted(shapes)!r:.100}; give a "
            "folder of images that all have one size and number of channels, or .npy."
        )
    return np.stack(images)


def _picture(path: Path, option: str, channels: int | None = None) -> Array:
    """Return an image file as (C, M, N), with its own channels, 1 or 3, unless `channels` says how many."""
    try:
        check_regular(path)
        from PIL import Image

        with Image.open(path) as picture:
            if picture.mode.startswith(("I", "F")):
                raise ValueError(f"it has more than 8 bits a value (mode {picture.mode}); give it as .npy")
            grey = picture.mode in ("1", "L", "LA") if channels is None else channels == 1
            pixels = np.atleast_3d(np.asarray(picture.convert("L" if grey else "RGB")))
        return np.moveaxis(pixels, -1, 0)
    except ImportError as error:
        raise MissingExtraError(f'Image files need pillow: pip install "fheconv[demo]" ({error}).') from error
    except Exception as error:  # the errors for broken files are not documented
        raise _unreadable(path, option, error) from error


def token_of_environment() -> str | None:
    """Return the token for servers from the environment variable FHECONV_TOKEN."""
    return os.environ.get("FHECONV_TOKEN")


def save_array(path: Path, array: Array) -> None:
    """Write a .npy file. It is written completely or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_file(path, [buffer.getvalue()])


def _unreadable(path: Path, option: str, error: Exception) -> InvalidArgumentError:
    return InvalidArgumentError(f"{option}={path} cannot be read: {str(error) or repr(error)}.")


def check_size(source: Conv, shape: list[int]) -> None:
    """Raise `InvalidArgumentError` for images so large that checking them would exhaust the memory."""
    sizes = {"the image": math.prod(shape)}
    if len(shape) == len(source.geometry.kernel) + 1:  # `quantize` refuses other shapes
        sizes["the padded image"] = shape[0] * math.prod(source.geometry.expanded_size(shape[1:]))
        sizes["the result"] = len(source.weight) * math.prod(source.geometry.output_size(shape[1:]))
    what = max(sizes, key=lambda name: sizes[name])
    if sizes[what] > MOST_VALUES:
        raise InvalidArgumentError(
            f"--input-shape={','.join(map(str, shape))}: {what} would have {sizes[what]:,} values, and at "
            f"most {MOST_VALUES:,} are checked; check a smaller image."
        )


def tls_of(certificate: Path | None, private_key: Path | None, authority: Path | None) -> "Tls | None":
    """Return what the options for TLS say, None if there is none of them."""
    if certificate is private_key is authority is None:
        return None
    from fheconv.serving.tls import Tls

    return Tls(certificate=certificate, private_key=private_key, authority=authority)
