"""The captured network computes what torch does, with no more lookups than the model has activations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fheconv.capture.model import capture
from fheconv.networks.floats import Layer
from tests.support.captured import Fn, check, conv, trained

torch.set_num_threads(1)


# Styles.


def test_a_sequential_model():
    model = nn.Sequential(
        conv(1, 4), nn.ReLU(), nn.MaxPool2d(2), conv(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)
    )
    network = check(model, (1, 8, 8), lookups=4 * 64 + 6 * 16)
    assert [layer.name for layer in network.layers] == ["0", "2.0", "2.1", "3", "6"]
    assert network.finish is None


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, channels), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv(channels, channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


def test_a_resnet():
    model = nn.Sequential(
        conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), Block(4), Block(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 10),
    )  # fmt: skip
    network = check(model, (3, 6, 6), lookups=5 * 4 * 36)
    assert [layer.name for layer in network.layers] == [
        "0", "3.conv1", "3.conv2", "4.conv1", "4.conv2", "7"
    ]  # fmt: skip


def test_functional_style_and_in_place():
    def function(m, x):
        y = F.conv2d(x, m.w, stride=2)
        y = F.batch_norm(y, m.mean, m.var)
        y.relu_()
        y += 1
        y[:, 0] *= 2
        z = y.view(len(y), -1)
        z[:, :3].add_(5)
        return F.linear(torch.flatten(y, 1), m.v)

    model = Fn(function, w=nn.Parameter(torch.randn(2, 1, 3, 3)), v=nn.Parameter(torch.randn(3, 18)))
    model.register_buffer("mean", torch.randn(2))
    model.register_buffer("var", torch.rand(2) + 0.5)
    before = model.w.detach().clone()
    check(model, (1, 7, 7), lookups=18)
    torch.testing.assert_close(model.w.detach(), before.double())


def test_buffers_that_the_model_changes_are_no_results():
    def function(m, x):
        m.count += 1
        return F.relu(m.c(x)) * 2

    model = Fn(function, c=conv(1, 2))
    model.register_buffer("count", torch.zeros(()))
    network = capture(model.double(), (1, 3, 3))
    assert len(network.layers) == 1


def test_hooks_are_part_of_the_model():
    model = conv(1, 2)
    model.register_forward_hook(lambda module, inputs, output: output.relu())
    check(nn.Sequential(model, conv(2, 1)), (1, 4, 4), lookups=32)
    check(model, (1, 4, 4))
    model.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    check(model, (1, 4, 4))


def test_subclasses_and_parametrizations_compute_what_they_do():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(x, w, self.bias)

    check(Standardized(1, 2, 3), (1, 5, 5))
    check(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 2, 3)), (1, 5, 5))
    check(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 2, 3)), nn.ReLU()), (1, 5, 5))


def test_gradient_modes_inside_forward_are_no_matter():
    def function(m, x):
        with torch.no_grad():
            x = m.c(x)
        with torch.enable_grad():
            return F.relu(x) + 1

    check(Fn(function, c=conv(1, 2)), (1, 4, 4))


def test_a_layer_used_twice_has_two_names():
    shared = conv(2, 2)
    network = check(nn.Sequential(shared, nn.ReLU(), shared), (2, 4, 4), lookups=32)
    assert [layer.name for layer in network.layers] == ["0", "2"]
    looped = check(Fn(lambda m, x: m.c(F.relu(m.c(x))), c=conv(2, 2)), (2, 4, 4), lookups=32)
    assert [layer.name for layer in looped.layers] == ["c", "c_1"]


# Layers with weights.

CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9)),
    (nn.Conv1d(2, 3, 3, padding=2, dilation=2, padding_mode="circular"), (2, 9)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2), (4, 9, 7)),
    (nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 5, 5)),
    (nn.Conv2d(2, 3, (3, 5), padding="same"), (2, 6, 5)),
    (nn.Conv2d(2, 3, 3, padding="same", dilation=2), (2, 6, 5)),
    (nn.Conv2d(2, 3, 3, padding="valid"), (2, 6, 5)),
    (nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), (2, 6, 5)),
    (nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="replicate", stride=2), (2, 6, 5)),
    (nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), (2, 6, 5)),
    (nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1), groups=2), (2, 3, 4, 5)),
    (nn.ConvTranspose1d(4, 2, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 5)),
    (nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(0, 1)), (2, 3, 4)),
    (nn.ConvTranspose2d(4, 6, 3, dilation=2, groups=2, bias=False), (4, 3, 4)),
    (nn.ConvTranspose3d(1, 2, 2, stride=2), (1, 2, 3, 2)),
]


@pytest.mark.parametrize(("module", "shape"), CONVOLUTIONS, ids=lambda v: str(v)[:60])
@pytest.mark.sampled(2)
def test_every_kind_of_convolution(module, shape):
    check(module, shape, lookups=0, layers=1)
    network = check(nn.Sequential(nn.ReLU(), module, nn.Tanh()), shape, lookups=math.prod(shape), layers=2)
    assert str(network.finish.activation) == "tanh(x)"


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_same_padding_with_an_even_kernel():
    check(nn.Sequential(nn.Conv2d(1, 1, (2, 4), padding="same"), nn.ReLU()), (1, 5, 6))


def test_linear_layers():
    check(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)), (6,), lookups=4)
    check(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), (5, 6), lookups=20)
    check(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), (2, 3, 6), lookups=24)
    matrix = nn.Parameter(torch.randn(4, 3))
    check(Fn(lambda m, x: x @ m.w, w=matrix), (4,))
    check(Fn(lambda m, x: F.relu(x) @ m.w, w=matrix), (5, 4))
    check(Fn(lambda m, x: m.w @ F.relu(x), w=matrix), (3, 5))
    check(Fn(lambda m, x: torch.addmm(torch.ones(3).double(), x, m.w, beta=2, alpha=3), w=matrix), (4,))


def test_linear_layers_in_a_row_become_one():
    check(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), (6,), lookups=0, layers=1)
    check(nn.Sequential(conv(2, 8, 1), conv(8, 3), conv(3, 2, 1)), (2, 5, 5), lookups=0, layers=1)
    check(nn.Sequential(conv(2, 3), conv(3, 2)), (2, 5, 5), lookups=0, layers=1)
    check(nn.Sequential(conv(2, 3), nn.Flatten(), nn.Linear(75, 2)), (2, 5, 5), lookups=0, layers=1)
    check(nn.Sequential(conv(2, 4, groups=2), conv(4, 4, 1, groups=2)), (2, 5, 5), lookups=0, layers=1)


# BatchNorm.


@pytest.mark.sampled(5)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_batch_norm_costs_nothing(axes, affine):
    shape = (2, *range(3, 3 + axes))
    size = 3 * math.prod(shape[1:])
    make, norm = (
        getattr(nn, f"Conv{axes}d"),
        lambda c: getattr(nn, f"BatchNorm{axes}d")(c, affine=affine, eps=0.1),
    )
    options = {"kernel_size": 3, "padding": 1}
    check(
        nn.Sequential(
            norm(2), make(2, 3, **options), norm(3), nn.ReLU(), norm(3), make(3, 2, **options), norm(2)
        ),
        shape,
        lookups=size,
        layers=2,
    )


def test_batch_norm_of_features():
    check(
        nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 2)),
        (4,),
        3,
    )
    check(
        nn.Sequential(conv(1, 3), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(27), nn.Linear(27, 2)),
        (1, 3, 3),
        27,
    )


def test_batch_norm_after_an_activation_with_two_readers():
    def function(m, x):
        y = F.relu(m.a(x))
        return m.b(m.n(y)) + m.c(y)

    parts = {"a": conv(1, 3), "b": conv(3, 2), "c": conv(3, 2), "n": nn.BatchNorm2d(3)}
    check(Fn(function, **parts), (1, 4, 4), lookups=48, layers=2)

    def with_dropout(m, x):
        y = m.d(F.relu(m.a(x)))
        return m.b(m.n(y)) + m.c(y)

    check(Fn(with_dropout, d=nn.Dropout(), **parts), (1, 4, 4), lookups=48, layers=2)


def test_batch_norm_after_pooling_and_activation():
    model = nn.Sequential(conv(1, 3), nn.ReLU(), nn.AvgPool2d(2), nn.BatchNorm2d(3), conv(3, 2))
    check(model, (1, 4, 4), lookups=48, layers=2)
    model = nn.Sequential(conv(1, 3), nn.AvgPool2d(2), nn.BatchNorm2d(3), nn.ReLU(), conv(3, 2))
    check(model, (1, 4, 4), lookups=12, layers=2)


# What costs nothing.

FREE = [
    nn.Dropout(),
    nn.Dropout2d(),
    nn.AlphaDropout(),
    nn.FeatureAlphaDropout(),
    nn.Identity(),
    nn.Flatten(),
    nn.Flatten(2),
    nn.Unflatten(1, (2, 2)),
    nn.ChannelShuffle(2),
    nn.PixelShuffle(2),
    nn.PixelUnshuffle(2),
    nn.Upsample(scale_factor=2),
    nn.UpsamplingNearest2d(size=(5, 7)),
    nn.Upsample(scale_factor=2, mode="nearest-exact"),
    nn.ZeroPad2d((1, 2, 0, 1)),
    nn.ConstantPad2d(1, 2.5),
    nn.ConstantPad2d((-1, 1, 0, -1), -1.5),
    nn.ReflectionPad2d((1, 2, 0, 1)),
    nn.ReplicationPad2d((1, 2, 0, 1)),
    nn.CircularPad2d((1, 2, 0, 1)),
    nn.AvgPool2d(2),
    nn.AvgPool2d((2, 3), stride=1, padding=1),
    nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
    nn.AvgPool2d(3, stride=2, ceil_mode=True),
    nn.AvgPool2d(2, stride=2, ceil_mode=True),
    nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
    nn.AvgPool2d(2, divisor_override=3),
    nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, divisor_override=3),
    nn.AdaptiveAvgPool2d(1),
    nn.AdaptiveAvgPool2d((2, 3)),
    nn.AdaptiveAvgPool2d((3, None)),
    nn.AdaptiveAvgPool2d((4, 4)),
    nn.Unfold((2, 3), padding=1),
]
MOVES = {
    "reshape": lambda x: x.reshape(-1, 2, 48),
    "view": lambda x: x.view(x.size(0), -1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, 3),
    "squeeze": lambda x: x.mean(3, keepdim=True).squeeze(-1),
    "unsqueeze": lambda x: x.unsqueeze(2),
    "unflatten": lambda x: x.unflatten(1, (2, -1)),
    "movedim": lambda x: x.movedim(1, -1),
    "channel shuffle by hand": lambda x: x.view(-1, 2, 2, 4, 6).transpose(1, 2).flatten(1, 2),
    "slice": lambda x: x[:, 1:3, ::2, -3:],
    "crop": lambda x: x[..., 1:-1, 1:-1],
    "one channel": lambda x: x[:, 2],
    "channels by number": lambda x: x[:, [3, 0, 0]],
    "chunk": lambda x: x.chunk(2, 1)[1],
    "chunks summed": lambda x: sum(x.chunk(2, 1)),
    "split": lambda x: x.split(3, 1)[1],
    "split by sizes": lambda x: torch.split(x, [1, 2, 1], 1)[1],
    "tensor_split": lambda x: torch.tensor_split(x, 3, 3)[2],
    "unbind": lambda x: x.unbind(2)[3],
    "unbound and stacked": lambda x: torch.stack(x.unbind(1)[::-1], 2),
    "flip": lambda x: x.flip(1, 3),
    "roll": lambda x: x.roll((1, 2), (2, 3)),
    "rot90": lambda x: x.rot90(1, (2, 3)),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "expand": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "tile": lambda x: x.tile(1, 2, 1),
    "contiguous": lambda x: x.permute(0, 2, 1, 3).contiguous(),
    "sliding windows": lambda x: x.unfold(3, 3, 2),
    "upper triangle": lambda x: x.triu(),
    "diagonal": lambda x: x.diagonal(dim1=2, dim2=3),
    "cat of channels": lambda x: torch.cat([x, 2 * x], 1),
    "cat along width": lambda x: torch.cat([x, x[..., :2], x.flip(3)], -1),
    "cat with zeros": lambda x: torch.cat([x, torch.zeros(x.size(0), 1, 4, 6, dtype=x.dtype)], 1),
    "cat with a constant": lambda x: torch.cat([x, torch.full_like(x, 2.5)], 1),
    "pad": lambda x: F.pad(x, (1, 1, 0, 2)),
    "pad with a constant": lambda x: F.pad(x, (1, 1, 0, 2), value=3.0),
    "pad channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
    "mean over space": lambda x: x.mean((2, 3)),
    "mean over height": lambda x: x.mean(2),
    "mean over channels": lambda x: x.mean(1, keepdim=True),
    "mean over all": lambda x: x.mean((1, 2, 3)),
    "mean over channels and width": lambda x: x.mean((-1, 1)),
    "sum over space": lambda x: x.sum((-2, -1), keepdim=True),
    "sum after flatten": lambda x: x.flatten(1).sum(1),
    "residual": lambda x: x + x.flip(2),
    "difference": lambda x: x - 0.5 * x.roll(1, 3),
    "subtracted from": lambda x: 1 - x,
    "torch.add with alpha": lambda x: torch.add(x, x.flip(1), alpha=-2),
    "torch.sub with alpha": lambda x: torch.sub(x, 3, alpha=2),
    "times a number": lambda x: -2.5 * x,
    "divided by a number": lambda x: x / 3,
    "negated": lambda x: -x,
    "times one per channel": lambda x: x * torch.arange(4.0).reshape(4, 1, 1),
    "times one per channel with batch axis": lambda x: x * torch.arange(4.0).reshape(1, 4, 1, 1),
    "times one per column": lambda x: x * torch.arange(6.0),
    "times a full tensor": lambda x: x * torch.arange(96.0).reshape(4, 4, 6),
    "plus a full tensor": lambda x: x + torch.arange(96.0).reshape(1, 4, 4, 6),
    "plus more channels": lambda x: x[:, :1] + torch.arange(4.0).reshape(4, 1, 1),
    "times more channels": lambda x: torch.arange(4.0).reshape(4, 1, 1) * x[:, :1],
    "sum that broadcasts": lambda x: x + x.mean((2, 3), keepdim=True),
    "masked by a constant": lambda x: torch.where(torch.arange(6) > 2, x, 0.0),
    "masked_fill by a constant": lambda x: x.masked_fill(torch.arange(6) > 2, 1.5),
    "other types": lambda x: x.double().to(x).type_as(x),
    "assigned": lambda x: torch.zeros_like(x).copy_(x),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bicubic": lambda x: F.interpolate(x, size=(5, 5), mode="bicubic", align_corners=True),
}
CASES = [(str(module)[:60], module) for module in FREE] + list(MOVES.items())


@pytest.mark.parametrize("move", [move for _, move in CASES], ids=[name for name, _ in CASES])
@pytest.mark.sampled(31)
def test_linear_operators_cost_nothing(move):
    """After an activation, before one, and alone, on an image of 4 channels, 4 × 6."""
    with torch.no_grad():
        out = (
            move.eval()(torch.zeros(2, 4, 4, 6))
            if isinstance(move, nn.Module)
            else move(torch.zeros(2, 4, 4, 6))
        )
    size = math.prod(out.shape[1:])
    check(Fn(lambda m, x: move(x)), (4, 4, 6), lookups=0, layers=1)
    check(
        Fn(lambda m, x: move(F.relu(m.c(x))).reshape(len(x), -1).sum(1), c=conv(1, 4)),
        (1, 4, 6),
        lookups=96,
        layers=2,
    )
    check(
        Fn(lambda m, x: torch.sin(F.relu(move(m.c(x)))).reshape(len(x), -1).sum(1), c=conv(1, 4)),
        (1, 4, 6),
        lookups=size,
    )


def test_pooling_in_other_numbers_of_axes():
    check(nn.Sequential(nn.AvgPool1d(3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool1d(2)), (2, 9), lookups=10)
    check(nn.Sequential(nn.AvgPool3d(2, 1), nn.ReLU(), nn.AdaptiveAvgPool3d(1)), (2, 3, 4, 3), lookups=24)
    check(nn.Sequential(nn.MaxPool1d(3, 2, 1), nn.ReLU(), nn.AdaptiveMaxPool1d(2)), (2, 9))
    check(nn.Sequential(nn.MaxPool3d(2, 1), nn.ReLU(), nn.AdaptiveMaxPool3d(1)), (2, 3, 4, 3))
    check(nn.Sequential(nn.ConstantPad1d(2, 0.5), nn.Upsample(scale_factor=2), nn.ReflectionPad1d(1)), (2, 5))
    check(nn.Sequential(nn.Upsample(scale_factor=2, mode="linear")), (2, 5))


# Maxima.

MAX_POOLS = [
    nn.MaxPool2d(2),
    nn.MaxPool2d((2, 3), stride=1),
    nn.MaxPool2d(3, stride=2, padding=1),
    nn.MaxPool2d(2, dilation=2, stride=1),
    nn.MaxPool2d(3, stride=2, ceil_mode=True),
    nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
    nn.MaxPool2d(1),
    nn.AdaptiveMaxPool2d(1),
    nn.AdaptiveMaxPool2d((3, 4)),
    Fn(lambda m, x: x.amax((2, 3))),
    Fn(lambda m, x: x.amax(2, keepdim=True)),
    Fn(lambda m, x: x.amax(1)),
    Fn(lambda m, x: x.max(3).values),
    Fn(lambda m, x: x.max(dim=1, keepdim=True)[0]),
]


@pytest.mark.parametrize("pool", MAX_POOLS, ids=[f"{n}-{type(p).__name__}" for n, p in enumerate(MAX_POOLS)])
@pytest.mark.sampled(4)
def test_an_activation_after_a_maximum_costs_what_it_costs_before(pool):
    before = check(nn.Sequential(conv(1, 4), nn.ReLU(), pool), (1, 5, 6), lookups=120)
    after = check(nn.Sequential(conv(1, 4), pool, nn.ReLU()), (1, 5, 6), lookups=120)
    assert len(before.layers) == len(after.layers)
    check(Fn(lambda m, x: F.relu(m.p(m.c(x)) - 1), c=conv(1, 4), p=pool), (1, 5, 6))


def test_maxima_in_a_row_read_each_other():
    check(nn.Sequential(conv(1, 2), nn.ReLU(), *[nn.MaxPool2d(3, 1, 1)] * 3), (1, 5, 5), lookups=50)

    def spatial_pyramid(m, x):
        x = F.relu(m.c(x))
        y = F.max_pool2d(x, 3, 1, 1)
        z = F.max_pool2d(y, 3, 1, 1)
        return m.d(torch.cat([x, y, z], 1))

    network = check(Fn(spatial_pyramid, c=conv(1, 2), d=conv(6, 2)), (1, 5, 5), lookups=50)
    assert len(network.layers) == 1 + 4 + 1


def test_a_maximum_of_the_image_reads_the_image():
    network = check(nn.Sequential(nn.MaxPool2d(2), conv(1, 2)), (1, 4, 4), lookups=0)
    assert network.layers[0].source == 0
    check(nn.Sequential(nn.Flatten(2), nn.MaxPool1d(4), nn.Flatten(), nn.Linear(4, 2)), (1, 4, 4), lookups=0)


def test_a_maximum_with_two_readers_is_taken_once():
    def function(m, x):
        y = F.max_pool2d(m.c(x), 2)
        return torch.cat([F.relu(y), y.flip(2)], 1)

    network = check(Fn(function, c=conv(1, 2)), (1, 4, 4))
    assert len([layer for layer in network.layers if not isinstance(layer, Layer)]) == 2


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "activation",
    [
        nn.LeakyReLU(-0.5),
        nn.GELU(),
        nn.ELU(-1.0),
        nn.PReLU(2),
        nn.SiLU(),
        nn.Hardshrink(),
        nn.Softplus(threshold=1),
    ],
)
def test_functions_that_decrease_are_not_moved_before_a_maximum(activation):
    if isinstance(activation, nn.PReLU):
        activation.weight.data = torch.tensor([-0.5, 0.5])
    check(nn.Sequential(conv(1, 2), nn.MaxPool2d(2), activation), (1, 4, 4))


def test_powers_of_sums_of_powers():
    check(nn.Sequential(conv(1, 2), nn.LPPool2d(2, 2)), (1, 4, 4))


def test_minima():
    check(Fn(lambda m, x: F.relu(m.c(x)).amin((2, 3)), c=conv(1, 2)), (1, 4, 4), lookups=32)
    check(Fn(lambda m, x: F.relu(m.c(x)).min(2)[0], c=conv(1, 2)), (1, 4, 4), lookups=32)
    check(Fn(lambda m, x: -F.max_pool2d(-m.c(x), 3), c=conv(1, 2)), (1, 4, 4))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("function", [torch.maximum, torch.minimum, torch.max, torch.min])
def test_maximum_and_minimum_of_two_tensors(function):
    a, b = conv(1, 2), conv(1, 2)
    check(Fn(lambda m, x: function(m.a(x), m.b(x)), a=a, b=b), (1, 4, 4), lookups=32)
    check(Fn(lambda m, x: function(m.a(x), torch.tensor(0.5)), a=a), (1, 4, 4), lookups=0)
    check(Fn(lambda m, x: function(torch.ones(2, 1, 1), m.a(x)), a=a), (1, 4, 4), lookups=0)
    check(Fn(lambda m, x: function(m.a(x), torch.arange(16.0).view(4, 4)), a=a), (1, 4, 4), lookups=32)
    check(Fn(lambda m, x: function(m.a(x), -m.a(x)), a=a), (1, 4, 4))
    check(Fn(lambda m, x: function(m.a(x)[:, :1], m.b(x)), a=a, b=b), (1, 4, 4), lookups=32)


def test_a_maximum_with_a_pooling_of_the_same_tensor():
    a = conv(1, 2)
    check(Fn(lambda m, x: torch.maximum(m.a(x), F.max_pool2d(m.a(x), 3, 1, 1)), a=a), (1, 4, 4))


# Activations.

ACTIVATIONS = [
    nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-2, 0.5), nn.Hardswish(), nn.Hardsigmoid(), nn.SiLU(), nn.Mish(),
    nn.GELU(), nn.GELU("tanh"),
    nn.ELU(0.7), nn.CELU(0.7), nn.SELU(), nn.LeakyReLU(0.2), nn.PReLU(), nn.PReLU(2),
    nn.RReLU(), nn.Sigmoid(), nn.LogSigmoid(), nn.Tanh(), nn.Tanhshrink(), nn.Softplus(2, 1.5), nn.Softsign(),
    nn.Softshrink(0.3), nn.Hardshrink(0.3), nn.Threshold(0.1, -3),
    Fn(lambda m, x: x * F.relu6(x + 3) / 6),
    Fn(lambda m, x: x * torch.sigmoid(x)),
    Fn(lambda m, x: torch.sigmoid(1.7 * x) * x),
    Fn(lambda m, x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3)))),
    Fn(lambda m, x: x.clamp(-0.5, 1)),
    Fn(lambda m, x: x.clamp(min=0)),
    Fn(lambda m, x: x.clamp(max=1) ** 2),
    Fn(lambda m, x: x.clamp_min(-0.2).clamp_max(0.7)),
    Fn(lambda m, x: x.square() + x),
    Fn(lambda m, x: x * x * x - 2 * x),
    Fn(lambda m, x: 1 - x.abs()),
    Fn(lambda m, x: x.sign() * x.abs().sqrt()),
    Fn(lambda m, x: torch.where(x > 0, x, 0.1 * x)),
    Fn(lambda m, x: (x > 0) * x),
    Fn(lambda m, x: (x > 0).to(x.dtype) * 2 - 1),
    Fn(lambda m, x: ((x > -1) & (x < 1)) * x),
    Fn(lambda m, x: x.masked_fill(x < 0, -0.25)),
    Fn(lambda m, x: (3 * x).round().int() * 2),
    Fn(lambda m, x: torch.div(x, 0.3, rounding_mode="floor")),
    Fn(lambda m, x: (4 * x) // 1 % 3),
    Fn(lambda m, x: 1 / (1 + torch.exp(-x))),
    Fn(lambda m, x: torch.rsqrt(x.pow(2) + 1)),
    Fn(lambda m, x: torch.maximum(x, 0.5 * x)),
    Fn(lambda m, x: x.relu() - (-x).relu()),
    Fn(lambda m, x: F.relu(x) + F.relu(x)),
    Fn(lambda m, x: 2 - F.relu(x)),
    Fn(lambda m, x: torch.sub(2, F.relu(x), alpha=3)),
    Fn(lambda m, x: F.relu(x) * torch.tensor([2.0, 0.5]).view(2, 1, 1)),
    Fn(lambda m, x: torch.sin(x).clamp(torch.tensor([0.0, 0.1]).view(2, 1, 1))),
    Fn(lambda m, x: x.bool()),
    Fn(lambda m, x: 2.0 ** x),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=[f"{n}-{a}" for n, a in enumerate(ACTIVATIONS)])
@pytest.mark.sampled(8)
def test_activations_and_chains_of_them_are_one_layer(activation):
    check(nn.Sequential(conv(1, 2), activation), (1, 4, 3), lookups=0, layers=1)
    parts = {"a": conv(1, 2), "n": nn.BatchNorm2d(2), "f": activation, "b": conv(2, 2)}
    check(Fn(lambda m, x: m.b(m.f(m.n(m.a(x))).double()), **parts), (1, 4, 3), lookups=24, layers=2)


def test_an_activation_of_a_view_is_one_layer():
    check(nn.Sequential(conv(1, 4), nn.Flatten(), nn.ReLU(), nn.Linear(36, 2)), (1, 3, 3), 36)
    check(nn.Sequential(conv(1, 4), nn.ReLU(), nn.PixelShuffle(2), nn.Tanh(), conv(1, 2)), (1, 3, 3), 36)


def test_slopes_of_channels_stay_with_their_channels_in_a_view():
    def function(m, x):
        y = m.p(m.c(x)).flatten(1)
        return y + torch.sigmoid(y) + F.relu(y).flip(1)

    check(Fn(function, c=conv(1, 3), p=nn.PReLU(3)), (1, 3, 3))
    check(Fn(lambda m, x: torch.tanh(m.p(x).view(-1, 27)) - x.view(-1, 27), p=nn.PReLU(3)), (3, 3, 3))


def test_what_is_looked_up_is_looked_up_once():
    def function(m, x):
        y = F.relu(m.a(x))
        return m.b(y) + y + m.c(y.flip(2)) + y.mean((2, 3), keepdim=True)

    check(Fn(function, a=conv(1, 2), b=conv(2, 2), c=conv(2, 2)), (1, 4, 3), lookups=24, layers=2)

    def shared(m, x):
        y = m.a(x)
        z = F.relu(y)
        return m.b(y + z) + m.c(z)

    check(Fn(shared, a=conv(1, 2), b=conv(2, 2), c=conv(2, 2)), (1, 4, 3), lookups=24, layers=2)


# Branches.


def test_residual_connections_and_concatenations():
    def dense(m, x):
        for layer in (m.a, m.b, m.c):
            x = torch.cat([x, F.relu(layer(x))], 1)
        return m.d(x)

    check(
        Fn(dense, a=conv(1, 2), b=conv(3, 2), c=conv(5, 2), d=conv(7, 1)), (1, 4, 4), lookups=3 * 32, layers=4
    )

    def unet(m, x):
        a = F.relu(m.a(x))
        b = F.relu(m.b(F.max_pool2d(a, 2)))
        return m.d(torch.cat([a, m.up(b)], 1))

    parts = {"a": conv(1, 2), "b": conv(2, 4), "up": nn.ConvTranspose2d(4, 2, 2, 2), "d": conv(4, 1)}
    check(Fn(unet, **parts), (1, 4, 4), lookups=32 + 16)


# The end of a model.

ENDS = {
    "softmax": lambda x: F.softmax(x, 1),
    "last axis": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(F.relu(x), 1),
    "argmax": lambda x: x.argmax(1),
    "argmax keepdim": lambda x: x.argmax(dim=-1, keepdim=True),
    "softmax of a view": lambda x: F.softmax(F.relu(x).flatten(1), 1),
    "softmin": lambda x: F.softmin(x, 2),
    "softmax of a maximum": lambda x: F.softmax(F.max_pool2d(x, 2).flatten(1), 1),
    "softmax with temperature": lambda x: (x / 3).softmax(1),
    "activation": torch.tanh,
    "view": lambda x: x.permute(0, 2, 3, 1),
    "activation, then view": lambda x: F.relu(x).flatten(1),
    "view, then activation": lambda x: F.relu(x.flatten(1)),
    "one number": lambda x: torch.sigmoid(x.mean((1, 2, 3))),
    "one number squeezed": lambda x: torch.sigmoid(x.mean((1, 2, 3), keepdim=True).squeeze()),
    "truth": lambda x: x > 0,
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.sampled(3)
def test_what_the_client_computes_costs_no_lookup(end):
    maximum = 0 if end is not ENDS["softmax of a maximum"] else 48
    check(Fn(lambda m, x: end(m.c(x)), c=conv(1, 3)), (1, 4, 4), lookups=maximum)


def test_one_number_an_image_inside_a_model():
    def function(m, x):
        score = torch.sigmoid(m.c(x).mean((1, 2, 3)))
        return torch.stack([score, 1 - score], 1)

    check(Fn(function, c=conv(1, 3)), (1, 4, 4), lookups=1)
    check(Fn(lambda m, x: torch.relu(x.sum(1)) * 3 + 1), (4,))


def test_models_with_nothing_in_them():
    check(nn.Identity(), (2, 3, 3), lookups=0, layers=1)
    check(nn.Sequential(), (4,), lookups=0, layers=1)
    check(nn.ReLU(), (2, 3), lookups=0, layers=1)
    check(nn.Flatten(), (2, 3), lookups=0, layers=1)
    check(nn.MaxPool1d(3), (2, 3), lookups=0)
    check(nn.Softmax(1), (2, 3), lookups=0)


# Random networks.


def random_model(seed):
    """A network of 2 to 7 random blocks, and the shape of its images."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    channels, size = int(rng.integers(1, 4)), int(rng.integers(5, 9))
    shape, blocks = (channels, size, size), []

    def activation():
        return [
            nn.ReLU(),
            nn.SiLU(),
            nn.Hardswish(),
            nn.LeakyReLU(0.1),
            nn.Identity(),
            nn.ReLU(inplace=True),
        ][rng.integers(6)]

    for _ in range(rng.integers(2, 8)):
        kind = rng.integers(10)
        if kind < 3:
            out = 2 * int(rng.integers(1, 3))
            options = {
                "padding_mode": str(rng.choice(["zeros", "reflect"])),
                "stride": int(rng.integers(1, 3)),
            }
            blocks += [nn.Conv2d(channels, out, 3, padding=1, **options), nn.BatchNorm2d(out), activation()]
            channels, size = out, (size - 1) // options["stride"] + 1
        elif kind == 3 and size > 3:
            pool = [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AvgPool2d(2, ceil_mode=True), nn.MaxPool2d(3, 2, 1)]
            blocks += [pool[rng.integers(4)]]
            size = blocks[-1](torch.zeros(1, 1, size, size)).shape[-1]
        elif kind == 4:
            blocks += [Fn(lambda m, x: x + m.f(m.c(x)), c=conv(channels, channels), f=activation())]
        elif kind == 5:
            blocks += [Fn(lambda m, x: torch.cat([m.f(x), m.c(x)], 1), c=conv(channels, 2), f=activation())]
            channels += 2
        elif kind == 6 and channels % 2 == 0:
            blocks += [
                Fn(lambda m, x: torch.cat([m.f(x.chunk(2, 1)[1]), x.chunk(2, 1)[0]], 1), f=activation())
            ]
        elif kind == 7 and channels % 4 == 0 and size < 5:
            blocks += [nn.PixelShuffle(2)]
            channels, size = channels // 4, 2 * size
        elif kind == 8:
            blocks += [
                Fn(lambda m, x: torch.maximum(m.f(x), m.n(x)), f=activation(), n=nn.BatchNorm2d(channels))
            ]
        else:
            blocks += [nn.Dropout(), activation(), nn.ZeroPad2d((0, 1, 1, 0)) if size < 7 else nn.Identity()]
            size += size < 7
        if min(size, 3) < 3:
            break
    if rng.integers(2):
        blocks += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)]
    return nn.Sequential(*blocks), shape


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
@pytest.mark.slow
def test_random_networks(seed):
    model, shape = random_model(seed)
    check(model, shape)


