"""Compares encrypted results with the clear integers."""

import math
from dataclasses import dataclass

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from fheconv.basics.arrays import Array
from fheconv.basics.report import Report

# With this threshold, fewer than one good circuit in a million is said to fail more often than promised.
SIGNIFICANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """One wrong result: its place (run, image, channel, position…), the expected value and the actual one.

    Example:
        >>> Mismatch(position=(0, 0, 2, 1), expected=7, got=8).position
        (0, 0, 2, 1)
    """

    position: tuple[int, ...]
    expected: int
    got: int


@dataclass(frozen=True, kw_only=True, repr=False)
class VerifyReport(Report):
    """The comparison of encrypted results with the clear integers: their number, and the first that differ.

    `promised` is the failure probability that the circuit was compiled for. Without lookups, it is the
    probability of a wrong value. With lookups, it is the probability of an image with any wrong value,
    because one failing lookup can spoil every result of its image. If accumulators are rounded before
    lookups, which is approximate, `promised` is how often Concrete's simulation of these images differs.
    `greatest` is the greatest difference.

    Example:
        >>> import numpy as np
        >>> from fheconv import compile, quantize
        >>> image = np.arange(9).reshape(1, 3, 3)
        >>> circuit = compile(quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), image))
        >>> circuit.keygen()
        >>> report = circuit.verify(image)
        >>> report.ok, report.values, report.wrong
        (True, 4, 0)
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
        """True if every value agreed."""
        return self.wrong == 0

    @property
    def rate(self) -> float:
        """The share of wrong values, or with lookups the share of images with any wrong value."""
        return self.images_wrong / self.images if self.by_image else self.wrong / self.values

    @property
    def as_promised(self) -> bool:
        """True if so many errors are plausible at the promised probability (binomial test)."""
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
            wrong, tried = (
                (self.images_wrong, f"{self.images:,} images have a wrong value")
                if self.by_image
                else (self.wrong, f"{self.values:,} values are wrong")
            )
            lines.append(
                f"{wrong:,} of {tried}, {verdict} the expected share of {self.promised:.2g}; the greatest "
                f"difference is {self.greatest}."
            )
        lines += [f"At {m.position}: expected {m.expected}, got {m.got}." for m in self.mismatches]
        return Group(*map(Text, lines))


def compare(
    expected: Array, got: Array, promised: float, show: int, *, by_image: bool = False
) -> VerifyReport:
    """Return the report that compares the results `got` with `expected`.

    It names the first `show` differences.

    With `by_image`, both arrays are (runs, images, …).
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
