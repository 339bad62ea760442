"""Holds the circuits that `fheconv.tune` found, with their accuracy and cost, and picks the best of them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table

from fheconv.basics.compile_config import CompileConfig
from fheconv.basics.errors import InvalidArgumentError, TuningError
from fheconv.basics.report import Report
from fheconv.circuits.circuit import FheCircuit
from fheconv.circuits.cost import Cost
from fheconv.quantized import QuantizedNetwork
from fheconv.tuning.setting import Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Objective: TypeAlias = Literal["latency", "complexity", "key_bytes"]
# A control is no dearer than a circuit if its complexity is at most this many times as large.
ALIKE = 1.05


@dataclass(frozen=True, kw_only=True, eq=False)
class TunePoint:
    """One circuit that the search tried. Its method `compile` makes exactly this circuit.

    `accuracy` is predicted with failing lookups, `clear_accuracy` is the accuracy of the exact integers, both
    on the evaluation images. `cost` comes from Concrete. `seconds` is an estimate, or the median of encrypted
    runs if `measured`.

    Example:
        >>> point = result.best(max_drop=0.01)  # doctest: +SKIP
        >>> circuit = point.compile()  # doctest: +SKIP
    """

    setting: Setting
    network: QuantizedNetwork = field(repr=False)
    config: CompileConfig
    accuracy: float
    clear_accuracy: float
    cost: Cost = field(repr=False)
    seconds: float
    measured: bool = False

    def compile(self) -> FheCircuit:
        """Return the circuit, without keys."""
        return FheCircuit(self.network, self.config)

    def value(self, objective: Objective) -> float:
        """Return the number that the objective makes small: seconds, complexity or bytes of keys."""
        if objective == "latency":
            return self.seconds
        return self.cost.complexity if objective == "complexity" else float(self.cost.key_bytes)

    def beats(self, other: "TunePoint") -> bool:
        """Return whether this circuit is as accurate as the other, and no dearer by Concrete's complexity."""
        as_cheap = self.cost.complexity <= ALIKE * other.cost.complexity
        return as_cheap and self.accuracy >= other.accuracy


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TuneResult(Report):
    """The result of `fheconv.tune`: every point, and the front of the points that no other point beats.

    `reason` says why the search ended, `limits` what stands in the way of cheaper circuits. `networks` maps
    each setting to its network; for fine-tuned networks it also holds the network before fine-tuning. If you
    give the result to `tune` as `previous`, none of these networks is made again.

    With `tune(..., students=True)` some points are students. They imitate the model, and are not the model:
    `point.setting.kind` is "student". `controls` are trivial models, which `tune` trains on the classes of
    `training`. They are no points: `front` and `best` do not know them. `beaten` has the points of the front
    that one of them beats. What such a control can do, nobody needs a large network for.

    Example:
        >>> result = tune(model, images, evaluation=(images, classes))  # doctest: +SKIP
        >>> circuit = result.best(max_drop=0.01).compile()  # doctest: +SKIP
    """

    objective: Objective
    float_accuracy: float
    points: tuple[TunePoint, ...]
    networks: Mapping[Setting, QuantizedNetwork] = field(repr=False)
    reason: str
    controls: tuple[TunePoint, ...] = ()

    @property
    def front(self) -> tuple[TunePoint, ...]:
        """The points that are cheaper than every point at least as accurate, the cheapest first."""
        return front_of(self.points, self.objective)

    @property
    def beaten(self) -> tuple[TunePoint, ...]:
        """The points of the front that a control beats: it is as accurate, and no dearer."""
        return tuple(p for p in self.front if any(control.beats(p) for control in self.controls))

    @property
    def limits(self) -> str:
        """The reasons for the price of the cheapest point."""
        if not self.points:
            return "Nothing was found."
        layers = self.front[0].cost.layers
        total = max(sum(layer.lookups for layer in layers), 1)
        most = max(layers, key=lambda layer: layer.lookups)
        widest = max(layers, key=lambda layer: layer.lookup_bits)
        return (
            f"Of the cheapest circuit's {total} lookups {most.name!r} makes {most.lookups}: fewer channels "
            "there (lookup_budgets), a larger stride or smaller images save the most. The widest lookups, of "
            f"{widest.lookup_bits} bits, are those of {widest.name!r}."
        )

    def best(
        self, *, max_drop: float | None = None, max_seconds: float | None = None, students: bool = True
    ) -> TunePoint:
        """Return the cheapest point that loses at most `max_drop` of the float accuracy.

        A `max_drop` of 0.01 is one percentage point. With `max_seconds` alone, return the most accurate point
        that takes at most so many seconds. With both, the point keeps to both limits.

        Whoever asked `tune` for students may get one. With `students=False`, the point is the model itself.
        Raises `TuningError`, which names the nearest point, if there is none, `InvalidArgumentError` without
        a limit.
        """
        if max_drop is None and max_seconds is None:
            raise InvalidArgumentError("Say what is best: give max_drop, max_seconds or both.")
        least = -np.inf if max_drop is None else self.float_accuracy - max_drop
        most = np.inf if max_seconds is None else max_seconds
        # Accuracies are multiples of one over the number of images. An exact tie must count as a fit.
        points = [p for p in self.points if students or p.setting.kind == "model"]
        able = [p for p in points if p.accuracy >= least - 1e-9 and p.seconds <= most]
        if not able:
            raise TuningError(replace(self, points=tuple(points))._nearest(max_drop, max_seconds))
        if max_drop is None:
            return max(able, key=lambda point: (point.accuracy, -point.value(self.objective)))
        return min(able, key=lambda point: (point.value(self.objective), -point.accuracy))

    def _nearest(self, max_drop: float | None, max_seconds: float | None) -> str:
        limits = [] if max_drop is None else [f"loses at most {max_drop:.1%} of {self.float_accuracy:.1%}"]
        limits += [] if max_seconds is None else [f"takes at most {max_seconds:g} s"]
        said = f"No circuit that was tried {' and '.join(limits)}"
        if not self.points:
            return f"{said}: there are none. {self.reason}"
        accurate = max(self.points, key=lambda point: point.accuracy)
        fast = min(self.points, key=lambda point: point.seconds)
        return (
            f"{said}. The most accurate is right for {accurate.accuracy:.1%} in {accurate.seconds:.2g} s "
            f"({accurate.setting}), the fastest for {fast.accuracy:.1%} in {fast.seconds:.2g} s. "
            f"{' or '.join(self._enough(max_drop, max_seconds))} would do."
        )

    def _enough(self, max_drop: float | None, max_seconds: float | None) -> Iterator[str]:
        """Yield limits that some point keeps to, one changed if that is enough, otherwise both."""
        drops = [self.float_accuracy - point.accuracy for point in self.points]
        pairs = [(drop, point.seconds) for drop, point in zip(drops, self.points, strict=True)]
        within = [drop for drop, seconds in pairs if max_seconds is None or seconds <= max_seconds]
        if max_drop is not None and within:
            yield f"max_drop={_above(min(within))}"
        accurate = [seconds for drop, seconds in pairs if max_drop is None or drop <= max_drop + 1e-9]
        if max_seconds is not None and accurate:
            yield f"max_seconds={_above(min(accurate))}"
        if not within and not accurate:
            drop, seconds = min(pairs)
            yield f"max_drop={_above(drop)} with max_seconds={_above(seconds)}"

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the points and the front, with matplotlib (the extra `plots`); return the axes."""
        from fheconv.analysis import plots

        return plots.front(self, ax)

    def __rich__(self) -> RenderableType:
        told: list[RenderableType] = [
            *self._warnings(),
            self._table("Cheapest circuits by accuracy", self.front),
        ]
        if self.controls:
            told.append(self._table("Controls: trivial models, trained on the same images", self.controls))
        told.append(f"{self.float_accuracy:.1%} of the evaluation images are right in float.")
        if self.controls and not self.beaten:
            told.append("Each circuit of the front is more accurate than all controls that are no dearer.")
        return Group(*told, self.reason, self.limits)

    def _warnings(self) -> Iterator[str]:
        """Yield what must be known before a circuit is chosen; the report begins with it."""
        if self.beaten:
            able = (one for one in self.controls if any(one.beats(point) for point in self.front))
            best = max(able, key=lambda control: control.accuracy)
            yield (
                f"Trivial models beat {len(self.beaten)} of the front's {len(self.front)} circuits: they are "
                f"as accurate, and no dearer. The best is right for {best.accuracy:.1%} ({best.setting})."
            )
        if any(point.setting.kind == "student" for point in self.front):
            yield "Students imitate your network, and are not it; best(students=False) leaves them out."

    def _table(self, title: str, points: Sequence[TunePoint]) -> Table:
        table = Table(title=title, title_justify="left")
        headings = "circuit", "p_error", "accuracy", "drop", "lookups", "complexity", "keys", "seconds"
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "circuit" else "right")
        for point in points:
            table.add_row(
                str(point.setting),
                f"{point.cost.p_error:.2g}",
                f"{point.accuracy:.1%}",
                f"{100 * (self.float_accuracy - point.accuracy):.1f}",
                f"{point.cost.lookups:,}",
                f"{point.cost.complexity:.2e}",
                decimal(point.cost.key_bytes),
                f"{point.seconds:.2g}" + ("" if point.measured else " expected"),
            )
        return table


def front_of(points: Sequence[TunePoint], objective: Objective) -> tuple[TunePoint, ...]:
    """Return the points that are cheaper than every point at least as accurate, the cheapest first."""
    front: list[TunePoint] = []
    for point in sorted(points, key=lambda point: (point.value(objective), -point.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return tuple(front)


def _above(number: float) -> str:
    """Return the least number of four decimals that is not below a number."""
    return f"{math.ceil(number * 1e4) / 1e4:g}"
