"""Implements the commands that try a model before it is used: simulate, verify, tune and finetune."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.table import Table

from fheconv.basics.compile_config import CompileConfig
from fheconv.basics.errors import InvalidArgumentError
from fheconv.basics.progress import status
from fheconv.cli.arguments import (
    Bits,
    Force,
    LayerName,
    PError,
    Trusted,
    bits_of,
    check_circuit_folder,
    load_array,
    load_image,
    load_images,
    out,
    quantized_model,
)

if TYPE_CHECKING:
    from fheconv.circuits.circuit import FheCircuit
    from fheconv.quantized import QuantizedNetwork
    from fheconv.tuning.result import TuneResult

ModelFile = Annotated[
    Path,
    typer.Argument(
        help="An .onnx file, a .safetensors file with its .json card, or a .pt2 file, with --trusted."
    ),
]
Calibration = Annotated[Path, typer.Option(help="Images to calibrate on, as for compile.")]
Evaluation = Annotated[Path, typer.Option(help="Images to measure accuracy on: .npy.")]
Labels = Annotated[Path, typer.Option(help="Their classes: .npy of integers (n,).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Folder = Annotated[
    Path | None, typer.Option("--output", "-o", help="The folder for client.zip and server.zip.")
]
# What `fheconv.tune` can make small.
OBJECTIVES = "latency, complexity or key_bytes"


def simulate(
    model: ModelFile,
    calibration: Calibration,
    evaluation: Evaluation,
    labels: Labels,
    layer: LayerName = None,
    weight_bits: Bits = None,
    activation_bits: Bits = None,
    accumulator_bits: Bits = None,
    rounding_bits: Bits = None,
    input_bits: Bits = None,
    p_error: PError = None,
    trusted: Trusted = False,
    as_json: AsJson = False,
) -> None:
    """Print how many images a model gets right: in float, in clear integers, and as the circuit would.

    The circuit is simulated, with its rounding and its failing lookups. No key is made.

    Example: fheconv simulate m.safetensors --calibration x.npy --evaluation t.npy --labels y.npy
    """
    from fheconv.basics.samples import share_right

    bits = bits_of(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        accumulator_bits=accumulator_bits,
        rounding_bits=rounding_bits,
        input_bits=input_bits,
    )
    images, classes = load_images(evaluation, "--evaluation"), load_array(labels, "--labels")
    circuit = _compiled(_quantized(model, calibration, layer, bits, trusted), p_error)
    shares = {"clear integers": circuit.score(images, classes)}
    with status("Simulating…"):
        shares["simulated"] = circuit.score(images, classes, fhe="simulate")
    shares = {"float": share_right(circuit.network.source(images), classes), **shares}
    if as_json:
        found = {name.replace(" ", "_"): share for name, share in shares.items()}
        typer.echo(json.dumps({"images": len(images), **found, "cost": circuit.cost.to_dict()}))
        return
    table = Table(title=f"Right of {len(images):,} images", title_justify="left", show_header=False)
    for name, share in shares.items():
        table.add_row(name, f"{share:.1%}")
    out.print(table)
    if circuit.cost.lookups:
        out.print(f"Failing lookups: {circuit.cost.failures}.", highlight=False)


def verify(
    model: ModelFile,
    calibration: Calibration,
    image: Annotated[Path, typer.Option("--input", help="An image file, or .npy of one image or a batch.")],
    runs: Annotated[int, typer.Option(help="How often each image is run.", min=1)] = 1,
    layer: LayerName = None,
    weight_bits: Bits = None,
    activation_bits: Bits = None,
    accumulator_bits: Bits = None,
    rounding_bits: Bits = None,
    input_bits: Bits = None,
    p_error: PError = None,
    trusted: Trusted = False,
    as_json: AsJson = False,
) -> None:
    """Run images encrypted, and compare every result with the clear integers.

    Exit status 1 means that more differ than the failure probability explains. The keys are new ones, which
    are not kept.

    Example: fheconv verify m.safetensors --calibration x.npy --input digit.npy
    """
    bits = bits_of(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        accumulator_bits=accumulator_bits,
        rounding_bits=rounding_bits,
        input_bits=input_bits,
    )
    network = _quantized(model, calibration, layer, bits, trusted)
    channels, *size = network.input_shape
    pixels = load_image(image, channels, len(size))
    circuit = _compiled(network, p_error)
    circuit.keygen()
    report = circuit.verify(pixels, runs=runs)
    if as_json:
        typer.echo(json.dumps({"ok": report.ok, "as_promised": report.as_promised, **asdict(report)}))
    else:
        out.print(report)
    raise typer.Exit(0 if report.as_promised else 1)


def tune(
    model: ModelFile,
    calibration: Calibration,
    evaluation: Evaluation,
    labels: Labels,
    output: Folder = None,
    max_drop: Annotated[float, typer.Option(help="The share of images that may be lost.")] = 0.05,
    objective: Annotated[str, typer.Option(help=f"What to make small: {OBJECTIVES}.")] = "latency",
    training: Annotated[Path | None, typer.Option(help="Images to fine-tune on: .npy.")] = None,
    training_labels: Annotated[Path | None, typer.Option(help="Their classes: .npy.")] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of each training.", min=1)] = 200,
    lookup_budget: Annotated[
        list[int] | None,
        typer.Option(help="The most lookups of an image; may be given several times."),
    ] = None,
    students: Annotated[
        bool, typer.Option(help="For each --lookup-budget, try a new network, too, that imitates the model.")
    ] = False,
    trusted: Trusted = False,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """Search for the cheapest circuit at each accuracy. With --output, write the cheapest of all.

    Ctrl-C, SIGTERM, or a closed terminal ends the search; what was found until then is printed and written.

    Example: fheconv tune m.safetensors --calibration x.npy --evaluation t.npy --labels y.npy -o out
    """
    from fheconv.capture.checkpoint import load_model
    from fheconv.tuning.search import tune as search

    if (training is None) != (training_labels is None):
        raise InvalidArgumentError("--training and --training-labels go together; give both or none.")
    examples = None
    if training is not None and training_labels is not None:
        examples = load_images(training, "--training"), load_array(training_labels, "--training-labels")
    if output is not None:
        check_circuit_folder(output, force=force)
    images, tested = load_images(calibration), load_images(evaluation, "--evaluation")
    with _ended_by_signals() as signals:
        result = search(
            load_model(model, trusted=trusted),
            images,
            evaluation=(tested, load_array(labels, "--labels")),
            objective=objective,  # type: ignore[arg-type]
            training=examples,
            epochs=epochs,
            lookup_budgets=lookup_budget or (),
            students=students,
            max_drop=max_drop,
        )
    try:
        _print(result, as_json=as_json)
    finally:  # whoever reads may have gone, and a search takes long
        if output is not None and (result.points or not signals):
            _save(result.best(max_drop=max_drop).compile(), output, quiet=as_json)
    raise typer.Exit(128 + signals[0] if signals else 0)


def _print(result: "TuneResult", *, as_json: bool) -> None:
    if not as_json:
        out.print(result)
        return
    front, controls = (
        [
            {
                "setting": str(point.setting),
                "kind": point.setting.kind,
                "accuracy": point.accuracy,
                "cost": point.cost.to_dict(),
            }
            for point in points
        ]
        for points in (result.front, result.controls)
    )
    data = {"float_accuracy": result.float_accuracy, "reason": result.reason}
    typer.echo(json.dumps({**data, "front": front, "controls": controls, "beaten": len(result.beaten)}))


def finetune(
    model: ModelFile,
    calibration: Calibration,
    training: Annotated[Path, typer.Option(help="Images to train on: .npy.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for client.zip and server.zip.")],
    labels: Annotated[
        Path | None, typer.Option(help="Their classes: .npy. Default: train on the float model's results.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Times that training sees each image.", min=1)] = 200,
    lookup_budget: Annotated[int | None, typer.Option(help="The most lookups of an image.", min=1)] = None,
    weight_bits: Bits = None,
    activation_bits: Bits = None,
    accumulator_bits: Bits = None,
    rounding_bits: Bits = None,
    input_bits: Bits = None,
    p_error: PError = None,
    trusted: Trusted = False,
    force: Force = False,
) -> None:
    """Train a model further with few bits, and compile the result to client.zip and server.zip.

    Example: fheconv finetune m.safetensors --calibration x.npy --training x.npy --labels y.npy -o out
    """
    from fheconv.training.finetuning import finetune as train

    bits = bits_of(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        accumulator_bits=accumulator_bits,
        rounding_bits=rounding_bits,
        input_bits=input_bits,
    )
    check_circuit_folder(output, force=force)
    images: Any = load_images(training, "--training")
    data = images if labels is None else (images, load_array(labels, "--labels"))
    network = _quantized(model, calibration, None, bits, trusted)
    network = train(network, data, epochs=epochs, lookup_budget=lookup_budget)
    circuit = _compiled(network, p_error)
    _save(circuit, output)  # first: whoever reads may have gone
    out.print(network.budget(), circuit.cost)


def _quantized(*arguments: Any) -> "QuantizedNetwork":
    with status("Quantizing…"):
        return quantized_model(*arguments)


def _compiled(network: "QuantizedNetwork", p_error: float | None) -> "FheCircuit":
    from fheconv.circuits.compiling import compile as compile_circuit

    return compile_circuit(network, CompileConfig(p_error=p_error))


def _save(circuit: "FheCircuit", output: Path, *, quiet: bool = False) -> None:
    client, server = circuit.save(output)
    if not quiet:
        out.print(f"Wrote {client} and {server}.", highlight=False, soft_wrap=True)


@contextmanager
def _ended_by_signals() -> Iterator[list[int]]:
    """Let SIGTERM, or a closed terminal, end a block as Ctrl-C does. Yield the list of signals that came."""
    came: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> NoReturn:
        came.append(number)
        raise KeyboardInterrupt

    # A shell lets processes in the background ignore Ctrl-C, and that is kept.
    ending = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    before = {one: signal.getsignal(one) for one in ending if signal.getsignal(one) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield came
    except KeyboardInterrupt:
        if came and came[0] != signal.SIGINT:
            raise SystemExit(128 + came[0]) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
