"""Reports the cost of a circuit before it runs."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from fheconv.analysis.failures import failing_lookups
from fheconv.analysis.forecast import MULTIPLY_ADD
from fheconv.basics.report import Report
from fheconv.lowering.layers import LoweredLayer


@dataclass(frozen=True, kw_only=True, repr=False)
class Cost(Report):
    """The cost of a circuit, known before any key is generated. Sizes are in bytes, for one image alone.

    `key_bytes` is the memory that evaluation keys take, and `sent_key_bytes` what a client sends of them.
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
    sent_key_bytes: int
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

    @property
    def failures(self) -> str:
        """The number of failing lookups of an image, in words. A failed one mostly gives a neighbour."""
        return failing_lookups(self.lookups, self.p_error)

    def rows(self) -> list[tuple[str, str]]:
        """Return what matters most, as names and values."""
        keys = f"{decimal(self.sent_key_bytes)} to send, {decimal(self.key_bytes)} in memory"
        sizes = f"image {decimal(self.input_bytes)}, result {decimal(self.output_bytes)}"
        lookups = f"{self.lookups:,}, failing: {self.failures}" if self.lookups else "none"
        return [
            ("lookups", lookups),
            ("complexity", f"{self.complexity:,.0f}"),
            ("evaluation keys", keys),
            ("encrypted", sizes),
        ]

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
            "evaluation keys": f"{decimal(self.sent_key_bytes)} to send, {decimal(self.key_bytes)} in memory",
            "encrypted image": decimal(self.input_bytes),
            "encrypted result": decimal(self.output_bytes),
            "failure probability": f"{self.p_error:.1e} for each {'lookup' if self.lookups else 'result'}",
            **({"failing lookups": f"{self.failures}; {_EFFECT}"} if self.lookups else {}),
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


@dataclass(frozen=True, kw_only=True, repr=False)
class TiledCost(Report):
    """The cost of one image that runs tile by tile: `tiles` tiles, each at the cost `tile`.

    Everything else is the total of the image. Keys are made once, for all tiles. The probability of a wrong
    result is that of `tile`.

    Example:
        >>> import numpy as np
        >>> from fheconv import compile_tiled, quantize
        >>> image = np.arange(30).reshape(1, 5, 6) % 9
        >>> tiled = compile_tiled(quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), image), (2, 2))
        >>> tiled.cost.tiles, tiled.cost.multiply_adds // tiled.cost.tile.multiply_adds
        (6, 6)
    """

    tile: Cost
    tiles: int

    @property
    def ciphertexts(self) -> int:
        """The number of ciphertexts in which the image is encrypted: some hold several tiles."""
        return -(-self.tiles // self.tile.lanes)

    @property
    def multiply_adds(self) -> int:
        """The multiply-adds of all tiles, those for outputs past the edges of the image included."""
        return self.tiles * self.tile.multiply_adds

    @property
    def complexity(self) -> float:
        """The complexity of all tiles, each in a ciphertext of its own."""
        return self.tiles * self.tile.complexity

    @property
    def key_bytes(self) -> int:
        """The memory that evaluation keys take."""
        return self.tile.key_bytes

    @property
    def sent_key_bytes(self) -> int:
        """The bytes of evaluation keys that a client sends."""
        return self.tile.sent_key_bytes

    @property
    def input_bytes(self) -> int:
        """The bytes of the encrypted tiles, each in a ciphertext of its own."""
        return self.tiles * self.tile.input_bytes

    @property
    def output_bytes(self) -> int:
        """The bytes of the encrypted results, each tile's in a ciphertext of its own."""
        return self.tiles * self.tile.output_bytes

    @property
    def seconds(self) -> float | None:
        """The estimate for all tiles one after the other, or None where there is none for a tile."""
        return None if self.tile.seconds is None else self.tiles * self.tile.seconds

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, ready for JSON."""
        totals = {name: getattr(self, name) for name in _TOTALS}
        return {"tiles": self.tiles, **totals, "tile": self.tile.to_dict()}

    def __rich__(self) -> RenderableType:
        table = Table(title="Cost of one image, tile by tile", title_justify="left", show_header=False)
        rows = {
            "tiles": f"{self.tiles:,} in {self.ciphertexts:,} ciphertexts",
            "multiply-adds": f"{self.multiply_adds:,}",
            "complexity": f"{self.complexity:,.0f}",
            "encrypted tiles": f"{decimal(self.input_bytes)}, one tile in each ciphertext",
            "encrypted results": f"{decimal(self.output_bytes)}, one tile in each ciphertext",
        }
        if self.seconds is not None:
            rows["expected time"] = f"{self.seconds:.2g} s on this machine"
        for name, value in rows.items():
            table.add_row(name, value)
        return Group(table, Text("Of this, each tile:"), self.tile)


def seconds_or_estimate(cost: Cost) -> float | None:
    """Return the seconds of a circuit. Those without lookups are not timed, but estimated."""
    return cost.seconds if cost.lookups else cost.multiply_adds * MULTIPLY_ADD / 10**6


# What a failed lookup means.
_EFFECT = 'circuit.score(x, y, fhe="simulate") shows the effect'
_TOTALS = (
    "ciphertexts",
    "multiply_adds",
    "complexity",
    "key_bytes",
    "sent_key_bytes",
    "input_bytes",
    "output_bytes",
    "seconds",
)
