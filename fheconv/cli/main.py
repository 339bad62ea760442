"""Defines the `fheconv` command."""

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import typer

from fheconv.arithmetic.geometry import PaddingMode
from fheconv.basics.compile_config import CompileConfig, Engine
from fheconv.basics.config import QuantConfig
from fheconv.basics.errors import InvalidArgumentError
from fheconv.cli import circuits as cli_circuits
from fheconv.cli import experiments, running
from fheconv.cli.arguments import (
    Authority,
    Certificate,
    Force,
    PrivateKey,
    check_output,
    check_size,
    integers,
    load_image,
    out,
    save_array,
    tls_of,
)
from fheconv.cli.kinds import check_kind
from fheconv.cli.lock import lock
from fheconv.cli.outcome import run_to_status
from fheconv.cli.serve import serve
from fheconv.networks.floats import Conv

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)
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


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fheconv {version('fheconv')}, concrete-python {version('concrete-python')}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Trained convolutions on encrypted images."""


def _load_layer(
    model: Path, layer: str, *, groups: int | None, transposed: bool | None, **texts: str | None
) -> Conv:
    """Load the layer, with its options as the user typed them."""
    from fheconv.capture.checkpoint import load_layer

    options: dict[str, Any] = {"padding_mode": texts.pop("padding_mode")}
    for name, text in texts.items():
        words = ("same", "valid") if name == "padding" else ()
        options[name] = integers(text, f"--{name.replace('_', '-')}", words)
    return load_layer(model, layer, groups=groups, transposed=transposed, **options)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="The picture to write.")] = Path("fheconv-demo.png"),
    size: Annotated[int, typer.Option(help="Side of the crop in pixels.", min=8, max=256)] = 96,
) -> None:
    """Run edge filters on an encrypted crop of a real photograph, and compare with torch."""
    from fheconv.analysis.plots import picture_endings
    from fheconv.cli.demo import run_demo

    check_output(output, picture_endings(), force=True)
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
    """Prove the accumulator width of one layer. Exit status 1 means that it does not fit.

    Example: fheconv check models/tinycnn-digits.safetensors --layer conv1 --input-shape 1,28,28
    --weight-bits 2 --input-bits 2 --accumulator-bits 7
    """
    from fheconv.quantized import quantize

    shape = integers(input_shape, "--input-shape")
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
    check_size(source, shape)
    # Widths do not depend on the images, so no real images are needed for calibration.
    config = QuantConfig(weight_bits=weight_bits, input_bits=input_bits)
    network = replace(quantize(source, np.zeros(shape, np.int64), config), observed=(None,))
    report = network.budget(accumulator_bits)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        out.print(report)
    raise typer.Exit(0 if report.fits else 1)


app.command("compile")(cli_circuits.compile_model)
app.command()(cli_circuits.keygen)
app.command()(cli_circuits.encrypt)


@app.command()
def run(
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(
            help="A server.zip; a client.zip with --url; or a .safetensors file with one --layer of it."
        ),
    ],
    image: Annotated[
        Path,
        typer.Option("--input", help="A ciphertext; for a layer, an image file or .npy of shape (C, M, N)."),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", help="The encrypted result; for a layer, .npy of shape (K, OutH, OutW)."),
    ],
    evaluation_keys: Annotated[
        Path | None, typer.Option(help="Of whoever encrypted, for a server.zip.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Run there, where fheconv serve is. FHECONV_TOKEN may hold a token.")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="The secret keys, which stay here, for a client.zip and --url.")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="A folder for what is computed, from which a later run goes on.")
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds after which the run ends between two blocks, with --keep.")
    ] = None,
    certificate: Certificate = None,
    private_key: PrivateKey = None,
    authority: Authority = None,
    layer: Annotated[str | None, typer.Option(help="Layer name: LAYER.weight in the file.")] = None,
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
    force: Force = False,
) -> None:
    """Run a compiled circuit on a ciphertext, or one layer of a model on an image.

    With a server.zip nothing is decrypted, and no secret key is needed:
    fheconv run out/server.zip --evaluation-keys keys.eval --input digit.ct --output result.ct

    A circuit that was compiled with --blocks can end between two of them and go on later:
    fheconv run out/server.zip --evaluation-keys keys.eval --input digit.ct --output result.ct --keep half
    --time-limit 3600

    With --url it runs at a server. The server gets only the evaluation keys, made from the secret ones:
    fheconv run out/client.zip --url http://localhost:8000 --keys keys.secret --input digit.ct
    --output result.ct

    With a layer everything happens here: the image is encrypted, and the result is decrypted and compared
    with the clear integers. Exit status 1 means that they differ. The input scale is chosen from the image
    itself. An image file is read with its pixels 0..255, as grey or RGB, whichever the layer takes. The
    options from --layer on are only for this use:
    fheconv run models/classic-filters.safetensors --layer filters3 --input photo.png --output edges.npy
    """
    from fheconv.capture.pickles import check_no_pickle

    tls = tls_of(certificate, private_key, authority)
    if tls is not None and url is None:
        raise InvalidArgumentError("--certificate, --private-key and --authority need the --url of a server.")
    if (keep is not None or time_limit is not None) and evaluation_keys is None:
        raise InvalidArgumentError("--keep and --time-limit need a server.zip and --evaluation-keys.")
    if file.suffix.lower() == ".zip":
        both = {"file", "image", "output", "evaluation_keys", "url", "keys", "force"}
        both |= {"certificate", "private_key", "authority", "keep", "time_limit"}
        sources = {name: context.get_parameter_source(name) for name in context.params if name not in both}
        # Compare by name: depending on its version, typer has its own copy of click.
        others = [
            f"--{name.replace('_', '-')}"
            for name, source in sources.items()
            if source is not None and source.name == "COMMANDLINE"
        ]
        if others:
            raise InvalidArgumentError(
                f"{', '.join(others)}: a server.zip is compiled already; leave it out."
            )
        if url is not None and keys is not None and evaluation_keys is None:
            running.run_remotely(file, url, keys, image, output, tls=tls, force=force)
        elif url is None and keys is None and evaluation_keys is not None:
            running.run_circuit(
                file, evaluation_keys, image, output, keep=keep, time_limit=time_limit, force=force
            )
        else:
            raise InvalidArgumentError(
                f"{file} needs --evaluation-keys, which fheconv keygen makes, if it is a server.zip; if it "
                "is a client.zip, --url and --keys."
            )
        return
    check_no_pickle(file)
    if layer is None:
        check_kind(file, "server.zip", "The file")
    if evaluation_keys is not None or url is not None or keys is not None or layer is None:
        raise InvalidArgumentError(
            f"{file} is no .zip file; give a server.zip with --evaluation-keys, or weights with a --layer."
        )
    convolution = _load_layer(
        file,
        layer,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        transposed=transposed,
        output_padding=output_padding,
    )
    check_output(output, ("npy",), force=force)
    config = QuantConfig(weight_bits=weight_bits, input_bits=input_bits)
    raise typer.Exit(0 if _run_layer(convolution, config, engine, image, output) else 1)


app.command()(cli_circuits.decrypt)
app.command()(cli_circuits.inspect)
app.command()(cli_circuits.bench)
app.command()(lock)
app.command()(experiments.simulate)
app.command()(experiments.verify)
app.command()(experiments.tune)
app.command()(experiments.finetune)
app.command()(serve)


def _run_layer(source: Conv, config: QuantConfig, engine: str, image: Path, output: Path) -> bool:
    """Run a layer on an encrypted image, and return whether the result equals the clear one."""
    from fheconv.circuits.compiling import compile as compile_circuit
    from fheconv.quantized import quantize

    pixels = load_image(image, source.in_channels, len(source.geometry.kernel))
    network = quantize(source, pixels, config)
    out.print(network.budget())
    circuit = compile_circuit(network, CompileConfig(engine=engine))  # type: ignore[arg-type]
    out.print(circuit.cost)
    circuit.keygen()
    result = circuit.predict(pixels, fhe="execute")
    save_array(output, result)
    right = bool((result == network(pixels)).all())
    out.print(
        f"Wrote {output}, shape {result.shape}; {'equal to' if right else 'DIFFERENT from'} the clear result."
    )
    return right


def main() -> None:
    """Run the command."""
    run_to_status(app)


if __name__ == "__main__":
    main()
