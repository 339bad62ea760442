"""Random trained-looking layers, from a seed, for the tests that compile and encrypt."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

import fheconv
from fheconv.networks.floats import Network
from fheconv.networks.linear import Term

KINDS = (
    torch.nn.Conv1d,
    torch.nn.Conv2d,
    torch.nn.Conv3d,
    torch.nn.ConvTranspose1d,
    torch.nn.ConvTranspose2d,
    torch.nn.ConvTranspose3d,
)


def random_module(seed: int, kind: Any = torch.nn.Conv2d) -> tuple[torch.nn.Module, tuple[int, ...]]:
    """A layer with random channels, kernel, stride, padding, dilation, groups, bias and padding mode, each
    axis on its own, some of its weights pruned; and the shape (C, *S) of an image that it takes."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    axes = int(kind.__name__[-2])
    transposed = "Transpose" in kind.__name__
    groups = int(rng.choice([1, 1, 2]))
    kernel, dilation = rng.integers(1, 4, axes), rng.integers(1, 3, axes)
    stride, padding = rng.integers(1, 4, axes), rng.integers(0, 3, axes)
    more: dict[str, Any] = {}
    extent = (kernel - 1) * dilation + 1
    if transposed:
        size = rng.integers(1, 4, axes)
        extra = [int(rng.integers(0, max(s, d))) for s, d in zip(stride, dilation, strict=True)]
        padding = np.minimum(padding, ((size - 1) * stride + extent + extra - 1) // 2)
        more["output_padding"] = extra
    else:
        mode = str(rng.choice(["zeros", "zeros", "reflect", "replicate", "circular"]))
        size = np.maximum(extent - 2 * padding, 1) + rng.integers(0, 4, axes)
        if mode in ("reflect", "circular"):
            size = np.maximum(size, padding + 1)
        more["padding_mode"] = mode
        if (stride == 1).all() and rng.integers(4) == 0:
            more["padding"] = "same"
            size = np.maximum(size, extent)
    module = kind(
        groups * int(rng.integers(1, 4)),
        groups * int(rng.integers(1, 3)),
        kernel.tolist(),
        **{"stride": stride.tolist(), "padding": padding.tolist(), "dilation": dilation.tolist(), **more},
        groups=groups,
        bias=bool(rng.integers(2)),
    )
    if rng.integers(3) == 0:
        module.weight.data[torch.rand(module.weight.shape) < 0.5] = 0
    return module, (module.in_channels, *size.tolist())


def random_network(
    seed: int, kind: Any = torch.nn.Conv2d
) -> tuple[fheconv.QuantizedNetwork, np.ndarray, torch.nn.Module]:
    """Such a layer quantized with random widths, the calibration images, and the torch layer."""
    module, shape = random_module(seed, kind)
    rng = np.random.default_rng(seed)
    images = rng.uniform(float(rng.choice([0.0, -1.0])), 1, (3, *shape))
    config = fheconv.QuantConfig(
        weight_bits=int(rng.integers(1, 7)),
        input_bits=int(rng.integers(2, 7)),
        per_channel=bool(rng.integers(2)),
        input_signed=bool(rng.integers(2)),
    )
    return fheconv.quantize(module, images, config), images, module


def unlike_calibration(network: fheconv.QuantizedNetwork, seed: int, n: int = 1) -> np.ndarray:
    """Images of random values over the whole input range, whatever calibration saw of it."""
    q = network.input
    integers = np.random.default_rng(seed).integers(q.minimum, q.maximum + 1, (n, *network.input_shape))
    return (integers - q.zero_point) * q.scale


def integer_network(weight: Any, shape: tuple[int, ...], **options: Any) -> fheconv.QuantizedNetwork:
    """A network of these very integer weights, up to 4 bits, for integer images 0..3 of this shape."""
    source = fheconv.Conv.of(np.asarray(weight), **options)
    return fheconv.quantize(source, np.full(shape, 3), fheconv.QuantConfig(weight_bits=4, input_bits=2))


def with_weight(network: fheconv.QuantizedNetwork, weight: int) -> fheconv.QuantizedNetwork:
    """The network of one convolution with this integer in place of all its weights."""
    layer, kernel = network.last, network.last.convolution
    full = np.full_like(kernel.weight, weight)
    term = Term(source=0, steps=(replace(kernel, weight=full),))
    source = fheconv.Conv(name=layer.name, weight=full, bias=None, geometry=kernel.geometry)
    return replace(
        network,
        layers=(replace(layer, terms=(term,)),),
        source=Network.of(source, network.input_shape),
    )
