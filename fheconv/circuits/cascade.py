"""Lets a cheap circuit answer first, and asks a larger one where the answer is uncertain."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from rich.console import RenderableType
from rich.table import Table

from fheconv.basics.arrays import Array, ArrayLike, Shape
from fheconv.basics.checks import check_number
from fheconv.basics.errors import InvalidArgumentError
from fheconv.basics.keywords import answers_keywords
from fheconv.basics.report import Brief, Report
from fheconv.basics.samples import Data, images_of, share_right, which_right, with_classes
from fheconv.circuits.circuit import Fhe, FheCircuit
from fheconv.circuits.client import Client
from fheconv.circuits.cost import Cost, seconds_or_estimate

# A `RemoteCircuit` is a client, too.
Stage: TypeAlias = FheCircuit | Client


@dataclass(frozen=True, kw_only=True, repr=False)
class CascadeCost(Report):
    """The mean cost of one image of a batch in a cascade. Made by `Cascade.cost`.

    `first` and `second` are the costs of the circuits, and `share` is the share of the images that the second
    is asked about.

    Example:
        >>> cost = cascade.cost(images)  # doctest: +SKIP
        >>> cost.lookups == cost.first.lookups + cost.share * cost.second.lookups  # doctest: +SKIP
        True
    """

    first: Cost
    second: Cost
    share: float

    @property
    def lookups(self) -> float:
        """The mean number of lookups."""
        return self.first.lookups + self.share * self.second.lookups

    @property
    def complexity(self) -> float:
        """The mean complexity."""
        return self.first.complexity + self.share * self.second.complexity

    @property
    def seconds(self) -> float | None:
        """The mean seconds on this machine, None if those of a circuit are not known."""
        first, second = map(seconds_or_estimate, (self.first, self.second))
        return None if first is None or second is None else first + self.share * second

    def __rich__(self) -> RenderableType:
        table = Table(title="Mean cost of an encrypted image", title_justify="left", show_header=False)
        table.add_row("asked twice", f"{self.share:.1%}")
        table.add_row("lookups", f"{self.lookups:,.1f}")
        table.add_row("complexity", f"{self.complexity:,.0f}")
        if self.seconds is not None:
            table.add_row("expected time", f"{self.seconds:.2g} s on this machine")
        return table


class Cascade(Brief):
    """Asks a second circuit where the answer of a first one is uncertain.

    The client decrypts the answer of the first circuit. If the two greatest scores differ by less than
    `margin`, it encrypts the image for the second circuit, too, and takes that answer. With a first circuit
    without lookups, most images take no lookup at all. Both are compiled circuits, or a `RemoteCircuit` each.

    Each has its own keys. If both have lookups, one set of keys can serve both: compile the small network
    with `keys_of=large`, and `keygen` makes them once. The small one's lookups then cost what the large one's
    do. A circuit without lookups has a secret key of its own, which is made in an instant.

    **The second request is seen by whoever runs the circuits.** It says that the margin of this image was
    small, which is a bit about the decrypted scores. Whoever chooses images could learn from many such bits
    about weights or keys (IND-CPA^D). If that must not be, use the second circuit alone.

    Raises `InvalidArgumentError` for circuits whose images or classes differ, or whose results are not a
    score for each of two or more classes, and for a margin that is not a number of at least 0.

    Example:
        >>> cascade = Cascade(small, large, margin=2.0)  # doctest: +SKIP
        >>> cascade.predict(images, fhe="simulate").argmax(axis=1)  # doctest: +SKIP
        array([3, 8])
    """

    @answers_keywords
    def __init__(self, first: Stage, second: Stage, *, margin: float) -> None:
        for name, stage in (("first", first), ("second", second)):
            if not isinstance(stage, Stage):
                raise InvalidArgumentError(
                    f"{name} is a {type(stage).__name__}; a cascade takes compiled circuits: give what "
                    "fheconv.compile returns, or a RemoteCircuit."
                )
        shapes = _shapes(first), _shapes(second)
        if shapes[0] != shapes[1]:
            raise InvalidArgumentError(
                f"The first circuit turns images {shapes[0][0]} into {shapes[0][1]}, and the second "
                f"{shapes[1][0]} into {shapes[1][1]}; both must take the same images and know the same "
                "classes."
            )
        if len(shapes[0][1]) != 1 or shapes[0][1][0] < 2:
            raise InvalidArgumentError(
                f"The circuits' results have shape {shapes[0][1]}; a cascade compares the scores (classes,) "
                "of two or more classes."
            )
        check_number("margin", margin, -np.inf)
        if margin < 0:
            raise InvalidArgumentError(f"margin={margin!r} must be a number of at least 0.")
        self.first, self.second, self.margin = first, second, float(margin)

    @classmethod
    def fit(
        cls,
        first: Stage,
        second: Stage,
        validation: Data,
        classes: ArrayLike | None = None,
        fhe: Fhe = "disable",
    ) -> "Cascade":
        """Return the cascade with the least margin that costs no right answer on validation images.

        validation: images that neither circuit was trained on, with their classes, as for
            `FheCircuit.score`. Measure the cascade on other images.

        With this margin, each image that the second circuit gets right keeps its class. What the first one
        alone gets right makes up for nothing: on a few hundred images that is mostly luck.

        Raises `InvalidArgumentError` like `Cascade` and `FheCircuit.score`.
        """
        cascade = cls(first, second, margin=0.0)
        images, classes = with_classes(validation, classes, len(_shapes(first)[0]))
        one, other = first.predict(images, fhe), second.predict(images, fhe)
        lost = which_right(other, classes) & ~which_right(one, classes)
        if lost.any():  # just above its margin, the second circuit is asked about an image, too
            cascade.margin = float(np.nextafter(margins_of(one)[lost].max(), np.inf))
        return cascade

    @answers_keywords
    def predict(self, x: Data, fhe: Fhe = "disable") -> Array:
        """Return the scores (n, classes) for images (n, *input_shape), each from the circuit that answered.

        `fhe` is as for `FheCircuit.predict`; a `RemoteCircuit` only knows "execute". Raises like it.
        """
        axes = len(_shapes(self.first)[0])
        images = images_of(x, "x", axes)
        scores = self.first.predict(images, fhe)
        asked = margins_of(scores) < self.margin
        if images.ndim == axes:
            return self.second.predict(images, fhe) if asked else scores
        if asked.any():
            scores[asked] = self.second.predict(images[asked], fhe)
        return scores

    @answers_keywords
    def score(self, x: Data, y: ArrayLike | None = None, fhe: Fhe = "disable") -> float:
        """Return the share of images that get their right class, as `FheCircuit.score`."""
        images, classes = with_classes(x, y, len(_shapes(self.first)[0]))
        return share_right(self.predict(images, fhe), classes)

    @answers_keywords
    def cost(self, x: Data, fhe: Fhe = "disable") -> CascadeCost:
        """Return the mean cost of images (n, *input_shape). The first circuit is run, by the mode `fhe`."""
        asked = margins_of(self.first.predict(x, fhe)) < self.margin
        return CascadeCost(first=self.first.cost, second=self.second.cost, share=float(asked.mean()))

    def keygen(self) -> None:
        """Make keys for both circuits: one set if they share it, or else each its own."""
        self.first.keygen()
        if not self.second.has_keys_of(self.first):
            self.second.keygen()

    def _summary(self) -> tuple[str, list[tuple[str, ...]]]:
        inputs, outputs = _shapes(self.first)
        rows: list[tuple[str, ...]] = [
            ("first", f"{self.first.cost.lookups:,} lookups"),
            ("second", f"{self.second.cost.lookups:,} lookups, where the margin is below {self.margin:g}"),
        ]
        return f"Cascade: {inputs} → {outputs}", rows


def margins_of(scores: Array) -> Array:
    """Return the difference of the two greatest scores (…, classes), (…).

    Example:
        >>> margins_of(np.array([[1.0, 4.0, 2.5], [3.0, 3.0, 1.0]]))
        array([1.5, 0. ])
    """
    greatest = np.sort(scores, axis=-1)[..., -2:]
    difference: Array = greatest[..., 1] - greatest[..., 0]
    return difference


def _shapes(stage: Stage) -> tuple[Shape, Shape]:
    image, result, _ = stage._described()
    return tuple(image), tuple(result)
