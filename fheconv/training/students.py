"""Builds students: small networks whose shapes are cheap in TFHE.

An encrypted image costs its lookups, one for each value of an activation. Linear layers cost next to nothing.
So students have few wide filters, and mostly one activation. (A pooling before an activation is part of a
wide filter whose stride is that of the pooling.)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import nn

from fheconv.basics.arrays import Shape

CONVOLUTIONS: Any = nn.Conv1d, nn.Conv2d, nn.Conv3d
ACTIVATIONS = nn.PReLU, nn.ReLU
# The number of a filter's positions along each axis of the image.
POSITIONS = 2, 3, 4
# The share of the lookups that a convolution gets if a hidden layer follows. Others get all of them.
SHARES = 1.0, 0.75
# A layer with fewer channels than this is not worth trying.
FEWEST = 3
# At first, an activation is the absolute value. Its slope below zero is trained, one for each channel.
SLOPE = -1.0


@dataclass(frozen=True, kw_only=True)
class Student:
    """The shape of a student: a convolution of `filters` filters, a hidden layer of `hidden` values, logits.

    The first two are followed by an activation, and left out if their number is 0. The filters have size
    `kernel`, move by `stride`, and have `positions` positions. Activations are ReLUs if `relu`; otherwise
    their slopes below zero are trained.
    """

    filters: int = 0
    kernel: Shape = ()
    stride: Shape = ()
    positions: int = 1
    hidden: int = 0
    relu: bool = False

    def __str__(self) -> str:
        words = []
        if self.filters:
            words.append(f"{self.filters} filters of {_times(self.kernel)}, stride {_times(self.stride)}")
        if self.hidden:
            words.append(f"{self.hidden} hidden")
        return ", ".join(words or ["linear"])

    def build(self, image: Shape, outputs: int) -> nn.Sequential:
        """Return the module, with random weights, for images of shape (C, *S)."""
        layers: list[nn.Module] = []
        values, axes = math.prod(image), len(self.kernel) - 1
        if self.filters:
            layers.append(CONVOLUTIONS[axes](image[0], self.filters, self.kernel, self.stride))
            layers.append(self._activation(self.filters))
            values = self.filters * self.positions
        layers.append(nn.Flatten())
        if self.hidden:
            layers += [nn.Linear(values, self.hidden), self._activation(self.hidden)]
            values = self.hidden
        return nn.Sequential(*layers, nn.Linear(values, outputs))

    def _activation(self, channels: int) -> nn.Module:
        return nn.ReLU() if self.relu else nn.PReLU(channels, init=SLOPE)


def students(image: Shape, lookups: int) -> list[Student]:
    """Return the shapes of students for images (C, *S) that take at most `lookups` lookups.

    The first is linear, and takes none. Each of the others takes nearly all.

    Example:
        >>> for student in students((1, 8, 8), 32):
        ...     print(student)
        linear
        32 hidden
        8 filters of 6×6, stride 2×2
        6 filters of 6×6, stride 2×2, 8 hidden
        3 filters of 4×4, stride 2×2
    """
    found = [Student()]
    if lookups:
        found += [Student(hidden=lookups), *_convolutional(image, lookups)]
    return found


def _convolutional(image: Shape, lookups: int) -> Iterator[Student]:
    """Yield the students that begin with a convolution."""
    axes = len(image) - 1
    for each, share in product(POSITIONS, SHARES) if 1 <= axes <= len(CONVOLUTIONS) else ():
        positions = each**axes
        filters, hidden = int(lookups * share) // positions, 0
        if share < 1:
            hidden = lookups - filters * positions
            if hidden < FEWEST:
                continue
        # Neighbouring filters overlap, by all but about one part in `each` + 1 of the image.
        stride = tuple(size // (each + 1) for size in image[1:])
        kernel = tuple(size - (each - 1) * step for size, step in zip(image[1:], stride, strict=True))
        if filters < FEWEST or not all(stride):
            continue
        yield Student(filters=filters, kernel=kernel, stride=stride, positions=positions, hidden=hidden)


def _times(sizes: Shape) -> str:
    return "×".join(map(str, sizes))
