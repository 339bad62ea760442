"""Implements the commands for saved circuits: compile, keygen, encrypt, decrypt, inspect and bench."""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table
from rich.text import Text

from fheconv.basics.arrays import Array
from fheconv.basics.compile_config import CompileConfig
from fheconv.basics.config import QuantConfig
from fheconv.basics.errors import AccumulatorOverflowError, InvalidArgumentError
from fheconv.basics.progress import status
from fheconv.cli.arguments import (
    Force,
    bits_of,
    check_circuit_folder,
    check_output,
    load_image,
    load_images,
    out,
    print_error,
    save_array,
    say,
)
from fheconv.cli.kinds import check_kind, check_model
from fheconv.cli.running import write_ciphertext

ClientFile = Annotated[Path, typer.Argument(help="The client.zip that compile wrote.")]
Keys = Annotated[Path, typer.Option(help="The secret keys that keygen wrote.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MOST_SHOWN = 10


def compile_model(
    model: Annotated[
        Path,
        typer.Argument(
            help="An .onnx file, a .safetensors file, with a .json card for a whole network, or a .pt2 file "
            "of torch.export.save, with --trusted."
        ),
    ],
    calibration: Annotated[
        Path,
        typer.Option(
            help="Images to calibrate on: .npy of shape (n, C, M, N), an image file, or a folder of them."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder, made if need be.")],
    layer: Annotated[
        str | None, typer.Option(help="One convolution of a .safetensors file instead of all.")
    ] = None,
    weight_bits: Annotated[str | None, typer.Option(help="1 to 8, or auto. Default: 4.")] = None,
    activation_bits: Annotated[str | None, typer.Option(help="1 to 8, or auto. Default: at most 4.")] = None,
    accumulator_bits: Annotated[
        str | None, typer.Option(help="1 to 16, or auto: the width to keep to. Default: what is needed.")
    ] = None,
    rounding_bits: Annotated[
        int | None,
        typer.Option(
            help="2 to 8: round what enters a lookup to it. Default: 5, or not at all with other options."
        ),
    ] = None,
    input_bits: Annotated[str | None, typer.Option(help="1 to 16, or auto. Default: 4.")] = None,
    p_error: Annotated[
        float | None,
        typer.Option(
            help="Probability that a lookup fails. Default: 0.03 if rounded, else 1e-5 for all of an image."
        ),
    ] = None,
    class_names: Annotated[
        str | None, typer.Option(help="What the results stand for, with commas between.")
    ] = None,
    keys_of: Annotated[
        Path | None, typer.Option(help="The client.zip of a circuit, under whose keys this one is to run.")
    ] = None,
    blocks: Annotated[
        int | None, typer.Option(help="Run layer by layer, each in up to so many blocks.", min=1)
    ] = None,
    trusted: Annotated[
        bool, typer.Option(help="Load a .pt2 file, which RUNS what is in it, from people you trust.")
    ] = False,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Compile a trained model to client.zip and server.zip. Exit status 1 means its widths do not fit.

    Example: fheconv compile models/tinycnn-digits.safetensors --calibration digits.npy -o out
    --rounding-bits 6 --p-error 0.05 --class-names 0,1,2,3,4,5,6,7,8,9
    """
    from fheconv.capture.checkpoint import load_model
    from fheconv.circuits.compiling import compile as compile_circuit
    from fheconv.quantized import quantize

    given = bits_of(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        accumulator_bits=accumulator_bits,
        input_bits=input_bits,
        rounding_bits=rounding_bits,
    )
    config = QuantConfig(**given) if given else None
    compile_config = CompileConfig(p_error=p_error)
    check_model(model)
    check_circuit_folder(output, force=force)
    images = load_images(calibration)
    try:
        with status("Quantizing…"):
            network = quantize(load_model(model, layer, trusted=trusted), images, config)
        staged: dict[str, Any] = {} if blocks is None else {"stages": "layers", "blocks": blocks}
        circuit = compile_circuit(network, compile_config, keys_of=keys_of, **staged)
    except AccumulatorOverflowError as error:
        if as_json:
            _print_json({"fits": False, "message": str(error), **vars(error)})
        print_error(f"Does not fit: {error}")
        raise typer.Exit(1) from error
    names = None if class_names is None else class_names.split(",")
    client, server = circuit.save(output, class_names=names)
    if as_json:
        _print_json(
            {
                "fits": True,
                "client": str(client),
                "server": str(server),
                "fingerprint": circuit.fingerprint,
                "budget": network.budget().to_dict(),
                "cost": circuit.cost.to_dict(),
            }
        )
        return
    out.print(network.budget(), circuit.cost)
    say(f"Wrote {client}, for whoever has the keys, and {server}, for whoever computes.")


def keygen(
    client_file: ClientFile,
    keys: Annotated[
        Path, typer.Option(help="The secret keys to write. They decrypt: keep them to yourself.")
    ],
    evaluation_keys: Annotated[Path, typer.Option(help="The keys to write for whoever computes.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", "--force", help="Write over other keys, for good.")
    ] = False,
) -> None:
    """Make the keys of a circuit.

    Example: fheconv keygen out/client.zip --keys keys.secret --evaluation-keys keys.eval
    """
    from fheconv.circuits.client import load_client

    for option, path in (("--keys", keys), ("--evaluation-keys", evaluation_keys)):
        if path.exists() and not overwrite:
            raise InvalidArgumentError(
                f"{option}={path} exists, and may hold the only copy of other keys; choose another file, or "
                "pass --overwrite."
            )
    if keys.resolve() == evaluation_keys.resolve():
        raise InvalidArgumentError(
            f"--keys={keys} and --evaluation-keys={evaluation_keys} are one file; secret keys need their own."
        )
    check_output(keys, option="--keys", force=overwrite, secrets=overwrite)
    check_output(evaluation_keys, option="--evaluation-keys", force=overwrite)
    check_kind(client_file, "client.zip", "The file")
    client = load_client(client_file)
    client.keygen()
    client.evaluation_keys.save(evaluation_keys)
    client.save_keys(keys, overwrite=overwrite)
    say(f"Wrote {keys}, which is secret, and {evaluation_keys}, for whoever computes.")


def encrypt(
    client_file: ClientFile,
    keys: Keys,
    image: Annotated[
        Path, typer.Option("--input", help="An image file, or .npy of one image or of a batch.")
    ],
    output: Annotated[Path, typer.Option(help="The ciphertext to write.")],
    force: Force = False,
) -> None:
    """Encrypt an image, or a batch.

    Example: fheconv encrypt out/client.zip --keys keys.secret --input digit.npy --output digit.ct
    """
    from fheconv.circuits.client import load_client

    check_output(output, force=force)
    check_kind(client_file, "client.zip", "The file")
    check_kind(keys, "a file of secret keys", "--keys")
    client = load_client(client_file)
    channels, *size = client.manifest.input_shape
    pixels = load_image(image, channels, len(size))
    client.load_keys(keys)
    encrypted = client.encrypt(pixels)
    write_ciphertext(encrypted, output)


def decrypt(
    client_file: ClientFile,
    keys: Keys,
    encrypted: Annotated[Path, typer.Option("--input", help="The ciphertext that run wrote.")],
    output: Annotated[
        Path | None, typer.Option(help="The results to write, as .npy. Default: print them.")
    ] = None,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Decrypt results. If compile was given class names, print the class with the highest score.

    Example: fheconv decrypt out/client.zip --keys keys.secret --input result.ct --json
    """
    from fheconv.circuits.ciphertext import Ciphertext
    from fheconv.circuits.client import load_client

    if output is not None:
        check_output(output, ("npy",), force=force)
    check_kind(client_file, "client.zip", "The file")
    check_kind(keys, "a file of secret keys", "--keys")
    check_kind(encrypted, "a ciphertext", "--input")
    client = load_client(client_file)
    results = Ciphertext.load(encrypted)
    client.load_keys(keys)
    y = client.decrypt(results)
    names = client.manifest.class_names
    scores = y if results.batched else y[None]
    classes = None if names is None else [names[best] for best in scores.argmax(axis=1)]
    if output is not None:
        save_array(output, y)
    if as_json:
        _print_json({"results": y.tolist(), "classes": classes, "class_names": names})
    elif names is not None:
        out.print(_class_table(scores, names))
    elif output is None:
        typer.echo(np.array2string(y, max_line_width=100))
    if output is not None and not as_json:
        say(f"Wrote {output}, shape {y.shape}.")


def inspect(
    file: Annotated[Path, typer.Argument(help="client.zip, server.zip, keys or a ciphertext.")],
    as_json: AsJson = False,
) -> None:
    """Print the kind of a file, its circuit and keys, and the cost of the circuit.

    No secret is shown. Example: fheconv inspect out/server.zip
    """
    from fheconv.cli.inspection import inspect_file

    _show(inspect_file(file), as_json)


def bench(
    server_file: Annotated[Path, typer.Argument(help="The server.zip that compile wrote.")],
    client_file: Annotated[Path, typer.Option("--client", help="The client.zip that goes with it.")],
    runs: Annotated[int, typer.Option(help="How often each step is timed.", min=1)] = 3,
    as_json: AsJson = False,
) -> None:
    """Time key generation and one encrypted image on this machine, and count the bytes.

    Example: fheconv bench out/server.zip --client out/client.zip --runs 5
    """
    from fheconv.cli.bench import measure

    check_kind(server_file, "server.zip", "The file")
    check_kind(client_file, "client.zip", "--client")
    _show(measure(server_file, client_file, runs), as_json)


def _class_table(scores: Array, names: tuple[str, ...]) -> Table:
    """Return a table of the classes with the highest scores, with one line for each image."""
    table = Table(title="Classes", title_justify="left")
    for heading in ("image", "class", "scores"):
        table.add_column(heading)
    for number, row in enumerate(scores):
        best = np.argsort(-row, kind="stable")[:MOST_SHOWN]
        listed = ", ".join(f"{names[at]} {row[at]:.4g}" for at in best)
        more = ", …" if len(row) > MOST_SHOWN else ""
        table.add_row(str(number), Text(names[best[0]]), Text(listed + more))
    return table


def _show(report: Any, as_json: bool) -> None:
    if as_json:
        _print_json(report.to_dict())
    else:
        out.print(report)


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data))
