"""Random convolutions for the property tests."""

from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st

from fheconv.arithmetic import ConvGeometry
from fheconv.config import QuantConfig
from fheconv.network import Quantization, QuantizedConv


@dataclass(frozen=True, kw_only=True)
class ConvProblem:
    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    options: dict = field(repr=True)

    def torch_output(self) -> np.ndarray:
        """The oracle, in double precision."""
        x, weight, bias = (torch.tensor(a, dtype=torch.float64) for a in (self.x, self.weight, self.bias))
        function = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}[x.ndim]
        return function(x, weight, bias, **self.options).numpy()


def _values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if dtype.startswith("int"):
        return rng.integers(-20, 20, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


@st.composite
def conv_problems(draw, dtypes=("int64", "int8", "float32", "float64")):
    """A batch, a weight and a bias with random shapes and options; the kernel always fits."""
    d = draw(st.integers(1, 3))
    small = st.integers(1, 3)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    batch, per_group, filters = draw(st.integers(0, 3)), draw(small), draw(small)
    kernel = [draw(small) for _ in range(d)]
    stride = [draw(small) for _ in range(d)]
    dilation = [draw(st.integers(1, 2)) for _ in range(d)]
    padding = [draw(st.integers(0, 3)) for _ in range(d)]
    spatial = []
    for k, e, p in zip(kernel, dilation, padding, strict=True):
        least = max(1, (k - 1) * e + 1 - 2 * p)
        spatial.append(draw(st.integers(least, least + 4)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(dtypes))
    return ConvProblem(
        x=_values(rng, (batch, per_group * groups, *spatial), kind),
        weight=_values(rng, (filters * groups, per_group, *kernel), kind),
        bias=_values(rng, (filters * groups,), kind),
        options={"stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
    )


@dataclass(frozen=True, kw_only=True)
class LayerProblem:
    """A torch layer, calibration images for it and a configuration."""

    module: torch.nn.Conv2d
    images: np.ndarray
    config: QuantConfig

    def torch_output(self, x: np.ndarray) -> np.ndarray:
        """The oracle, in double precision."""
        m = self.module
        weight, bias = (None if p is None else p.detach().double() for p in (m.weight, m.bias))
        y = torch.conv2d(torch.tensor(x).double(), weight, bias, m.stride, m.padding, m.dilation, m.groups)
        return y.numpy()


@st.composite
def quant_configs(draw, most_bits=8):
    signed = draw(st.booleans())
    return QuantConfig(
        weight_bits=draw(st.integers(1, min(most_bits, 8))),
        input_bits=draw(st.integers(2 if signed else 1, most_bits)),
        per_channel=draw(st.booleans()),
        input_signed=signed,
    )


@st.composite
def layer_problems(draw, configs=None, kinds=("positive", "mixed", "negative", "integers")):
    """A random torch.nn.Conv2d with images on which it is calibrated; the kernel always fits."""
    small = st.integers(1, 3)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    per_group, filters = draw(small), draw(small)
    kernel, stride, dilation = ([draw(small), draw(small)] for _ in range(3))
    padding = [draw(st.integers(0, 3)) for _ in range(2)]
    spatial = []
    for k, e, p in zip(kernel, dilation, padding, strict=True):
        least = max(1, (k - 1) * e + 1 - 2 * p)
        spatial.append(draw(st.integers(least, least + 3)))
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    module = torch.nn.Conv2d(
        per_group * groups,
        filters * groups,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        bias=draw(st.booleans()),
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.tensor(rng.standard_normal(parameter.shape)))
    config = draw(quant_configs() if configs is None else configs)
    shape = (draw(small), per_group * groups, *spatial)
    kind = draw(st.sampled_from(kinds))
    if kind == "integers":
        bits = config.input_bits
        low = -(2 ** (bits - 1)) if config.input_signed else 0
        images = rng.integers(low, low + 2**bits, shape)
    else:
        low, high = {"positive": (0, 1), "mixed": (-1, 2), "negative": (-3, -1)}[kind]
        images = rng.uniform(low, high, shape)
    return LayerProblem(module=module, images=images, config=config)


@st.composite
def integer_layers(draw, most_pixels=None):
    """A random integer layer with biases and a zero-point, and the sizes of its images."""
    small = st.integers(1, 3)
    groups = draw(st.sampled_from([1, 1, 2]))
    per_group, filters = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kernel, stride, dilation = ([draw(small), draw(small)] for _ in range(3))
    padding = [(draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in range(2)]
    geometry = ConvGeometry.of(kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)
    spatial = []
    for extent, pads in zip(geometry.extent, padding, strict=True):
        least = max(1, extent - sum(pads))
        spatial.append(draw(st.integers(least, least + 3)))
    if most_pixels is not None:
        assume(per_group * groups * spatial[0] * spatial[1] <= most_pixels)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    channels = filters * groups
    low = draw(st.integers(-9, 0))
    high = draw(st.integers(max(low, 0) + 1, 9))
    layer = QuantizedConv(
        name="conv",
        weight=rng.integers(-7, 8, (channels, per_group, *kernel)),
        bias=rng.integers(-50, 50, channels),
        geometry=geometry,
        weight_scale=np.ones(channels),
        weight_range=(-7, 7),
        input=Quantization(scale=1.0, zero_point=draw(st.integers(low, high)), minimum=low, maximum=high),
    )
    return layer, tuple(spatial)
