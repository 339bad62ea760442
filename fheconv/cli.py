"""The `fheconv` command.

Exit status: 0 done; 1 the answer is no (a budget that does not fit, a result that differs); 2 an error in
what was asked; 3 an error inside fheconv, with its traceback; 130 interrupted.
"""

import json
import math
import os
import traceback
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

import numpy as np
import typer
from rich.console import Console

from fheconv.arithmetic.geometry import PaddingMode
from fheconv.arrays import Array
from fheconv.config import CompileConfig, Engine, QuantConfig
from fheconv.errors import FheConvError, InvalidArgumentError, MissingExtraError
from fheconv.network import Conv

# The most values that `check` goes through in the image, the padded image or the result: a gigabyte of int64.
MOST_VALUES = 2**27

app = typer.Typer(
    help="Trained convolutions on encrypted images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out = Console()
err = Console(stderr=True)


def _integers(text: str | None, name: str, words: Collection[str] = ()) -> Any:
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


Model = Annotated[Path, typer.Argument(help="Weights: a .safetensors file, perhaps with its .json card.")]
LayerName = Annotated[str, typer.Option("--layer", help="Layer name: LAYER.weight in the file.")]
WeightBits = Annotated[int, typer.Option(help="Bits of a weight, 1 to 8.")]
InputBits = Annotated[int, typer.Option(help="Bits of an image value, 1 to 16.")]
Stride = Annotated[str | None, typer.Option(help="N or H,W. Default: the card's, else 1.")]
Padding = Annotated[str | None, typer.Option(help="N or H,W, same or valid. Default: the card's, else 0.")]
Dilation = Annotated[str | None, typer.Option(help="N or H,W. Default: the card's, else 1.")]
Groups = Annotated[int | None, typer.Option(help="Groups. Default: the card's, else 1.")]
PaddingModeName = Annotated[
    str | None, typer.Option(help=f"{', '.join(get_args(PaddingMode))}. Default: the card's, else zeros.")
]
Transposed = Annotated[
    bool | None,
    typer.Option("--transposed/--direct", help="Which convolution. Default: the card's, else direct."),
]
OutputPadding = Annotated[
    str | None, typer.Option(help="N or H,W, of a transposed convolution. Default: the card's, else 0.")
]


def _load_layer(
    model: Path, layer: str, *, groups: int | None, transposed: bool | None, **texts: str | None
) -> Conv:
    """Load the layer with its options as they were typed."""
    from fheconv.checkpoint import load_layer

    options: dict[str, Any] = {"padding_mode": texts.pop("padding_mode")}
    for name, text in texts.items():
        words = ("same", "valid") if name == "padding" else ()
        options[name] = _integers(text, f"--{name.replace('_', '-')}", words)
    return load_layer(model, layer, groups=groups, transposed=transposed, **options)


def _check_output(output: Path, endings: Collection[str]) -> None:
    """Raise `InvalidArgumentError` unless the result can be written, before any work is done for it."""
    if output.suffix.removeprefix(".").lower() not in endings:
        raise InvalidArgumentError(f"--output={output} must end in {' or '.join(f'.{e}' for e in endings)}.")
    folder = output.absolute().parent
    if not folder.is_dir():
        raise InvalidArgumentError(f"--output={output}: there is no folder {folder}; make it first.")
    if output.is_dir() or not os.access(output if output.exists() else folder, os.W_OK):
        raise InvalidArgumentError(f"--output={output} cannot be written; choose another file.")


def _check_size(source: Conv, shape: list[int]) -> None:
    """Raise `InvalidArgumentError` for images so large that going through them would exhaust the memory."""
    sizes = {"the image": math.prod(shape)}
    if len(shape) == len(source.geometry.kernel) + 1:  # `quantize` refuses the others
        sizes["the padded image"] = shape[0] * math.prod(source.geometry.expanded_size(shape[1:]))
        sizes["the result"] = len(source.weight) * math.prod(source.geometry.output_size(shape[1:]))
    what = max(sizes, key=lambda name: sizes[name])
    if sizes[what] > MOST_VALUES:
        raise InvalidArgumentError(
            f"--input-shape={','.join(map(str, shape))}: {what} would have {sizes[what]:,} values, and at "
            f"most {MOST_VALUES:,} are checked; check a smaller image."
        )


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="The picture to write.")] = Path("fheconv-demo.png"),
    size: Annotated[int, typer.Option(help="Side of the crop in pixels.", min=8, max=256)] = 96,
) -> None:
    """Run edge filters on an encrypted crop of a real photograph, and compare with torch."""
    from fheconv.demo import run_demo
    from fheconv.plots import picture_endings

    _check_output(output, picture_endings())
    raise typer.Exit(0 if run_demo(output, size, out) else 1)


