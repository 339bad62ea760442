"""Random small trained-looking networks, from a seed, for the tests of whole networks."""

from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

import fheconv
from fheconv.basics.arrays import frozen
from fheconv.capture.model import capture
from fheconv.networks.floats import Network

Size = tuple[int, int, int]
Block = tuple[nn.Module, Size]


class Residual(nn.Module):
    """What two branches deliver, added and activated."""

    def __init__(self, body: nn.Module, short: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.body, self.short, self.activation = body, short, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.short(x) + self.body(x))


class Concatenation(nn.Module):
    """What two branches deliver, one's channels after the other's."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], dim=1)


class Slice(nn.Module):
    """The last of the channels, without the borders of the image."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1:, 1:, :-1]


def activation(rng: np.random.Generator) -> nn.Module:
    """A random activation, ReLU more often than others."""
    others = nn.LeakyReLU(0.1), nn.Tanh(), nn.SiLU(), nn.Hardtanh(-0.5, 1.5)
    return nn.ReLU() if rng.integers(2) else others[int(rng.integers(len(others)))]


def norm(rng: np.random.Generator, channels: int) -> nn.Module:
    """A BatchNorm as training leaves it, or nothing."""
    if rng.integers(3) == 0:
        return nn.Identity()
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rng.uniform(0.5, 1.5, channels) * rng.choice([1, 1, -1], channels)))
        layer.bias.copy_(torch.tensor(rng.normal(0, 0.3, channels)))
        layer.running_mean.copy_(torch.tensor(rng.normal(0, 0.3, channels)))
        layer.running_var.copy_(torch.tensor(rng.uniform(0.1, 1, channels)))
    return layer


def _conv(rng: np.random.Generator, size: Size) -> Block:
    c, h, w = size
    filters = int(rng.integers(1, 3))
    groups = int(rng.choice([1, 2])) if c % 2 == 0 and filters % 2 == 0 else 1
    kernel = [int(rng.integers(1, min(3, n) + 1)) for n in (h, w)]
    padding = [int(rng.integers(0, (k + 1) // 2 + 1)) for k in kernel]
    dilation = [
        int(rng.integers(1, 3)) if (k - 1) * 2 + 1 <= n + 2 * p else 1
        for k, p, n in zip(kernel, padding, (h, w), strict=True)
    ]
    stride = [int(rng.integers(1, 3)) for _ in range(2)]
    mode = str(rng.choice(["zeros", "zeros", "replicate"]))
    conv = nn.Conv2d(
        c, filters, kernel, stride, padding, dilation, groups, bool(rng.integers(2)), padding_mode=mode
    )
    return nn.Sequential(conv, norm(rng, filters), activation(rng)), _after(conv, size)


def _pool_before(rng: np.random.Generator, size: Size) -> Block:
    conv = nn.Conv2d(size[0], 2, 2, padding=1)
    module = nn.Sequential(conv, norm(rng, 2), nn.AvgPool2d(2), activation(rng))
    return module, _after(module, size)


def _pool_after(rng: np.random.Generator, size: Size) -> Block:
    pool = nn.AvgPool2d(2) if rng.integers(2) else nn.AvgPool2d(3, stride=2, padding=1)
    module = nn.Sequential(nn.Conv2d(size[0], 2, 2, padding=1), norm(rng, 2), activation(rng), pool)
    return module, _after(module, size)


def _max_pool(rng: np.random.Generator, size: Size) -> Block:
    pool = nn.MaxPool2d(2) if rng.integers(2) else nn.MaxPool2d(2, stride=1)
    module = nn.Sequential(nn.Conv2d(size[0], 1, 2, padding=1), activation(rng), pool)
    return module, _after(module, size)


def _residual(rng: np.random.Generator, size: Size) -> Block:
    c = size[0]
    body = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), norm(rng, c))
    short = nn.Identity() if rng.integers(2) else nn.Sequential(nn.Conv2d(c, c, 1), norm(rng, c))
    return Residual(body, short, activation(rng)), size


def _residual_of_activations(rng: np.random.Generator, size: Size) -> Block:
    """A sum of two looked up tensors, without weights."""
    c = size[0]
    body = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 1), nn.ReLU())
    short = nn.Sequential(nn.Conv2d(c, c, 1), nn.Tanh())
    return Residual(body, short, nn.ReLU()), size


def _concatenation(rng: np.random.Generator, size: Size) -> Block:
    c = size[0]
    left = nn.Sequential(nn.Conv2d(c, 1, 3, padding=1), activation(rng))
    right = nn.Sequential(nn.Conv2d(c, 1, 1), norm(rng, 1), activation(rng))
    return Concatenation(left, right), (2, *size[1:])


def _depthwise(rng: np.random.Generator, size: Size) -> Block:
    c, filters = size[0], int(rng.integers(1, 3))
    depthwise = nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False)
    pointwise = nn.Conv2d(c, filters, 1)
    module = nn.Sequential(depthwise, norm(rng, c), pointwise, norm(rng, filters), activation(rng))
    return module, (filters, *size[1:])


