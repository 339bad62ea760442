"""Random networks of branches: however these are joined, at 8 bits the results are torch's.

Each network is also written without joining: a convolution of each branch, and their sum. Where that one is
right, so is the other.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fheconv

WIDTHS = {"weight_bits": 8, "input_bits": 8, "activation_bits": 8, "accumulator_bits": 16}
# The greatest error, as a share of the outputs' standard deviation.
LIMIT = 0.03
ACTIVATIONS = {"relu": F.relu, "leaky": lambda x: F.leaky_relu(x, 0.1), "tanh": torch.tanh, "silu": F.silu}
POOLS = {"none": nn.Identity(), "average": nn.AvgPool2d(2), "maximum": nn.MaxPool2d(2)}
CALIBRATIONS = ("rich", "few", "one", "constant", "two constants", "one pixel")
FACTORS = {"large": 100.0, "tiny": 1e-4}


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A convolution and an activation; `state` says how it stands beside the others."""

    channels: int
    kernel: int
    activation: str
    state: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Branches of an image, and a convolution of `kernel` that reads them all, and `empty` channels of 0."""

    seed: int
    branches: tuple[Branch, ...]
    pool: str
    pool_last: bool
    kernel: int
    empty: int


class Branches(nn.Module):
    def __init__(self, plan, images):
        super().__init__()
        torch.manual_seed(plan.seed)
        self.plan, self.pool = plan, POOLS[plan.pool]
        self.convs = nn.ModuleList(
            nn.Conv2d(1, one.channels, one.kernel, padding=one.kernel // 2) for one in plan.branches
        )
        self.factors = [FACTORS.get(one.state, 1.0) for one in plan.branches]
        self.sizes = [one.channels for one in plan.branches]
        self.head = nn.Conv2d(self.channels, 2, plan.kernel, padding=plan.kernel // 2)
        with torch.no_grad():
            for conv, one in zip(self.convs, plan.branches, strict=True):
                if one.state == "dead":
                    conv.bias[:] = -20.0
                if one.state == "asleep":  # 0 on these images, and only just
                    conv.bias -= conv(torch.tensor(images, dtype=torch.float32)).amax((0, 2, 3))
            self.balance()

    @property
    def channels(self):
        return sum(self.sizes) + self.plan.empty

    def balance(self):
        """Give each branch the same share of the result, whatever its factor."""
        for weight, factor in zip(self.weights(), self.factors, strict=False):
            weight /= factor

    def weights(self):
        return self.head.weight.split([*self.sizes, self.plan.empty], dim=1)

    def branches(self, x):
        """The branches; unless they are pooled after they are joined, they are pooled."""
        pool = POOLS["none"] if self.plan.pool_last else self.pool
        return [
            pool(factor * ACTIVATIONS[one.activation](conv(x)))
            for conv, one, factor in zip(self.convs, self.plan.branches, self.factors, strict=True)
        ]

    def joined(self, branches):
        raise NotImplementedError

    def forward(self, x):
        joined = self.joined(self.branches(x))
        return self.head(self.pool(joined) if self.plan.pool_last else joined)

    def apart(self, x):
        """The same results, with a convolution for each branch."""
        y = self.head.bias[:, None, None]
        for branch, weight in zip(self.branches(x), self.weights(), strict=False):
            branch = self.pool(branch) if self.plan.pool_last else branch
            y = y + F.conv2d(branch, weight, padding=self.head.padding)
        return y


class Concatenated(Branches):
    def joined(self, branches):
        return F.pad(torch.cat(branches, 1), (0, 0, 0, 0, 0, self.plan.empty))


class Padded(Branches):
    """Sums branches, each padded with channels of zeros."""

    def joined(self, branches):
        before = np.cumsum([0, *self.sizes])
        return sum(
            F.pad(one, (0, 0, 0, 0, start, self.channels - start - size))
            for one, start, size in zip(branches, before.tolist(), self.sizes, strict=False)
        )


class Added(Branches):
    """Sums the first channel of each branch, without weights: they share the weights that read the sum."""

    @property
    def channels(self):
        return 1

    def balance(self):
        pass

    def weights(self):
        return [self.head.weight] * len(self.sizes)

    def branches(self, x):
        return [one[:, :1] for one in super().branches(x)]

    def joined(self, branches):
        return sum(branches)


class Apart(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module.apart(x)


@st.composite
def plans(draw):
    branches = []
    for number in range(draw(st.integers(2, 3))):
        states = ["plain", "large", "tiny"] if number == 0 else ["plain", "large", "tiny", "dead", "asleep"]
        state = draw(st.sampled_from(states))
        activation = draw(st.sampled_from(sorted(ACTIVATIONS)))
        branches.append(
            Branch(
                channels=draw(st.integers(1, 3)),
                kernel=draw(st.sampled_from([1, 3])),
                activation="relu" if state in ("dead", "asleep") else activation,
                state=state,
            )
        )
    pool = draw(st.sampled_from(sorted(POOLS)))
    return Plan(
        seed=draw(st.integers(0, 2**32 - 1)),
        branches=tuple(branches),
        pool=pool,
        # The maximum of a sum is not the sum of maxima.
        pool_last=pool == "average" and draw(st.booleans()),
        kernel=draw(st.sampled_from([1, 3])),
        empty=draw(st.integers(0, 2)),
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


def errors(join, plan, kind):
    """Return the errors of the joined branches and of those apart, on images in the calibrated range."""
    images = calibration(kind, plan.seed)
    low = 0.0 if kind == "constant" else images.min()
    others = np.random.default_rng(plan.seed + 1).uniform(low, images.max(), (60, *images.shape[1:]))
    module = join(plan, images)
    return error(module, images, others), error(Apart(module), images, others)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CALIBRATIONS)
@pytest.mark.parametrize("join", [Concatenated, Padded, Added])
@settings(max_examples=3)  # torch takes most of a second to export each
@given(plan=plans())
def test_joined_branches_are_right_where_branches_apart_are(join, kind, plan):
    joined, apart = errors(join, plan, kind)
    assert joined <= LIMIT or apart > LIMIT, (joined, apart)