@app.command()
def check(
    model: Model,
    layer: LayerName,
    input_shape: Annotated[str, typer.Option(help="C,M,N of one image.")],
    accumulator_bits: Annotated[int, typer.Option(help="The width to fit.", min=1, max=64)],
    weight_bits: WeightBits = 4,
    input_bits: InputBits = 4,
    stride: Stride = None,
    padding: Padding = None,
    dilation: Dilation = None,
    groups: Groups = None,
    padding_mode: PaddingModeName = None,
    transposed: Transposed = None,
    output_padding: OutputPadding = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Prove the accumulator width of one layer. Exit status 1 when it does not fit.

    Example: fheconv check models/tinycnn-digits.safetensors --layer conv1 --input-shape 1,28,28
    --weight-bits 2 --input-bits 2 --accumulator-bits 7
    """
    from fheconv.quantizer import quantize

    shape = _integers(input_shape, "--input-shape")
    if not isinstance(shape, list) or min(shape) < 1:
        raise InvalidArgumentError(f"--input-shape={input_shape!r} must be C,M,N, all positive.")
    source = _load_layer(
        model,
        layer,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        transposed=transposed,
        output_padding=output_padding,
    )
    _check_size(source, shape)
    # Widths do not depend on the images, so that there are none to calibrate on is no loss.
    config = QuantConfig(weight_bits=weight_bits, input_bits=input_bits)
    network = replace(quantize(source, np.zeros(shape, np.int64), config), observed=(None,))
    report = network.budget(accumulator_bits)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        out.print(report)
    raise typer.Exit(0 if report.fits else 1)


@app.command()
def run(
    model: Model,
    layer: LayerName,
    image: Annotated[Path, typer.Option("--input", help="An image file, or .npy of shape (C, M, N).")],
    output: Annotated[Path, typer.Option("--output", help="The result: .npy of shape (K, OutH, OutW).")],
    weight_bits: WeightBits = 4,
    input_bits: InputBits = 4,
    stride: Stride = None,
    padding: Padding = None,
    dilation: Dilation = None,
    groups: Groups = None,
    padding_mode: PaddingModeName = None,
    transposed: Transposed = None,
    output_padding: OutputPadding = None,
    engine: Annotated[str, typer.Option(help=f"One of {', '.join(get_args(Engine))}.")] = "auto",
) -> None:
    """Run one layer on an encrypted image, and check the result against the clear integers.

    The input scale is chosen from the image itself. An image file is read with its pixels 0..255, as
    grey or RGB, whichever the layer takes. Exit status 1 if a result differs.

    Example: fheconv run models/classic-filters.safetensors --layer filters3 --input photo.png
    --output edges.npy
    """
    from fheconv.circuit import compile as compile_circuit
    from fheconv.quantizer import quantize

    _check_output(output, ("npy",))
    source = _load_layer(
        model,
        layer,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        transposed=transposed,
        output_padding=output_padding,
    )
    pixels = _load_image(image, source)
    network = quantize(source, pixels, QuantConfig(weight_bits=weight_bits, input_bits=input_bits))
    out.print(network.budget())
    circuit = compile_circuit(network, CompileConfig(engine=engine))  # type: ignore[arg-type]
    out.print(circuit.cost)
    circuit.keygen()
    result = circuit.predict(pixels, fhe="execute")
    with output.open("wb") as file:  # np.save would append to a name in capitals
        np.save(file, result)
    right = bool((result == network(pixels)).all())
    out.print(
        f"Wrote {output}, shape {result.shape}; {'equal to' if right else 'DIFFERENT from'} the clear result."
    )
    raise typer.Exit(0 if right else 1)


def _load_image(path: Path, layer: Conv) -> Array:
    """Return the image as (C, M, N)."""
    channels, axes = layer.in_channels, len(layer.geometry.kernel)
    if path.suffix != ".npy" and (channels not in (1, 3) or axes != 2):
        raise InvalidArgumentError(
            f"The layer takes {channels} channels and {axes} spatial axes, an image file has 1 or 3 channels "
            "and 2 axes; give --input as .npy."
        )
    try:
        if path.suffix == ".npy":
            pixels: Any = np.load(path, allow_pickle=False)
            if not isinstance(pixels, np.ndarray):
                raise ValueError("it is a zip archive (.npz), not one array")
            return pixels[None] if pixels.ndim == axes else pixels
        from PIL import Image

        with Image.open(path) as picture:
            grey = np.atleast_3d(np.asarray(picture.convert("L" if channels == 1 else "RGB")))
        return np.moveaxis(grey, -1, 0)
    except ImportError as error:
        raise MissingExtraError(f'Image files need pillow: pip install "fheconv[demo]" ({error}).') from error
    except Exception as error:  # what the readers of broken files raise is not documented
        raise InvalidArgumentError(f"--input={path} cannot be read: {str(error) or repr(error)}.") from error


@app.command()
def serve(
    file: Annotated[Path, typer.Argument(help="The server.zip that circuit.save wrote.")],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(help="A file with the token that clients must bear. Or set FHECONV_TOKEN.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Images that run at once.", min=1)] = 1,
    queue: Annotated[int, typer.Option(help="Requests that may wait.", min=0)] = 8,
    folder: Annotated[
        Path | None, typer.Option(help="Where evaluation keys are stored. Default: the user's data folder.")
    ] = None,
    quota: Annotated[int, typer.Option(help="Gigabytes of keys to store at most.", min=1)] = 10,
    expiry: Annotated[int, typer.Option(help="Days after which unused keys go.", min=1)] = 30,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Listen for other machines without a token.")
    ] = False,
) -> None:
    """Serve a saved circuit over HTTP, for fheconv.RemoteCircuit; /docs describes the API.

    Example: FHECONV_TOKEN=$(cat token) fheconv serve server.zip --workers 2
    """
    from platformdirs import user_data_path

    from fheconv.artifacts import load_server
    from fheconv.serve import serve as serve_circuit
    from fheconv.worker import worker

    try:
        token = os.environ.get("FHECONV_TOKEN") if token_file is None else token_file.read_text().strip()
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"--token-file={token_file} cannot be read: {error}.") from error
    server = load_server(file)
    worker().stop()  # the copies that serve have their own
    serve_circuit(
        server,
        host=host,
        port=port,
        token=token,
        allow_remote=allow_remote,
        folder=folder or user_data_path("fheconv") / "keys",
        workers=workers,
        queue=queue,
        quota=quota * 10**9,
        expiry=expiry * 86_400,
    )


def main() -> None:
    """Run the command; an error of ours is one line on standard error and exit status 2."""
    try:
        app()
    except FheConvError as error:
        _fail(f"{type(error).__name__}: {error}", 2)
    except MemoryError as error:
        _fail(f"Out of memory: {str(error) or 'no more to be had'}; take a smaller image or layer.", 2)
    except KeyboardInterrupt:
        _fail("Interrupted.", 130)
    except Exception as error:
        traceback.print_exc()
        _fail(f"internal error: {type(error).__name__}: {error}, please report it with the lines above.", 3)


def _fail(message: str, status: int) -> NoReturn:
    err.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(status) from None
