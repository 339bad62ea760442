"""What is in a graph for gradients alone leaves no lookups behind."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import fheconv

IMAGES = np.random.default_rng(0).uniform(-1, 2, (12, 1, 6, 6)).astype(np.float32)


def scaled(x, q):
    """As for learned step sizes (Esser et al. 2020)."""
    smaller = x * 0.1
    return (q - smaller).detach() + smaller


ESTIMATORS = {
    "x + (q - x)": lambda x, q: x + (q - x).detach(),
    "(q - x) + x": lambda x, q: (q - x).detach() + x,
    "x - (x - q)": lambda x, q: x - (x - q).detach(),
    "q + x - x": lambda x, q: q.detach() + x - x.detach(),
    "scaled gradients": scaled,
}


class Estimated(nn.Module):
    """Rounds images, weights and activations with a straight-through estimator."""

    def __init__(self, estimator):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c, self.estimator = nn.Conv2d(1, 3, 3), nn.Linear(48, 4), estimator

    def rounded(self, x, scale, low, high):
        steps = torch.clamp(x / scale, low, high)
        return self.estimator(steps, torch.round(steps)) * scale

    def forward(self, x):
        x = functional.conv2d(self.rounded(x, 0.15, -8, 7), self.rounded(self.a.weight, 0.1, -3, 3))
        x = self.rounded(torch.relu(x), 0.1037, 0, 7)
        return functional.linear(x.flatten(1), self.rounded(self.c.weight, 0.05, -3, 3), self.c.bias)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_straight_through_estimators_are_what_they_round_to(estimator):
    model = Estimated(estimator)
    network = fheconv.quantize(model, IMAGES[:1])
    with torch.no_grad():
        expected = model(torch.tensor(IMAGES)).numpy()
    np.testing.assert_allclose(network(IMAGES), expected, atol=1e-5)
    assert [q.maximum for q in network.quantizations] == [15, 7]
    assert len(network.layers) == 2
