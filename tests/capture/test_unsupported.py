"""What cannot be compiled is refused by the name of the layer, the operator, and what is nearest to it."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fheconv import CalibrationError, InvalidArgumentError, UnsupportedLayerError
from fheconv.capture.model import capture
from tests.support.captured import Fn, check, conv

torch.set_num_threads(1)


def refused(model, shape=(2, 4, 4)):
    with pytest.raises(UnsupportedLayerError) as error:
        capture(model, shape)
    return str(error.value)


def inside(layer):
    """A model in which a layer stands as features.3."""
    features = nn.Sequential(conv(2, 2), nn.ReLU(), nn.Identity(), layer)
    return Fn(lambda m, x: m.features(x), features=features)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(4, 3, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("layer", "operator", "near"),
    [
        (nn.LayerNorm((2, 4, 4)), "layer_norm", "BatchNorm"),
        (nn.GroupNorm(1, 2), "group_norm", "BatchNorm"),
        (nn.InstanceNorm2d(2), "instance_norm", "BatchNorm"),
        (nn.BatchNorm2d(2, track_running_stats=False), "batch_norm", "running statistics"),
        (nn.RMSNorm(4), "rms_norm", "BatchNorm"),
        (nn.MaxPool2d(2, return_indices=True), "", "indices"),
        (nn.Bilinear(1, 1, 1), "", "missing"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_layers_are_named_as_in_the_users_model(layer, operator, near):
    message = refused(inside(layer))
    assert operator in message
    assert near in message
    if near != "missing":
        assert "features.3" in message
        assert type(layer).__name__ in message


def test_attention_and_recurrence():
    message = refused(nn.Sequential(nn.Flatten(2), nn.Linear(16, 4), Attention()))
    assert "'2.attention'" in message
    assert "MultiheadAttention" in message
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        message = refused(nn.Sequential(nn.Flatten(2), nn.Linear(16, 4), nn.ReLU(), Recurrent(kind)))
        assert "'3.rnn'" in message
        assert "Conv1d" in message


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda m, x: m.a(x) ** m.b(x), "'pow'.*two encrypted values"),
        (lambda m, x: torch.where(m.a(x) > 0, m.b(x), 0.0), "two encrypted values.*products"),
        (lambda m, x: m.a(x) @ m.b(x), "'matmul'.*sums of products of elements"),
        (lambda m, x: torch.bmm(m.a(x)[:, 0], m.b(x)[:, 0]), "sums of products of elements"),
        (lambda m, x: F.conv2d(x, x[:1]), "batch"),
        (lambda m, x: torch.matmul(x, x), "'matmul'"),
        (lambda m, x: F.conv2d(x, m.a.weight, m.a(x).mean((0, 2, 3))), "batch"),
        (lambda m, x: x.mean(0), "batch"),
        (lambda m, x: x.mean(0, keepdim=True).expand(2, -1, -1, -1), "batch"),
        (lambda m, x: x - x.mean(), "batch"),
        (lambda m, x: x.sum(dim=[]), "batch"),
        (lambda m, x: x.flip(0), "'flip'.*batch"),
        (lambda m, x: x.roll(1, 0), "batch"),
        (lambda m, x: x.roll(1), "batch"),
        (lambda m, x: x.transpose(0, 1), "batch"),
        (lambda m, x: x.reshape(1, -1), "batch"),
        (lambda m, x: x.reshape(4, -1), "batch"),
        (lambda m, x: x.transpose(0, 1).reshape(2, -1), "batch"),
        (lambda m, x: torch.cat([x, x], 0), "batch"),
        (lambda m, x: torch.stack([x, x]), "batch"),
        (lambda m, x: x.unbind(0)[0], "batch"),
        (lambda m, x: x.chunk(2)[1], "batch"),
        (lambda m, x: x[0], "batch"),
        (lambda m, x: x[::2], "batch"),
        (lambda m, x: F.softmax(x, 0), "batch"),
        (lambda m, x: x.argmax(0), "batch"),
        (lambda m, x: x.argmax(), "batch"),
        (lambda m, x: x.amax(), "batch"),
        (lambda m, x: x.max(), ""),
        (lambda m, x: x.amax(0, keepdim=True) + x, "batch"),
        (lambda m, x: x + torch.arange(2.0).view(2, 1, 1, 1), "images of a batch"),
        (lambda m, x: x + torch.rand_like(x), "rand_like|random"),
        (lambda m, x: x[:, 0] + x, "batch"),
        (lambda m, x: m.b(F.softmax(m.a(x), 1)), "softmax before it can only be the last"),
        (lambda m, x: F.softmax(x, 1).log(), "softmax before it"),
        (lambda m, x: x.argmax(1).float() * 2, "argmax before it"),
        (lambda m, x: x.sort(1)[0], "'sort'.*decryption"),
        (lambda m, x: x.topk(1, 1)[0], "'topk'.*decryption"),
        (lambda m, x: x.max(1)[1], "indices"),
        (lambda m, x: F.max_pool2d(x, 2, return_indices=True)[1], "indices"),
        (lambda m, x: x.norm(dim=1), "abs or squares"),
        (lambda m, x: x.std((2, 3)), "BatchNorm"),
        (lambda m, x: F.pad(x, (1, 1), value=-float("inf")), "-inf.*MaxPool"),
        (lambda m, x: torch.pow(x, torch.arange(4.0)), "place to place"),
        (lambda m, x: 1j * x, ""),
        (lambda m, x: (9 * x).to(torch.uint8), "uint8.*int32"),
        (lambda m, x: (x > 0) + (x > 1), "truth values"),
        (lambda m, x: x[:, :0], "no elements"),
        (lambda m, x: x.round(decimals=2), "not supported"),
        (lambda m, x: F.dropout(x, training=True), ""),
        (lambda m, x: x if x.sum() > 0 else -x, "path depends on the values"),
        (lambda m, x: x * x.max().item(), ""),
        (lambda m, x: x[x > 0], ""),
        (lambda m, x: x.nonzero(), ""),
        (lambda m, x: (x, x + 1), "2 values"),
        (lambda m, x: {"a": x, "b": m.a(x)}, "2 values"),
        (lambda m, x: None, ""),
        (lambda m, x: 3, ""),
        (lambda m, x: "text", ""),
        (lambda m, x: torch.ones(2, 3), "constant"),
        (lambda m, x: x.detach().numpy(), ""),
        (lambda m, x: 1 / 0, "division by zero"),
        (lambda m, x: m.missing(x), "missing"),
    ],
)
@pytest.mark.sampled(9)
def test_what_has_no_circuit(function, words):
    message = refused(Fn(function, a=conv(2, 2), b=conv(2, 2)))
    assert re.search(words, message), message


def test_inputs():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    class Optional(nn.Module):
        def forward(self, x, y=None):
            return x if y is None else x + y

    assert "needs 'y' besides" in refused(Two())
    check(Optional(), (2, 3))
    assert "cannot be run" in refused(nn.Sequential(conv(3, 2)))
    assert "cannot be run" in refused(nn.Sequential(nn.Embedding(4, 2)))
    assert "channel" in refused(Fn(lambda m, x: m.a(x), a=nn.Conv2d(2, 2, 1)), (4, 4))


def test_lazy_modules_and_what_is_no_module():
    assert "without weights yet" in refused(nn.Sequential(nn.LazyConv2d(2, 3), nn.ReLU()))
    assert "without weights yet" in refused(nn.LazyConv2d(2, 3))
    assert "without weights yet" in refused(nn.Sequential(nn.LazyBatchNorm2d(affine=False)))
    assert "SGD" in refused(torch.optim.SGD(conv(1, 1).parameters()))
    with pytest.raises(InvalidArgumentError):
        capture("model", (1, 2, 2))
    with pytest.raises(InvalidArgumentError):
        capture(nn.Conv2d(1, 1, 3), (2, 5, 5))


def test_weights_that_are_not_finite():
    model = nn.Sequential(conv(1, 2), nn.ReLU())
    model[0].weight.data[0, 0, 0, 0] = np.nan
    with pytest.raises(CalibrationError, match="weight of layer '0'"):
        capture(model, (1, 4, 4))
    model = nn.Sequential(conv(1, 2), nn.ReLU(), conv(2, 2))
    model[2].bias.data[0] = np.inf
    with pytest.raises(CalibrationError, match="bias of layer '2'"):
        capture(model, (1, 4, 4))
    with pytest.raises(CalibrationError):
        capture(Fn(lambda m, x: x / 0), (1, 4, 4))
    with pytest.raises(CalibrationError):
        capture(Fn(lambda m, x: x * torch.tensor(float("nan"))), (1, 4, 4))


def test_a_refused_model_keeps_its_mode():
    model = nn.Sequential(conv(2, 2), nn.Sequential(nn.LayerNorm(4)))
    refused(model)
    assert all(part.training for part in model.modules())
