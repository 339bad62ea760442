"""Describes a saved circuit in its files: its fingerprint, its maker and its cost."""

from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fheconv.basics.arrays import Shape
from fheconv.basics.errors import ArtifactError
from fheconv.basics.report import Report
from fheconv.circuits.cost import Cost
from fheconv.lowering.lower import LoweredLayer

# The version of the file format. Other versions are refused.
FORMAT = 1
MOST_NAMES = 100_000
# No number of a manifest is as great as this.
GREATEST = 2.0**1000


@dataclass(frozen=True, kw_only=True, repr=False)
class Manifest(Report):
    """The description of a saved circuit: its `fingerprint` in hexadecimal, its maker and its cost.

    `input_shape` (C, *S) is the shape of an image, `output_shape` the shape of its results. `class_names` are
    the names of the results, if these are scores of classes. `cost` is `circuit.cost` without the seconds of
    the machine that compiled it.

    Example:
        >>> import numpy as np
        >>> from fheconv import compile, load_client, quantize
        >>> import tempfile
        >>> image = np.arange(9).reshape(1, 3, 3)
        >>> circuit = compile(quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), image))
        >>> client_file, server_file = circuit.save(tempfile.mkdtemp())
        >>> manifest = load_client(client_file).manifest
        >>> manifest.input_shape, manifest.output_shape
        ((1, 3, 3), (1, 2, 2))
    """

    fingerprint: str
    fheconv: str
    concrete: str
    input_shape: Shape
    output_shape: Shape
    class_names: tuple[str, ...] | None
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, ready for JSON. `from_dict` reads it."""
        return {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "fheconv": self.fheconv,
            "concrete": self.concrete,
            "input_shape": list(self.input_shape),
            "output_shape": list(self.output_shape),
            "class_names": None if self.class_names is None else list(self.class_names),
            "cost": self.cost.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Any) -> "Manifest":
        """Return the manifest from data that `to_dict` made.

        Raises `ArtifactError` for another format or another version of Concrete, and for data that `to_dict`
        cannot make.
        """
        if not isinstance(data, dict) or type(data.get("format")) is not int:
            raise ArtifactError("The manifest is altered, or not of fheconv: it names no format.")
        if data["format"] != FORMAT:
            raise ArtifactError(
                f"The files have format {data['format']}, and this fheconv reads format {FORMAT}; use the "
                "fheconv that wrote them, or save the circuit anew."
            )
        try:
            manifest = cls(**_read(data))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ArtifactError(f"The manifest is altered: {error!r:.200}.") from error
        if manifest.concrete != version("concrete-python"):
            raise ArtifactError(
                f"The circuit was compiled with concrete-python {manifest.concrete}, and this is "
                f"{version('concrete-python')}, which may choose other parameters; install that version, or "
                "save the circuit anew."
            )
        return manifest

    def __rich__(self) -> RenderableType:
        table = Table(title="Circuit", title_justify="left", show_header=False)
        # Plain text: a file may hold text that looks like rich's markup.
        table.add_row("fingerprint", Text(self.fingerprint))
        table.add_row("made by", Text(f"fheconv {self.fheconv}, concrete-python {self.concrete}"))
        table.add_row("image", " × ".join(map(str, self.input_shape)))
        table.add_row("results", " × ".join(map(str, self.output_shape)))
        if self.class_names is not None:
            table.add_row("classes", Text(", ".join(self.class_names)))
        return Group(table, self.cost)


def _read(data: dict[str, Any]) -> dict[str, Any]:
    names = {"format", *(field.name for field in fields(Manifest))}
    if set(data) != names:
        raise ValueError(f"it must be an object of {sorted(names)}")
    for name in ("fingerprint", "fheconv", "concrete"):
        _check(type(data[name]) is str, name)
    _check(len(data["fingerprint"]) == 64, "fingerprint")
    classes = data["class_names"]
    if classes is not None:
        classes = tuple(classes)
        _check(len(classes) <= MOST_NAMES and all(type(c) is str for c in classes), "class_names")
    shapes = {name: tuple(data[name]) for name in ("input_shape", "output_shape")}
    for name, shape in shapes.items():
        _check(all(type(n) is int and n > 0 for n in shape), name)
    _check(classes is None or shapes["output_shape"] == (len(classes),), "class_names")
    cost = dict(data["cost"])
    layers = tuple(LoweredLayer(**_numbers(LoweredLayer, layer)) for layer in cost.pop("layers"))
    _check(len(layers) > 0 and cost.pop("seconds") is None, "cost")
    read = Cost(layers=layers, seconds=None, **_numbers(Cost, cost))
    kept = {name: data[name] for name in ("fingerprint", "fheconv", "concrete")}
    return {**kept, **shapes, "class_names": classes, "cost": read}


def _numbers(kind: type[Any], data: Any) -> dict[str, Any]:
    """Return the numbers and strings of a dataclass `kind`. Each has the type that the dataclass gives it."""
    types: dict[str, Any] = {field.name: field.type for field in fields(kind)}
    read = {}
    for name, value in data.items():
        allowed = (int, float) if types[name] is float else (types[name],)
        _check(type(value) in allowed and (type(value) is str or 0 <= value < GREATEST), name)
        read[name] = types[name](value)
    return read


def _check(holds: bool, name: str) -> None:
    if not holds:
        raise ValueError(f"{name} is not as it is written")
