"""Implements `fheconv lock`: writes down what a model needs, and fails when a retrained one needs more."""

import hashlib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table
from rich.text import Text

from fheconv.basics.compile_config import CompileConfig
from fheconv.basics.errors import ArtifactError, InvalidArgumentError
from fheconv.basics.files import write_file
from fheconv.cli.arguments import (
    Bits,
    LayerName,
    PError,
    Trusted,
    bits_of,
    load_array,
    load_images,
    out,
    pictures_in,
    quantized_model,
)

FORMAT = 1
# Accuracy may fall by this much: a retrained model answers a few images in another way.
ACCURACY_SLACK = 0.005
# What the file says of the whole circuit.
NUMBERS = ("lookups", "complexity", "key_bytes", "p_error")
HEADER = "# Written by `fheconv lock`. `fheconv lock --check` compares the model with it.\n"


def lock(
    model: Annotated[
        Path | None,
        typer.Argument(help="An .onnx file, a .safetensors file with its .json card, or a .pt2 file."),
    ] = None,
    file: Annotated[Path, typer.Option("--file", help="The lock file.")] = Path("fheconv.lock"),
    check: Annotated[bool, typer.Option("--check", help="Compare with the lock file.")] = False,
    calibration: Annotated[Path | None, typer.Option(help="Images to calibrate on, as for compile.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="Images to measure accuracy on.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Their classes: .npy of integers (n,).")] = None,
    layer: LayerName = None,
    weight_bits: Bits = None,
    activation_bits: Bits = None,
    accumulator_bits: Bits = None,
    rounding_bits: Bits = None,
    input_bits: Bits = None,
    p_error: PError = None,
    trusted: Trusted = False,
) -> None:
    """Write what a model needs to a small text file, or --check that it needs no more than that.

    The file holds the widths and lookups of each layer, the complexity, the keys, the failure probability,
    the security, the accuracy on --evaluation images, and hashes of weights and data. --check uses the
    model, data and options of the file, prints what differs, and ends with status 1 if the model became
    wider, dearer or worse.

    Example: fheconv lock m.safetensors --calibration x.npy --evaluation t.npy --labels y.npy
    Then in CI: fheconv lock --check
    """
    bits = bits_of(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        accumulator_bits=accumulator_bits,
        rounding_bits=rounding_bits,
        input_bits=input_bits,
    )
    paths = {"model": model, "calibration": calibration, "evaluation": evaluation, "labels": labels}
    given = {
        "files": {name: str(path) for name, path in paths.items() if path is not None},
        "options": {
            name: value for name, value in {**bits, "p_error": p_error, "layer": layer}.items() if value
        },
    }
    if check:
        if given["files"] or given["options"]:
            raise InvalidArgumentError(
                f"--check takes the model, data and options from {file}; leave out "
                f"{', '.join([*given['files'], *given['options']])}."
            )
        raise typer.Exit(0 if _check(file, trusted) else 1)
    if model is None or calibration is None or (evaluation is None) != (labels is None):
        raise InvalidArgumentError(
            "fheconv lock needs a MODEL and --calibration, --evaluation only with --labels; or --check."
        )
    write_file(file, [_text(_measured(given, trusted)).encode()])
    out.print(f"Wrote {file}.", markup=False, highlight=False)


def _check(file: Path, trusted: bool) -> bool:
    """Print what differs from a lock file, and return whether the model needs no more than it says."""
    locked = _read(file)
    differences = _differences(locked, _measured(locked, trusted))
    if not differences:
        out.print(f"Everything is as in {file}.", markup=False, highlight=False)
        return True
    table = Table(title=f"Differences from {file}", title_justify="left")
    for heading in ("", "what", "locked", "now"):
        table.add_column(heading)
    for one in differences:
        mark = "FAILS" if one.fails else ""
        table.add_row(mark, Text(one.what), str(one.locked), str(one.now), style="red" if one.fails else None)
    out.print(table)
    return not any(one.fails for one in differences)


def _measured(given: dict[str, Any], trusted: bool) -> dict[str, Any]:
    """Return everything that a lock file holds, for the files and options that it names."""
    files, options = given["files"], given["options"]
    bits = {name: value for name, value in options.items() if name not in ("p_error", "layer")}
    model, calibration = Path(files["model"]), Path(files["calibration"])
    network = quantized_model(model, calibration, options.get("layer"), bits, trusted)
    config = CompileConfig(p_error=options.get("p_error"))
    forecast = network.forecast(config)
    plain = forecast.to_dict()
    circuit = {name: plain[name] for name in NUMBERS} | {"security_level": config.security_level}
    if "evaluation" in files:
        tested = load_images(Path(files["evaluation"]), "--evaluation")
        classes = load_array(Path(files["labels"]), "--labels")
        circuit["accuracy"] = network.score(tested, classes)
    hashes = {name: _sha256(Path(path)) for name, path in files.items()}
    budget = network.budget().layers
    layers = [
        {
            "name": layer.name,
            "lookups": layer.lookups,
            "bits": layer.bits,
            "looked_up": layer.looked_up,
            "proved": proved.proved,
        }
        for layer, proved in zip(forecast.layers, budget, strict=True)
    ]
    return {"format": FORMAT, **given, "sha256": hashes, "circuit": circuit, "layers": layers}


def _sha256(path: Path) -> str:
    """Return the hash of a file, or of the image files of a folder."""
    if not path.is_dir():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for file in pictures_in(path):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Difference:
    """One number that differs from the lock file, and whether the model fails for it."""

    what: str
    locked: Any
    now: Any
    fails: bool


def _differences(locked: dict[str, Any], now: dict[str, Any]) -> list[_Difference]:
    found = []
    for name in sorted({*locked["sha256"], *now["sha256"]}):
        old, new = locked["sha256"].get(name), now["sha256"].get(name)
        # On other test images an accuracy means something else.
        found.append((f"sha256 of {name}", old, new, name in ("evaluation", "labels") and old != new))
    for name in {**locked["circuit"], **now["circuit"]}:
        old, new = locked["circuit"].get(name), now["circuit"].get(name)
        found.append((name, old, new, _worse(name, old, new)))
    old_layers, new_layers = ({one["name"]: one for one in side["layers"]} for side in (locked, now))
    for name in {**old_layers, **new_layers}:
        if name not in old_layers or name not in new_layers:
            found.append((f"layer {name}", name in old_layers, name in new_layers, True))
            continue
        for key, old in old_layers[name].items():
            new = new_layers[name].get(key)
            found.append((f"{key} of layer {name}", old, new, _worse(key, old, new)))
    return [
        _Difference(what=what, locked=old, now=new, fails=fails)
        for what, old, new, fails in found
        if old != new
    ]


def _worse(name: str, old: Any, new: Any) -> bool:
    """Return whether a number is worse than it was. A number that is missing is infinite, or not known."""
    if name == "accuracy":
        return new is None or (old is not None and new < old - ACCURACY_SLACK)
    if name == "security_level":
        return bool(new is None or new < old)
    if name == "p_error":  # it follows from the options and the number of lookups
        return False
    if name == "proved":
        return bool(old and not new)
    return old is not None and (new is None or new > old)


def _text(lock: dict[str, Any]) -> str:
    """Return a lock file's text, in TOML."""
    lines = [HEADER + f"format = {lock['format']}"]
    for section in ("files", "options", "sha256", "circuit"):
        lines += ["", f"[{section}]"] + [
            f"{name} = {_toml(value)}" for name, value in lock[section].items() if value is not None
        ]
    for layer in lock["layers"]:
        lines += ["", "[[layers]]"] + [f"{name} = {_toml(value)}" for name, value in layer.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    # In JSON, a string, a number, true and false are spelled as in TOML.
    return json.dumps(value.item() if isinstance(value, np.generic) else value)


def _read(file: Path) -> dict[str, Any]:
    """Return the contents of a lock file. Raises `ArtifactError` for another file."""
    try:
        data = tomllib.loads(file.read_text())
        if data["format"] != FORMAT:
            raise ValueError(f"it has format {data['format']}, and this version reads {FORMAT}")
        for section in ("files", "sha256", "circuit"):
            dict(data[section])
        return {**data, "options": data.get("options", {}), "layers": [dict(one) for one in data["layers"]]}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ArtifactError(
            f"{file} cannot be read as a lock file: {error}. Write it with fheconv lock MODEL."
        ) from error
