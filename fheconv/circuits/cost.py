"""Reports the cost of a circuit before it runs."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from fheconv.basics.report import Report
from fheconv.lowering.lower import LoweredLayer


@dataclass(frozen=True, kw_only=True, repr=False)
class Cost(Report):
    """The cost of a circuit, known before any key is generated. Sizes are in bytes, for one image alone.

    `complexity` is the optimiser's estimate in its own unit. `accumulator_bits` is the width of the widest
    accumulator, and `assigned_bits` the width that Concrete gives the results. `lanes` images of a batch
    share one ciphertext. `layers` says how each layer is computed, and why. `seconds` is an estimate for this
    machine (see `fheconv.circuits.native.lookup_times`), None for networks without lookups.

    Example:
        >>> import numpy as np
        >>> from fheconv import compile, quantize
        >>> image = np.arange(9).reshape(1, 3, 3)
        >>> circuit = compile(quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), image))
        >>> circuit.cost.lookups, circuit.cost.accumulator_bits, circuit.cost.seconds
        (0, 6, None)
    """

    layers: tuple[LoweredLayer, ...]
    lookups: int
    multiply_adds: int
    complexity: float
    key_bytes: int
    input_bytes: int
    output_bytes: int
    p_error: float
    global_p_error: float
    accumulator_bits: int
    assigned_bits: int
    lanes: int
    seconds: float | None

    @property
    def engine(self) -> str:
        """The engines that compute the layers."""
        return ", ".join(dict.fromkeys(layer.engine for layer in self.layers))

    @property
    def engine_reason(self) -> str:
        """The reason for the first layer's engine. `layers` holds the reasons for all layers."""
        return self.layers[0].reason

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, ready for JSON."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        table = Table(title="Cost of one encrypted image", title_justify="left", show_header=False)
        rows = {
            **({"engine": f"{self.engine} ({self.engine_reason})"} if len(self.layers) == 1 else {}),
            "accumulator": f"{self.accumulator_bits} bits, the result {self.assigned_bits}",
            **({} if self.lookups else {"lanes": f"{self.lanes} images of a batch in one ciphertext"}),
            "lookups": f"{self.lookups:,}",
            "multiply-adds": f"{self.multiply_adds:,}",
            "complexity": f"{self.complexity:,.0f}",
            "evaluation keys": decimal(self.key_bytes),
            "encrypted image": decimal(self.input_bytes),
            "encrypted result": decimal(self.output_bytes),
            "failure probability": f"{self.p_error:.1e} for each "
            + (f"lookup, {self.global_p_error:.1e} for an image" if self.lookups else "result"),
            **({} if self.seconds is None else {"expected time": f"{self.seconds:.2g} s on this machine"}),
        }
        for name, value in rows.items():
            table.add_row(name, Text(value))
        return table if len(self.layers) == 1 else Group(table, self._layer_table())

    def _layer_table(self) -> Table:
        table = Table(title="Layer by layer", title_justify="left")
        for heading in ("layer", "engine", "multiply-adds", "lookups", "bits", "looked up"):
            table.add_column(heading, justify="left" if heading in ("layer", "engine") else "right")
        for layer in self.layers:
            looked_up = f"{layer.lookup_bits} bits" if layer.lookups else "–"
            planes = f" in {layer.planes} planes of {layer.plane_bits}" if layer.planes > 1 else ""
            counts = f"{layer.multiply_adds:,}", f"{layer.lookups:,}", f"{layer.bits}{planes}"
            table.add_row(Text(layer.name), Text(layer.engine), *counts, looked_up)
        return table