def _shuffle(rng: np.random.Generator, size: Size) -> Block:
    conv = nn.Conv2d(size[0], 4, 2, stride=2)
    module = nn.Sequential(conv, activation(rng), nn.PixelShuffle(2))
    return module, _after(module, size)


def _slice(rng: np.random.Generator, size: Size) -> Block:
    module = nn.Sequential(nn.Conv2d(size[0], 2, 2, padding=1), norm(rng, 2), activation(rng), Slice())
    return module, _after(module, size)


BLOCKS: dict[str, Callable[[np.random.Generator, Size], Block]] = {
    "conv": _conv,
    "pool before": _pool_before,
    "pool after": _pool_after,
    "max pool": _max_pool,
    "residual": _residual,
    "residual of activations": _residual_of_activations,
    "concatenation": _concatenation,
    "depthwise": _depthwise,
    "shuffle": _shuffle,
    "slice": _slice,
}


def _after(module: nn.Module, size: Size) -> Size:
    with torch.no_grad():
        _, c, h, w = module.eval()(torch.zeros(1, *size)).shape
    return c, h, w


def _head(rng: np.random.Generator, size: Size) -> nn.Module:
    c = size[0]
    if rng.integers(3) == 0:
        return nn.Conv2d(c, 2, min(2, *size[1:]))
    if rng.integers(2) and size[1] * size[2] <= 16:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 3))
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(size)), 3))


_captured: WeakKeyDictionary[nn.Module, Network] = WeakKeyDictionary()


def quantize(module: nn.Module, images: np.ndarray, **options: Any) -> fheconv.QuantizedNetwork:
    """What `fheconv.quantize` returns for a `QuantConfig` of these options.

    Of one module again: torch takes most of a second to export it, so it is exported once.
    """
    if module not in _captured:
        _captured[module] = capture(module, images.shape[1:])
    with mock.patch("fheconv.quantized.capture", return_value=_captured[module]):
        return fheconv.quantize(module, images, fheconv.QuantConfig(**options))


@cache
def random_net(
    seed: int, *names: str, depth: int | None = None, size: Size | None = None
) -> tuple[nn.Module, np.ndarray]:
    """A network of random blocks, or of those named, and images (n, C, M, N) to calibrate it on."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    if size is None:
        size = (int(rng.integers(1, 3)), int(rng.integers(5, 8)), int(rng.integers(5, 8)))
    images = frozen(rng.uniform(float(rng.choice([0.0, -1.0])), 1.0, (12, *size)))
    if not names:
        count = int(rng.integers(1, 4)) if depth is None else depth
        names = tuple(map(str, rng.choice(list(BLOCKS), count)))
    blocks = []
    for name in names:
        if min(size[1:]) < 3 and name != "residual":  # there is not much left to convolve
            break
        block, size = BLOCKS[name](rng, size)
        blocks.append(block)
    return nn.Sequential(*blocks, _head(rng, size)).double().eval(), images


@cache
def quantized(
    seed: int, *names: str, depth: int | None = None, size: Size | None = None, **options: Any
) -> fheconv.QuantizedNetwork:
    """Such a network in integers; `options` are those of `QuantConfig`."""
    module, images = random_net(seed, *names, depth=depth, size=size)
    return quantize(module, images, **options)


def integer_images(network: fheconv.QuantizedNetwork, seed: int, n: int) -> np.ndarray:
    """Integer images over the whole input range: all least, all greatest, and random ones."""
    q = network.input
    random = np.random.default_rng(seed).integers(q.minimum, q.maximum + 1, (n, *network.input_shape))
    ends = [np.full((1, *network.input_shape), end, np.int64) for end in (q.minimum, q.maximum)]
    return np.concatenate([*ends, random])


def real_images(network: fheconv.QuantizedNetwork, integers: np.ndarray) -> np.ndarray:
    """The float images that these integers stand for."""
    return (integers - network.input.zero_point) * network.input.scale


def torch_output(module: nn.Module, x: np.ndarray) -> np.ndarray:
    """The oracle, in double precision."""
    with torch.no_grad():
        return module.double()(torch.tensor(x)).numpy()


class Readers(nn.Module):
    """One activation whose channels differ in size, read in each of the ways that weights can read."""

    def __init__(self, reader):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1).double()
        with torch.no_grad():
            self.conv.weight.mul_(torch.tensor([1.0, 0.1, 10.0, 1.0])[:, None, None, None])
        self.reader = reader().double()

    def forward(self, x):
        return self.reader(torch.relu(self.conv(x)))


READERS = {
    "convolution": lambda: nn.Conv2d(4, 3, 3),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 3, 2, stride=2),
    "reflected": lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, 5)),
    "average": lambda: nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 3, 2)),
    "maximum": lambda: nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 3, 2)),
}


def splitting() -> fheconv.QuantizedNetwork:
    """Return a network with a lookup of 14 bits, for which Concrete splits values."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)).eval()
    config = fheconv.QuantConfig(accumulator_bits=14, weight_bits=7, activation_bits=8, input_bits=7)
    return fheconv.quantize(model, torch.rand(20, 4, 4, 4), config)
