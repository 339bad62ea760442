"""Random small modules of linear operators and activations, compared with torch exactly."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tests.support.captured import Fn, check


@dataclass
class Build:
    """A module on its way: what draws its options, the shape of an image, and the constants it holds."""

    draw: Callable[[Any], Any]
    shape: tuple[int, ...]
    parts: nn.ModuleList

    def pick(self, *options):
        """One of some options."""
        return self.draw(st.sampled_from(options))

    def number(self, low, high):
        """A whole number, both ends included."""
        return self.draw(st.integers(low, high))

    def held(self, *shape):
        """A constant of some shape, that the module holds."""
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(len(self.parts)))
        self.parts.append(nn.ParameterList([nn.Parameter(values)]))
        number = len(self.parts) - 1
        return lambda m: m.parts[number][0]

    def layer(self, layer):
        """A layer that the module holds."""
        self.parts.append(layer)
        number = len(self.parts) - 1
        return lambda m, x: m.parts[number](x)


# Each takes a build whose shape is (C, H, W), and returns a function of the module and a batch (N, C, H, W).


def convolution(b):
    c = b.shape[0]
    groups = b.pick(1, c)
    options = {
        "stride": b.pick(1, 1, 2),
        "padding": b.pick(0, 1, 2),
        "dilation": b.pick(1, 1, 2),
        "groups": groups,
        "bias": b.pick(True, False),
        "padding_mode": b.pick("zeros", "zeros", "circular", "replicate"),
    }
    return b.layer(nn.Conv2d(c, groups * b.pick(1, 2), b.pick(1, 2, 3), **options))


def transposed(b):
    return b.layer(
        nn.ConvTranspose2d(b.shape[0], 2, b.pick(1, 2, 3), stride=b.pick(1, 2), padding=b.pick(0, 1))
    )


def normalized(b):
    layer = b.pick(nn.BatchNorm2d, nn.InstanceNorm2d)(b.shape[0], track_running_stats=True)
    return b.layer(layer)


def average(b):
    size = b.pick(2, 3)
    return b.layer(nn.AvgPool2d(size, b.pick(1, 2), b.pick(0, 1), b.pick(True, False), b.pick(True, False)))


def adaptive(b):
    return b.layer(nn.AdaptiveAvgPool2d((b.number(1, 4), b.number(1, 4))))


def resized(b):
    mode, antialias = b.pick(
        ("bilinear", False), ("bilinear", True), ("bicubic", True), ("nearest", False), ("area", False)
    )
    # Torch's antialiased images of width 1 are wrong, and not what its own derivative says: capture refuses.
    size = (b.number(1, 7), b.number(2 if antialias else 1, 7))
    return lambda m, x: F.interpolate(x, size, mode=mode, antialias=antialias)


def unfolded(b):
    size, padding = b.pick(1, 2), b.pick(0, 1)
    h, w = b.shape[1:]
    return lambda m, x: F.fold(F.unfold(x, size, padding=padding), (h, w), size, padding=padding)


def channels_in_the_batch(b):
    layer = b.layer(nn.Conv2d(1, b.pick(1, 2), b.pick(1, 3), padding=1))

    def function(m, x):
        n, c, h, w = x.shape
        y = layer(m, x.reshape(n * c, 1, h, w))
        return y.reshape(n, -1, *y.shape[2:])

    return function


def rows_in_the_batch(b):
    layer = b.layer(nn.Linear(b.shape[2], b.number(1, 4)))
    return lambda m, x: layer(m, x.flatten(0, 2)).unflatten(0, x.shape[:3])


def product(b):
    w = b.held(b.shape[2], b.number(1, 4))
    kind = b.pick("matmul", "tensordot", "einsum")
    if kind == "matmul":
        return lambda m, x: x @ w(m)
    if kind == "tensordot":
        return lambda m, x: torch.tensordot(x, w(m), 1)
    return lambda m, x: torch.einsum("nchw,wv->ncvh", x, w(m))


def blended(b):
    w, other = b.held(*b.shape), b.held(b.shape[2])
    kind = b.pick(
        lambda m, x: torch.lerp(x, w(m), 0.3),
        lambda m, x: torch.lerp(w(m).expand_as(x), x, other(m)),
        lambda m, x: torch.addcmul(w(m), x, other(m), value=0.5),
        lambda m, x: torch.addcdiv(x, w(m), other(m)),
        lambda m, x: torch.add(x, w(m), alpha=2),
        lambda m, x: x * w(m) - other(m),
    )
    return kind


def differences(b):
    dim = b.pick(1, 2, 3)
    return b.pick(
        lambda m, x: torch.diff(x, dim=dim, prepend=x.narrow(dim, 0, 1)),
        lambda m, x: x.cumsum(dim),
        lambda m, x: x - x.mean(dim, keepdim=True),
        lambda m, x: x + x.flip(dim),
        lambda m, x: x.roll(1, dim) - x,
        lambda m, x: torch.cat([x, 2 * x], dim),
    )


def written(b):
    value, c, h = b.pick(0.0, 1.5), b.number(0, b.shape[0] - 1), b.number(0, b.shape[1] - 1)
    w = b.held(b.shape[2])

    def function(m, x):
        y = x.clone()
        y[:, c] = value
        y[:, :, h] = w(m)
        y[:, :, :, ::2] += x[:, :, :, :1]
        return y

    return function


def spectrum(b):
    h, w = b.shape[1:]
    filter_ = b.held(b.shape[0], h, w // 2 + 1)
    return lambda m, x: torch.fft.irfft2(torch.fft.rfft2(x) * filter_(m), s=(h, w))


def activation(b):
    return b.pick(
        lambda m, x: F.relu(x),
        lambda m, x: torch.sigmoid(x),
        lambda m, x: x.abs(),
        lambda m, x: F.max_pool2d(x, 2, 1, 1),
    )


STEPS = [
    convolution, convolution, transposed, normalized, average, adaptive, resized, unfolded,
    channels_in_the_batch, rows_in_the_batch, product, blended, differences, written, spectrum, activation,
]  # fmt: skip


def run(functions, m, x):
    for function in functions:
        x = function(m, x)
    return x


@st.composite
def modules(draw, longest=4, elements=200):
    """Modules of a few operators, each of which torch accepts after those before, and an image's shape."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(2, 6)), draw(st.integers(2, 6)))
    build = Build(draw, shape, nn.ModuleList())
    functions = []
    for _ in range(draw(st.integers(1, longest))):
        step = draw(st.sampled_from(STEPS))(build)
        held = Fn(None, parts=build.parts).eval()
        try:
            with torch.no_grad():
                made = step(held, torch.zeros(2, *build.shape))
        except RuntimeError:  # a window larger than the image
            continue
        if made.numel() and math.prod(made.shape[1:]) <= elements:
            functions.append(step)
            build.shape = tuple(made.shape[1:])
    residual = draw(st.booleans()) and build.shape == shape
    last = functions if not residual else [lambda m, x: x - run(functions, m, x)]
    return Fn(lambda m, x: run(last, m, x), parts=build.parts), shape


@pytest.mark.filterwarnings("ignore")
@given(modules())
def test_random_modules_give_what_torch_does(made):
    module, shape = made
    check(module, shape)
