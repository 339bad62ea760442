"""Ways in which models are written that torch.export stops at, or that hide what they do."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fheconv import UnsupportedLayerError
from fheconv.capture.model import capture
from tests.support.captured import Fn, check


def test_models_made_for_inference():
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1))
        model[3].weight = nn.Parameter(torch.randn(2, 2, 1, 1))
        tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4)).double()
        tied[2].weight = tied[0].weight
        model = model.double().eval()
    before = [*model.parameters(), *model.buffers()]
    network = capture(model, (1, 5, 5))
    x = torch.randn(3, 1, 5, 5, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(network(x.numpy())), model(x).clone())
    assert all(a is b for a, b in zip(before, [*model.parameters(), *model.buffers()], strict=True))
    assert len(capture(tied, (4,)).layers) == 2


def test_capture_under_inference_mode():
    with torch.inference_mode():
        capture(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Upsample(scale_factor=2, mode="bilinear")), (1, 5, 5))


def under_inference(m, x):
    with torch.inference_mode():
        return F.relu(m.a(x))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.relu(m.a(x).data),
        lambda m, x: F.conv2d(x.data, m.a.weight.data, m.a.bias.data),
        lambda m, x: m.a(x) * m.a.weight.data.mean(),
        under_inference,
    ],
)
def test_data_and_inference_in_forward(function):
    check(Fn(function, a=nn.Conv2d(1, 2, 3)), (1, 5, 5))


@pytest.mark.parametrize("kind", [F.dropout, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout])
@pytest.mark.sampled(3)
def test_dropout_as_a_function(kind):
    model = Fn(lambda m, x: kind(F.relu(m.a(x)), 0.5, m.training), a=nn.Conv2d(1, 2, 3))
    check(model, (1, 5, 5))
    model.train()
    capture(model, (1, 5, 5))  # in evaluation mode
    assert model.training
    for options in ({"training": True}, {"training": True, "inplace": True}):
        always = Fn(lambda m, x, o=options: kind(m.a(x), 0.5, **o), a=nn.Conv2d(1, 2, 3))
        with pytest.raises(UnsupportedLayerError, match=r"draws at random.*training=self\.training"):
            capture(always, (1, 5, 5))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x + torch.rand(2, 3, 3),
        lambda m, x: x + torch.rand_like(x),
        lambda m, x: x * torch.bernoulli(torch.full((3,), 0.5)),
        lambda m, x: x + torch.randn(3) * 0.1,
        lambda m, x: x[:, torch.randperm(2)],
        lambda m, x: torch.normal(x, 1.0),
        lambda m, x: x + F.dropout(torch.ones(3), 0.5, True),
    ],
)
def test_what_draws_at_random(function):
    with pytest.raises(UnsupportedLayerError, match="draws at random"):
        capture(Fn(function), (2, 3, 3))


def test_dropout_of_constants_that_drops_nothing():
    check(Fn(lambda m, x: x * F.dropout(m.w, 0.5, m.training), w=nn.Parameter(torch.randn(3))), (2, 3))
