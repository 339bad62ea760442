"""Branches of a network do not cost each other accuracy, whatever their ranges, and whether they are live."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fheconv

IMAGES = np.random.default_rng(0).uniform(0, 1, (60, 1, 6, 6))
OTHERS = np.random.default_rng(1).uniform(0, 1, (60, 1, 6, 6)).clip(IMAGES.min(), IMAGES.max())
WIDTHS = {"weight_bits": 6, "activation_bits": 6, "input_bits": 5}


class Branches(nn.Module):
    """Reads two branches side by side; their values differ by `ratio`, their shares of the result do not."""

    def __init__(self, ratio, kernel):
        super().__init__()
        torch.manual_seed(3)
        self.ratio = ratio
        self.a, self.b = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(1, 2, 3, padding=1)
        self.c = nn.Conv2d(5, 2, kernel)
        with torch.no_grad():
            self.c.weight[:, :3] /= ratio

    def branches(self, x):
        return self.ratio * F.relu(self.a(x)), F.relu(self.b(x))


class Concatenated(Branches):
    def forward(self, x):
        return self.c(torch.cat(self.branches(x), 1))


class Padded(Branches):
    """Adds the branches up, after each is padded with channels of zeros."""

    def forward(self, x):
        a, b = self.branches(x)
        return self.c(F.pad(a, (0, 0, 0, 0, 0, 2)) + F.pad(b, (0, 0, 0, 0, 3, 0)))


class Summed(Branches):
    """Computes the same with a convolution for each branch."""

    def forward(self, x):
        a, b = self.branches(x)
        weight = self.c.weight
        return F.conv2d(a, weight[:, :3], self.c.bias) + F.conv2d(b, weight[:, 3:])


class Flattened(Branches):
    def forward(self, x):
        return F.linear(torch.cat([branch.flatten(1) for branch in self.branches(x)], 1), self.rows)

    @property
    def rows(self):
        weight = self.c.weight.mean((2, 3))
        return weight.repeat_interleave(36, dim=1)


class FlattenedSummed(Flattened):
    def forward(self, x):
        a, b = self.branches(x)
        return F.linear(a.flatten(1), self.rows[:, :108]) + F.linear(b.flatten(1), self.rows[:, 108:])


def error(module, **options):
    """Return the error on other images than calibration's, as a share of the outputs' standard deviation."""
    network = fheconv.quantize(module, IMAGES, fheconv.QuantConfig(**WIDTHS, **options))
    expected = module(torch.tensor(OTHERS, dtype=torch.float32)).detach().numpy()
    return np.sqrt(np.mean((network(OTHERS) - expected) ** 2)) / expected.std()


@pytest.mark.sampled(41)
@pytest.mark.parametrize("method", ["auto", "mse", "minmax", "gptq"])
@pytest.mark.parametrize("ratio", [1, 10, 100, 1e4, 1e-4])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("joined", [Concatenated, Padded])
def test_branches_side_by_side_are_as_accurate_as_summed_ones(joined, kernel, ratio, method):
    expected = error(Summed(ratio, kernel), method=method)
    assert error(joined(ratio, kernel), method=method) == pytest.approx(expected, rel=1e-3)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("ratio", [10, 1e4])
def test_so_are_branches_before_a_linear_layer(ratio):
    assert error(Flattened(ratio, 1)) == pytest.approx(error(FlattenedSummed(ratio, 1)), rel=1e-3)


class Dead(Branches):
    """Has a branch that is 0 on all calibration images, and by far."""

    def __init__(self, kernel):
        super().__init__(1, kernel)
        with torch.no_grad():
            self.b.bias[:] = -20.0


class DeadConcatenated(Dead, Concatenated):
    pass


class DeadSummed(Dead, Summed):
    pass


class DeadPooled(Dead):
    def forward(self, x):
        return self.c(torch.cat([F.max_pool2d(branch, 2) for branch in self.branches(x)], 1))


@pytest.mark.sampled(13)
@pytest.mark.parametrize("method", ["auto", "mse", "minmax", "gptq"])
@pytest.mark.parametrize("module", [DeadConcatenated, DeadSummed, DeadPooled])
def test_a_branch_of_zeros_does_not_swamp_the_live_one(module, method):
    dead = module(1)
    alone = module(1)
    with torch.no_grad():
        alone.c.weight[:, 3:] = 0
    assert error(dead, method=method) <= 1.5 * error(alone, method=method) + 0.01 < 0.06


def test_a_branch_that_wakes_up_is_seen():
    """Just below 0 on the calibration images, it is above on others."""
    module = Concatenated(1, 1)
    with torch.no_grad():
        module.b.weight *= 10
        sums = module.b(torch.tensor(IMAGES, dtype=torch.float32))
        module.b.bias -= sums.amax((0, 2, 3)) + 0.001
    network = fheconv.quantize(module, IMAGES, fheconv.QuantConfig(**WIDTHS))
    rng = np.random.default_rng(2)
    extreme = rng.choice([IMAGES.min(), IMAGES.max()], (60, 1, 6, 6))
    expected = module(torch.tensor(extreme, dtype=torch.float32)).detach().numpy()
    without = Concatenated(1, 1)
    without.load_state_dict(module.state_dict())
    with torch.no_grad():
        without.c.weight[:, 3:] = 0
        ignored = without(torch.tensor(extreme, dtype=torch.float32)).numpy()
    # Not all of it: its scale is at most that of the live branch, so great values saturate.
    assert np.mean((network(extreme) - expected) ** 2) < 0.8 * np.mean((ignored - expected) ** 2)


class PooledSum(Branches):
    """Adds two branches without weights, after maxima of maxima: they share a scale."""

    def forward(self, x):
        a, b = self.branches(x)
        return self.c(F.relu(F.max_pool2d(a, 2)[:, :2] + F.max_pool2d(b, 2)).repeat(1, 3, 1, 1)[:, :5])


@pytest.mark.parametrize("ratio", [1, 3, 0.2])
def test_maxima_of_maxima_have_the_scale_of_what_they_are_taken_of(ratio):
    assert error(PooledSum(ratio, 1)) < 0.1


class Zero(nn.Module):
    """A model with a branch whose BatchNorm multiplies by 0, as residual networks begin their training."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn, self.c = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)
        nn.init.zeros_(self.bn.weight)

    def forward(self, x):
        y = torch.relu(self.a(x))
        branch = self.bn(self.b(y))
        return self.c(self.how(y, branch))


@pytest.mark.parametrize(
    "how",
    [
        lambda y, branch: torch.relu(branch + y),
        lambda y, branch: torch.relu(y + branch),
        lambda y, branch: torch.relu(branch) + y,
        lambda y, branch: torch.add(y, branch, alpha=0),
        lambda y, branch: torch.relu(y) * 0 + branch,
    ],
)
def test_a_branch_that_is_multiplied_by_zero_is_a_constant(how):
    torch.manual_seed(0)
    model, images = Zero(how).eval(), torch.rand(20, 1, 6, 6)
    network = fheconv.quantize(model, images)
    expected = model(images).detach().numpy()
    assert np.abs(network(images) - expected).max() <= 0.2 * np.abs(expected).max()
