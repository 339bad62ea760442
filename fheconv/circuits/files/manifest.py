"""Describes a saved circuit in its files: its name, its maker and its cost."""

from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fheconv.basics.arrays import Shape
from fheconv.basics.errors import ArtifactError
from fheconv.basics.report import Report
from fheconv.circuits.cost import Cost
from fheconv.circuits.files.identity import Identity
from fheconv.circuits.files.interface import GREATEST, MOST_AXES, MOST_LANES, MOST_VALUES
from fheconv.lowering.layers import LoweredLayer

# The version of the file format that is written, and those that are read. In format 1 the fingerprint did not
# cover the interface (`fheconv.circuits.files.identity`).
FORMAT = 2
FORMATS = (1, 2)
MOST_NAMES = 100_000
MOST_LETTERS = 1000


@dataclass(frozen=True, kw_only=True, repr=False)
class Manifest(Report):
    """The description of a saved circuit: its `fingerprint` in hexadecimal, its maker and its cost.

    `format` is that of its files. `identity` is what the fingerprint is made of, None in format 1.
    `input_shape` (C, *S) is the shape of an image, `output_shape` the shape of its results. `class_names` are
    the names of the results, if these are scores of classes. `lanes` images share a ciphertext. `cost` is
    that of one image alone in a ciphertext, without the seconds of the machine that compiled it.

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

    format: int = FORMAT
    fingerprint: str
    identity: Identity | None
    fheconv: str
    concrete: str
    input_shape: Shape
    output_shape: Shape
    class_names: tuple[str, ...] | None
    lanes: int = 1
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, ready for JSON. `from_dict` reads it."""
        identity = {} if self.identity is None else {"identity": asdict(self.identity)}
        cost = self.cost.to_dict()
        if self.format == 1:
            del cost["sent_key_bytes"]
        return {
            "format": self.format,
            "fingerprint": self.fingerprint,
            **identity,
            "fheconv": self.fheconv,
            "concrete": self.concrete,
            "input_shape": list(self.input_shape),
            "output_shape": list(self.output_shape),
            "class_names": None if self.class_names is None else list(self.class_names),
            **({} if self.lanes == 1 else {"lanes": self.lanes}),
            "cost": cost,
        }

    @classmethod
    def from_dict(cls, data: Any) -> "Manifest":
        """Return the manifest from data that `to_dict` made.

        Raises `ArtifactError` for another format or another version of Concrete, and for data that `to_dict`
        cannot make.
        """
        if not isinstance(data, dict) or type(data.get("format")) is not int:
            raise ArtifactError("The manifest is altered, or not of fheconv: it names no format.")
        if data["format"] not in FORMATS:
            raise ArtifactError(
                f"The files have format {data['format']!r:.20}, and this fheconv reads formats "
                f"{' and '.join(map(str, FORMATS))}; use the fheconv that wrote them, or save the circuit "
                "anew."
            )
        try:
            manifest = cls(**_read(data))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
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
        table.add_row("format", str(self.format))
        table.add_row("made by", Text(f"fheconv {self.fheconv}, concrete-python {self.concrete}"))
        table.add_row("image", " × ".join(map(str, self.input_shape)))
        table.add_row("results", " × ".join(map(str, self.output_shape)))
        if self.class_names is not None:
            table.add_row("classes", Text(", ".join(self.class_names)))
        if self.lanes > 1:
            table.add_row("images in a ciphertext", str(self.lanes))
        return Group(table, self.cost)


def _read(data: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(Manifest)} - ({"identity"} if data["format"] == 1 else set())
    if set(data) | {"lanes"} != names or (data["format"] == 1 and "lanes" in data):
        raise ValueError(f"it must be an object of {sorted(names)}")
    for name in ("fingerprint", "fheconv", "concrete"):
        _check(type(data[name]) is str and len(data[name]) <= MOST_LETTERS, name)
    _check(len(data["fingerprint"]) == 64, "fingerprint")
    identity = None
    if "identity" in data:
        identity = Identity(**data["identity"])
        _check(all(type(one) is str and len(one) == 64 for one in data["identity"].values()), "identity")
    classes = data["class_names"]
    if classes is not None:
        classes = tuple(classes)
        whole = all(type(name) is str and len(name) <= MOST_LETTERS for name in classes)
        _check(len(classes) <= MOST_NAMES and whole, "class_names")
    shapes = {name: tuple(data[name]) for name in ("input_shape", "output_shape")}
    for name, shape in shapes.items():
        _check(len(shape) <= MOST_AXES and all(type(n) is int and 0 < n <= MOST_VALUES for n in shape), name)
    _check(classes is None or shapes["output_shape"] == (len(classes),), "class_names")
    cost = dict(data["cost"])
    layers = tuple(LoweredLayer(**_numbers(LoweredLayer, layer)) for layer in cost.pop("layers"))
    _check(len(layers) > 0 and cost.pop("seconds") is None, "cost")
    if data["format"] == 1:  # which holds one size of the keys
        cost["sent_key_bytes"] = cost["key_bytes"]
    read = Cost(layers=layers, seconds=None, **_numbers(Cost, cost))
    lanes = data.get("lanes", 2)  # written only if there are two or more
    _check(type(lanes) is int and 2 <= lanes <= MOST_LANES, "lanes")
    kept = {name: data[name] for name in ("format", "fingerprint", "fheconv", "concrete")}
    return {
        **kept,
        **shapes,
        "identity": identity,
        "class_names": classes,
        "lanes": data.get("lanes", 1),
        "cost": read,
    }


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
