"""Random small networks that were trained for integers, with torch's own operators, from a seed."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


class Quantizer(nn.Module):
    """Rounds to integers of some bits times a scale."""

    def __init__(
        self, rng: np.random.Generator, greatest: float, *, signed: bool = False, bits: int | None = None
    ) -> None:
        super().__init__()
        self.high = 2 ** (bits or int(rng.integers(2, 5))) - 1
        self.zero = int(rng.integers(1, self.high)) if signed else 0
        self.scale = float(np.float32(rng.uniform(0.6, 1.1) * greatest / self.high))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, 0, self.high)


class Weighted(nn.Module):
    """A convolution or linear layer in double precision with few integers for weights."""

    def __init__(
        self, layer: nn.Conv2d | nn.Linear, rng: np.random.Generator, most: int | None = None
    ) -> None:
        super().__init__()
        self.layer, self.per_channel = layer.double(), bool(rng.integers(2))
        self.most = most or 2 ** int(rng.integers(1, 4)) - 1
        with torch.no_grad():
            for tensor in layer.parameters():
                tensor.copy_(torch.tensor(rng.normal(0, 0.5, tensor.shape)))
            if not rng.integers(4):
                layer.weight[0] = 0

    def weight(self) -> Tensor:
        weight, most = self.layer.weight, self.most
        sizes = weight.detach().flatten(1).abs().amax(1).float() / most
        if not self.per_channel:
            zero = torch.zeros(1, dtype=torch.int32)
            return torch.fake_quantize_per_tensor_affine(weight, sizes.max()[None], zero, -most, most)
        zeros = torch.zeros(len(sizes), dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, sizes.clamp(min=0.01), zeros, 0, -most, most)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return functional.linear(x, self.weight(), layer.bias)
        return functional.conv2d(x, self.weight(), layer.bias, layer.stride, layer.padding, 1, layer.groups)


class Branches(nn.Module):
    """Adds a quantized branch to its input, which has the same scale or another."""

    def __init__(self, body: nn.Module, quantizer: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.body, self.quantizer, self.after = body, quantizer, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.quantizer(torch.relu(self.body(x))))


def trained_net(seed: int, *, size: int = 6) -> tuple[nn.Module, np.ndarray]:
    """Return a network in double precision, and images for it."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    channels = int(rng.integers(1, 3))
    images = rng.normal(0, 1, (16, channels, size, size))
    parts: list[nn.Module] = [Quantizer(rng, 3.0, signed=True)] if rng.integers(2) else []
    if not parts:
        images = rng.integers(0, 8, images.shape)
    for _ in range(int(rng.integers(1, 3))):
        filters, kernel = int(rng.integers(2, 4)), int(rng.choice([1, 3]))
        conv = nn.Conv2d(channels, filters, kernel, padding=kernel // 2, bias=bool(rng.integers(2)))
        signed = bool(rng.integers(2))
        activation = nn.LeakyReLU(0.3) if signed else nn.ReLU()
        last = Quantizer(rng, 4.0, signed=signed)
        parts += [Weighted(conv, rng), activation, last]
        channels = filters
        if rng.integers(2):
            body = Weighted(nn.Conv2d(channels, channels, 3, padding=1), rng)
            own = last if rng.integers(2) else Quantizer(rng, 4.0)
            parts.append(Branches(body, own, Quantizer(rng, 6.0, signed=True)))
        if rng.integers(2):
            parts.append(nn.MaxPool2d(2, ceil_mode=True))
        elif rng.integers(2):
            parts += [nn.AvgPool2d(2, padding=1), Quantizer(rng, 4.0, signed=True)]
    last_layer = nn.LazyLinear(4, dtype=torch.float64)
    head = nn.Sequential(*parts, nn.Flatten())
    last_layer(head(torch.tensor(images, dtype=torch.float64)))
    parts += [nn.Flatten(), Weighted(last_layer, rng)]
    if rng.integers(2):
        parts.append(Quantizer(rng, 20.0, signed=True))
    return nn.Sequential(*parts).eval(), images


def outputs(model: Callable[[Tensor], Tensor], images: np.ndarray) -> np.ndarray:
    """Return what torch computes for images, in double precision."""
    with torch.no_grad():
        return model(torch.tensor(images, dtype=torch.float64)).numpy()
