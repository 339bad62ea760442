"""Random networks of branches: however these are joined, at 8 bits the results are torch's.

The same network is also written without joining: a convolution of each branch, and their sum. Where that one
is right, so is the other.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fheconv

WIDTHS = {"weight_bits": 8, "input_bits": 8, "activation_bits": 8, "accumulator_bits": 16}
# The greatest error, as a share of the outputs' standard deviation.
LIMIT = 0.03
ACTIVATIONS = {"relu": F.relu, "leaky": lambda x: F.leaky_relu(x, 0.1), "tanh": torch.tanh, "silu": F.silu}
POOLS = {"none": lambda x: x, "average": lambda x: F.avg_pool2d(x, 2), "maximum": lambda x: F.max_pool2d(x, 2)}
CALIBRATIONS = ("rich", "few", "one", "constant", "two constants", "one pixel")


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A convolution and an activation; `state` says how it stands beside the others."""

    channels: int
    kernel: int
    activation: str
    state: str


class Branches(nn.Module):
    """The branches of an image, and a convolution of all their channels."""

    def __init__(self, seed, branches, pool, kernel, pads):
        super().__init__()
        torch.manual_seed(seed)
        self.descriptions, self.pool, self.pads = branches, POOLS[pool], pads
        self.convs = nn.ModuleList(
            nn.Conv2d(1, one.channels, one.kernel, padding=one.kernel // 2) for one in branches
        )
        self.sizes = [one.channels for one in branches]
        self.head = nn.Conv2d(sum(self.sizes) + pads, 2, kernel, padding=kernel // 2)
        self.factors = [{"large": 100.0, "tiny": 1e-4}.get(one.state, 1.0) for one in branches]
        with torch.no_grad():
            for conv, one in zip(self.convs, branches, strict=True):
                if one.state == "dead":
                    conv.bias[:] = -20.0
            parts = self.head.weight.split([*self.sizes, pads], dim=1)
            for part, factor in zip(parts, self.factors, strict=False):
                part /= factor  # the branch's share of the result stays the same

    def fall_asleep(self, images):
        """Move the branches that sleep so far down that they are 0 on these images, and just so."""
        with torch.no_grad():
            for conv, one in zip(self.convs, self.descriptions, strict=True):
                if one.state == "asleep":
                    conv.bias -= conv(torch.tensor(images, dtype=torch.float32)).amax((0, 2, 3))

    def branches(self, x):
        for conv, one, factor in zip(self.convs, self.descriptions, self.factors, strict=True):
            yield self.pool(factor * ACTIVATIONS[one.activation](conv(x)))


class Concatenated(Branches):
    def forward(self, x):
        joined = torch.cat([*self.branches(x)], 1)
        return self.head(F.pad(joined, (0, 0, 0, 0, 0, self.pads)))


class Padded(Branches):
    """Sums branches, each padded with channels of zeros."""

    def forward(self, x):
        total, before = 0, 0
        for branch, size in zip(self.branches(x), self.sizes, strict=True):
            after = sum(self.sizes) + self.pads - before - size
            total = total + F.pad(branch, (0, 0, 0, 0, before, after))
            before += size
        return self.head(total)


class Summed(Branches):
    """Computes the same with a convolution for each branch."""

    def forward(self, x):
        y, weights = self.head.bias[:, None, None], self.head.weight.split([*self.sizes, self.pads], dim=1)
        for branch, weight in zip(self.branches(x), weights, strict=False):
            y = y + F.conv2d(branch, weight, padding=self.head.padding)
        return y


@st.composite
def problems(draw):
    activation = st.sampled_from(sorted(ACTIVATIONS))
    branches = []
    for _ in range(draw(st.integers(2, 3))):
        state = draw(st.sampled_from(["plain", "plain", "large", "tiny", "dead", "asleep"]))
        named = "relu" if state in ("dead", "asleep") else draw(activation)
        branches.append(
            Branch(
                channels=draw(st.integers(1, 3)),
                kernel=draw(st.sampled_from([1, 3])),
                activation=named,
                state=state,
            )
        )
    assume(any(one.state not in ("dead", "asleep") for one in branches))
    return (
        draw(st.integers(0, 2**32 - 1)),
        tuple(branches),
        draw(st.sampled_from(sorted(POOLS))),
        draw(st.sampled_from([1, 3])),
        draw(st.integers(0, 2)),
        draw(st.sampled_from(CALIBRATIONS)),
    )


def calibration(kind, seed):
    rng = np.random.default_rng(seed)
    shape = (1, 6, 6)
    images = rng.uniform(0, 1, ({"rich": 60, "few": 5}.get(kind, 1), *shape))
    if kind == "constant":
        images = np.full((4, *shape), 0.7)
    elif kind == "two constants":
        images = np.stack([np.zeros(shape), np.ones(shape)])
    elif kind == "one pixel":
        images = np.repeat(images, 20, axis=0)
        images[:, 0, 2, 2] = rng.uniform(0, 1, 20)
    return images


def error(module, images, others):
    network = fheconv.quantize(module, images, fheconv.QuantConfig(**WIDTHS))
    with torch.no_grad():
        expected = module(torch.tensor(others, dtype=torch.float32)).numpy()
    return float(np.sqrt(np.mean((network(others) - expected) ** 2)) / expected.std())


def errors(problem, joins):
    seed, *parts, kind = problem
    images = calibration(kind, seed)
    others = np.random.default_rng(seed + 1).uniform(images.min() * (kind != "constant"), images.max(), (60, 1, 6, 6))
    found = []
    for join in joins:
        module = join(seed, *parts)
        module.fall_asleep(images)
        found.append(error(module, images, others))
    return found