# Modes and types.


def test_the_mode_of_every_part_is_left_as_it_was():
    model = nn.Sequential(conv(1, 2), nn.BatchNorm2d(2), nn.Sequential(nn.ReLU(), nn.Dropout()))
    model.train()
    model[1].eval()
    modes = [part.training for part in model.modules()]
    statistics = model[1].running_mean.clone()
    check(model, (1, 4, 4))
    assert [part.training for part in model.modules()] == modes == [True, True, False, True, True, True]
    torch.testing.assert_close(model[1].running_mean.float(), trained(model)[1].running_mean.float())
    assert statistics.shape == (2,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_models_of_every_precision(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(
        conv(1, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)
    )
    model = model.to(dtype).eval()
    network = capture(model, (1, 4, 4))
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    np.testing.assert_allclose(network(x.numpy()), model.double()(x).detach().numpy(), rtol=1e-9, atol=1e-9)
    for layer in network.layers:
        if isinstance(layer, Layer):
            assert layer.bias.dtype == np.float64
    single = capture(nn.Conv2d(1, 2, 3).to(dtype), (1, 4, 4))
    assert single(x.numpy()).dtype == np.float64


def test_weights_that_are_shared_with_the_model_are_copied():
    model = nn.Sequential(conv(1, 2), nn.ReLU())
    network = capture(model, (1, 4, 4))
    x = np.ones((1, 1, 4, 4))
    before = network(x)
    model[0].weight.data.zero_()
    model[0].bias.data.zero_()
    np.testing.assert_array_equal(network(x), before)
