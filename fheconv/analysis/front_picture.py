"""Draws circuits by accuracy and cost, for `fheconv.plots.front`."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from fheconv.analysis.drawing import FITS, LIMIT, OBSERVED
from fheconv.basics.errors import InvalidArgumentError

# A control that is so many times cheaper than the front is a line: a point would flatten all others.
FAR = 100
UNITS = {
    "latency": "seconds of one encrypted image",
    "complexity": "complexity of one encrypted image",
    "key_bytes": "bytes of keys",
}


class Circuit(Protocol):
    """One circuit of a search, with its accuracy and its cost by each objective."""

    @property
    def accuracy(self) -> float:
        """The share of right answers."""

    @property
    def setting(self) -> object:
        """The name of the circuit in the picture."""

    def value(self, objective: Any) -> float:
        """Return the number that the objective makes small."""


@runtime_checkable
class Search(Protocol):
    """The result of a search for circuits, such as `fheconv.TuneResult`."""

    @property
    def objective(self) -> str:
        """The number that the search makes small: "latency", "complexity" or "key_bytes"."""

    @property
    def float_accuracy(self) -> float:
        """The share of right answers of the float network."""

    @property
    def points(self) -> Sequence[Circuit]:
        """All circuits that were tried."""

    @property
    def front(self) -> Sequence[Circuit]:
        """The circuits that no other circuit beats, the cheapest first."""

    @property
    def controls(self) -> Sequence[Circuit]:
        """The circuits of trivial models, to compare with."""


def front(result: Search, ax: Axes | None = None) -> Axes:
    """Draw the result of `fheconv.tune`: accuracy against the cost by its objective, front and controls.

    A linear model costs next to nothing, so it is a line.

    Raises `InvalidArgumentError` if `result` is not a tune result, or if it is empty.
    """
    if not isinstance(result, Search) or not result.points:
        raise InvalidArgumentError(
            f"{type(result).__name__} is no TuneResult with points; give what tune found."
        )
    if ax is None:
        ax = plt.subplots(figsize=(8, 5), layout="constrained")[1]
    ax.scatter(*_places(result.points, result.objective), color=FITS, label="tried")
    x, y = _places(result.front, result.objective)
    ax.plot(x, y, color=OBSERVED, marker="o", label="front")
    named = {str(point.setting): at for point, at in zip(result.front, zip(x, y, strict=True), strict=True)}
    for name, at in named.items():  # the dearest point of each
        ax.annotate(name, at, xytext=(5, -10), textcoords="offset points", fontsize=8)
    near = [control for control in result.controls if control.value(result.objective) * FAR > x[0]]
    if near:
        ax.scatter(*_places(near, result.objective), color=LIMIT, marker="x", label="controls: hidden layers")
    for control in result.controls:
        if control not in near:
            ax.axhline(
                100 * control.accuracy, color=LIMIT, linestyle=":", label=f"control: {control.setting}"
            )
    ax.axhline(100 * result.float_accuracy, color=LIMIT, linestyle="--", label="float")
    ax.set_xscale("log")
    ax.set_xlabel(UNITS[result.objective])
    ax.set_ylabel("right answers, %")
    ax.legend(loc="lower right")
    return ax


def _places(circuits: Sequence[Circuit], objective: str) -> tuple[list[float], list[float]]:
    """Return the costs of circuits by an objective, and the percentages that they get right."""
    return [one.value(objective) for one in circuits], [100 * one.accuracy for one in circuits]
