"""Channels and frames that a model folds into the batch, and unfolds again."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fheconv import UnsupportedLayerError
from fheconv.capture.model import capture
from tests.support.captured import Fn, check
from tests.support.weighing import weights


def conv(i, o, k=3, **options):
    return nn.Conv2d(i, o, k, **options)


def each_channel(m, x):
    b, c, h, w = x.shape
    y = m.a(x.reshape(b * c, 1, h, w))
    return y.reshape(b, -1, *y.shape[2:])


def a_network_a_channel(m, x):
    b, c, h, w = x.shape
    y = F.relu(m.bn(m.a(x.view(b * c, 1, h, w))))
    y = m.b(F.max_pool2d(y, 2))
    return m.linear(y.reshape(b, c * y[0].numel()))


def frames(m, x):
    b, t = x.shape[:2]
    y = F.relu(m.a(x.flatten(0, 1))).mean((2, 3))
    return m.linear(y).reshape(b, t, -1).mean(1)


def averaged_frames(m, x):
    y = F.avg_pool2d(F.relu(m.a(x.flatten(0, 1))), 2)
    return y.unflatten(0, x.shape[:2]).sum(1)


def resized(m, x):
    b, c, h, w = x.shape
    return F.interpolate(x.view(b * c, 1, h, w), scale_factor=2, mode="bilinear").view(b, c, 2 * h, 2 * w)


def channels_first(m, x):
    b, c, h, w = x.shape
    y = F.interpolate(x.transpose(0, 1).reshape(c * b, 1, h, w), scale_factor=2, mode="bilinear")
    return y.reshape(c, b, 2 * h, 2 * w).transpose(0, 1)


def rows(m, x):
    b, c, h, w = x.shape
    return F.relu(m.linear(x.reshape(b * c * h, w))).reshape(b, c, h, -1)


def residual(m, x):
    y = x.reshape(-1, 1, *x.shape[2:])
    return F.relu(y + m.a(y) * 0.5).reshape(x.shape)


def prelu(m, x):
    y = F.prelu(m.a(x.reshape(-1, 1, *x.shape[2:])), m.p)
    return y.reshape(len(x), -1)


def offset(m, x):
    y = m.a(x.reshape(-1, 1, *x.shape[2:])) + m.p[:, None, None]
    return y.reshape(len(x), -1)


SLOPES = nn.Parameter(torch.tensor([0.1, 0.5]))


@pytest.mark.parametrize(
    ("function", "parts", "shape"),
    [
        (each_channel, {"a": conv(1, 2, padding=1)}, (3, 6, 6)),
        (each_channel, {"a": conv(1, 4, dilation=2, padding=2, stride=2)}, (3, 6, 6)),
        (each_channel, {"a": nn.ConvTranspose2d(1, 2, 2, stride=2)}, (4, 3, 3)),
        (each_channel, {"a": nn.Sequential(conv(1, 2), nn.Sigmoid(), nn.AvgPool2d(2))}, (3, 6, 6)),
        (a_network_a_channel,
         {"a": conv(1, 2, padding=1), "bn": nn.BatchNorm2d(2), "b": conv(2, 3), "linear": nn.Linear(9, 2)},
         (3, 6, 6)),
        (frames, {"a": conv(2, 3, padding=1), "linear": nn.Linear(3, 4)}, (3, 2, 5, 5)),
        (averaged_frames, {"a": conv(2, 3, padding=1)}, (3, 2, 5, 5)),
        # One weight, and one bias, is still one for each of the folded channels.
        (each_channel, {"a": conv(1, 1, 1)}, (3, 4, 4)),
        (each_channel, {"a": nn.ConvTranspose2d(1, 1, 1)}, (3, 4, 4)),
        (each_channel, {"a": nn.Sequential(conv(1, 1), nn.BatchNorm2d(1), nn.PReLU())}, (3, 4, 4)),
        (resized, {}, (3, 4, 4)),
        (channels_first, {}, (3, 4, 4)),
        (rows, {"linear": nn.Linear(4, 3)}, (3, 4, 4)),
        (residual, {"a": conv(1, 1, padding=1)}, (3, 4, 4)),
        (prelu, {"a": conv(1, 2), "p": SLOPES}, (3, 4, 4)),
        (offset, {"a": conv(1, 2), "p": SLOPES}, (3, 4, 4)),
    ],
)  # fmt: skip
@pytest.mark.sampled(3)
def test_folded_and_unfolded(function, parts, shape):
    check(Fn(function, **parts), shape)


def test_a_folded_convolution_is_one_of_groups():
    assert weights(check(Fn(each_channel, a=conv(1, 2, padding=1)), (3, 8, 8))) == 3 * 2 * 9


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.reshape(-1, 1, 4, 4).flip(0).reshape(x.shape),
        lambda m, x: (x.reshape(-1, 16) - x.reshape(-1, 16).mean(0)).reshape(x.shape),
        lambda m, x: x.reshape(-1, 16).roll(1, 0).reshape(x.shape),
        lambda m, x: x.reshape(-1, 16).cumsum(0).reshape(x.shape),
        lambda m, x: x.reshape(-1, 16).sort(1)[0].reshape(x.shape),
        lambda m, x: (x.reshape(-1, 16) * x.reshape(-1, 16).sum(1, keepdim=True)).reshape(x.shape),
        lambda m, x: F.softmax(x.reshape(-1, 16), 1).reshape(x.shape),
        lambda m, x: ((x.reshape(-1, 16) > 0) + (x.reshape(-1, 16) > 1)[:, :1]).reshape(x.shape),
        lambda m, x: x.transpose(0, 1).reshape(-1, 16).reshape(len(x), -1),
        lambda m, x: x.reshape(-1, 16),
        lambda m, x: F.relu(x.reshape(-1, 16)),
    ],
)
def test_what_mixes_images_or_bends_is_refused(function):
    with pytest.raises(UnsupportedLayerError):
        capture(Fn(function), (3, 4, 4))
