"""What is said of a circuit: its cost before it runs, and how its results compare with the clear ones."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from fheconv.arrays import Array
from fheconv.lower import LoweredLayer
from fheconv.rendering import Report

# Fewer than one honest circuit in a million is suspected of failing more often than promised.
SIGNIFICANCE = 1e-6


@dataclass(frozen=True, kw_only=True, repr=False)
class Cost(Report):
    """What a circuit costs, known before any key is generated. Sizes in bytes, for one image alone.

    `complexity` is the optimiser's estimate in its own unit. `accumulator_bits` is the width of the widest
    accumulator and `assigned_bits` what Concrete gives the results. `lanes` images of a batch ride in one
    ciphertext. `layers` says how each layer is computed, and why so. `seconds` is an estimate for this
    machine (see `fheconv.timing`), None for networks without lookups.
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
        """Why the first layer's was taken; `layers` says it of each."""
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
            table.add_row(name, value)
        return table if len(self.layers) == 1 else Group(table, self._layer_table())

    def _layer_table(self) -> Table:
        table = Table(title="Layer by layer", title_justify="left")
        for heading in ("layer", "engine", "multiply-adds", "lookups", "bits", "looked up"):
            table.add_column(heading, justify="left" if heading in ("layer", "engine") else "right")
        for layer in self.layers:
            looked_up = f"{layer.lookup_bits} bits" if layer.lookups else "–"
            planes = f" in {layer.planes} planes of {layer.plane_bits}" if layer.planes > 1 else ""
            counts = f"{layer.multiply_adds:,}", f"{layer.lookups:,}", f"{layer.bits}{planes}"
            table.add_row(Text(layer.name), layer.engine, *counts, looked_up)
        return table


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """One wrong result: where (run, image, channel, position…), what was expected, what came."""

    position: tuple[int, ...]
    expected: int
    got: int


@dataclass(frozen=True, kw_only=True, repr=False)
class VerifyReport(Report):
    """Encrypted results against the clear integers: how many were compared, and the first that differ.

    `promised` is the probability of a wrong value or, where there are lookups, of an image with any, that the
    circuit was compiled for: one lookup that fails can spoil every result of its image. Where lookups are
    rounded, which is approximate by nature, it is how often Concrete's simulation of these images differs.
    `greatest` is the greatest difference.
    """

    values: int
    wrong: int
    images: int
    images_wrong: int
    greatest: int
    mismatches: tuple[Mismatch, ...]
    promised: float
    by_image: bool

    @property
    def ok(self) -> bool:
        """Whether every value agreed."""
        return self.wrong == 0

    @property
    def rate(self) -> float:
        """The share of wrong values, or where there are lookups of images with any."""
        return self.images_wrong / self.images if self.by_image else self.wrong / self.values

    @property
    def as_promised(self) -> bool:
        """Whether so many are plausible for a circuit that keeps its promise (binomial test)."""
        if self.ok:
            return True
        from scipy.stats import binom  # slow to import, and seldom needed

        wrong, tried = (self.images_wrong, self.images) if self.by_image else (self.wrong, self.values)
        return float(binom.sf(wrong - 1, tried, self.promised)) >= SIGNIFICANCE

    def __rich__(self) -> RenderableType:
        lines = [
            f"{self.values - self.wrong:,} of {self.values:,} encrypted results equal the clear integers."
        ]
        if not self.ok:
            verdict = "no more than" if self.as_promised else "MORE than"
            what = f"of {self.images} images have a wrong value" if self.by_image else "of them are wrong"
            lines.append(
                f"{self.rate:.2g} {what}, {verdict} the expected {self.promised:.2g} explains; the greatest "
                f"difference is {self.greatest}."
            )
        lines += [f"At {m.position}: expected {m.expected}, got {m.got}." for m in self.mismatches]
        return Group(*map(Text, lines))


def compare(
    expected: Array, got: Array, promised: float, show: int, *, by_image: bool = False
) -> VerifyReport:
    """Return the report on results `got` that should be `expected`, naming the first `show` differences.

    With `by_image` both are (runs, images, …).
    """
    wrong = np.argwhere(got != expected)
    mismatches = (
        Mismatch(position=tuple(map(int, at)), expected=int(expected[tuple(at)]), got=int(got[tuple(at)]))
        for at in wrong[:show]
    )
    images = (got != expected).reshape(math.prod(expected.shape[:2]), -1) if by_image else np.zeros((1, 0))
    return VerifyReport(
        values=expected.size,
        wrong=len(wrong),
        images=len(images),
        images_wrong=int(images.any(axis=1).sum()),
        greatest=int(np.abs(got - expected).max(initial=0)),
        mismatches=tuple(mismatches),
        promised=promised,
        by_image=by_image,
    )
