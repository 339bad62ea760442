"""Random convolutions for the property tests."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st

from fheconv.arithmetic import ConvGeometry
from fheconv.basics.arrays import Shape
from fheconv.basics.config import QuantConfig
from fheconv.networks.integers import QuantizedLayer
from fheconv.networks.linear import Kernel, Select, Step, Term
from fheconv.networks.quantization import Quantization
from fheconv.quantizer.rounding.mse import round_mse


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

    def nearest_weight(self) -> tuple[np.ndarray, np.ndarray]:
        """The integers of least squared error, and the scale of each channel."""
        weight = self.module.weight.detach().numpy()
        rows = weight if self.config.per_channel else weight[None]
        rounded = round_mse(rows, self.config.weight_bits)
        return rounded.values.reshape(weight.shape), np.broadcast_to(rounded.scale, len(weight))


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
    """A random integer layer with biases and a zero-point, of one convolution, and its images' shape."""
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
    kernel = Kernel(weight=rng.integers(-7, 8, (channels, per_group, *kernel)), geometry=geometry)
    shape = (per_group * groups, *spatial)
    return integer_layer([Term(source=0, steps=(kernel,))], [draw(input_ranges())], [shape], rng), shape


@st.composite
def input_ranges(draw):
    low = draw(st.integers(-9, 0))
    high = draw(st.integers(max(low, 0) + 1, 9))
    return Quantization(scale=1.0, zero_point=draw(st.integers(low, high)), minimum=low, maximum=high)


def integer_layer(terms, inputs, shapes, rng) -> QuantizedLayer:
    """A layer of these terms, with a bias for each channel, or for each value."""
    shape = terms[0].shapes(shapes[terms[0].source])[-1]
    each = shape if rng.integers(2) else (shape[0], *[1] * (len(shape) - 1))
    return QuantizedLayer(
        name="conv",
        shape=shape,
        terms=tuple(terms),
        inputs=tuple(inputs),
        scale=np.ones((shape[0], *[1] * (len(shape) - 1))),
        bias=rng.integers(-50, 50, each),
        real_bias=np.zeros((1,) * len(shape)),
        gain=np.ones((1,) * len(shape), np.int64),
        weight_range=(-7, 7),
        lookup=None,
    )


def _random_step(rng: np.random.Generator, kind: str, shape: Shape, channels: int | None = None) -> Step:
    """A selection, a pooling window or a convolution of values of `shape`."""
    if kind == "select":
        output = rng.integers(1, 4, len(shape))
        return Select(index=rng.integers(-1, math.prod(shape), output))  # -1 is OUTSIDE
    kernel = [int(rng.integers(1, min(size + 2, 3) + 1)) for size in shape[1:]]
    padding = [
        (int(rng.integers(max(k - size, 0), 3)), int(rng.integers(0, 2)))
        for k, size in zip(kernel, shape[1:], strict=True)
    ]
    options = {"stride": rng.integers(1, 3, len(kernel)).tolist(), "padding": padding}
    if kind == "pool":
        weight = np.ones((shape[0], 1, *kernel), np.int64)
        return Kernel(weight=weight, geometry=ConvGeometry.of(kernel, groups=shape[0], **options), exact=True)
    filters = int(rng.integers(1, 3)) if channels is None else channels
    weight = rng.integers(-7, 8, (filters, shape[0], *kernel))
    return Kernel(weight=weight, geometry=ConvGeometry.of(kernel, **options))


CHAINS = (
    ("conv",),
    ("select", "conv"),
    ("conv", "select"),
    ("conv", "pool"),
    ("pool", "conv"),
    ("select", "conv", "select", "pool"),
    ("pool", "select", "conv", "pool", "select"),
)


@st.composite
def integer_sums(draw, most_pixels=None):
    """A random integer layer of several terms and steps, of one tensor or two, and the tensors' shapes.

    What ends in another shape than the first term gets there by a selection.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = st.integers(1, 3)
    tensors = [(draw(st.integers(1, 2)), draw(size), draw(size)) for _ in range(draw(st.integers(1, 2)))]
    if most_pixels is not None:
        assume(sum(map(math.prod, tensors)) <= most_pixels)
    quantizations = [draw(input_ranges()) for _ in tensors]
    terms: list[Term] = []
    for _ in range(draw(st.integers(1, 3))):
        source = draw(st.integers(0, len(tensors) - 1))
        shape, steps = tensors[source], []
        for kind in draw(st.sampled_from(CHAINS)):
            steps.append(_random_step(rng, kind, shape))
            shape = steps[-1].output_shape(shape)
        if terms:
            output = terms[0].shapes(tensors[terms[0].source])[-1]
            if output != shape:
                steps.append(Select(index=rng.integers(-1, math.prod(shape), output)))
        terms.append(Term(source=source, steps=tuple(steps)))
    inputs = [quantizations[term.source] for term in terms]
    return integer_layer(terms, inputs, tensors, rng), tuple(tensors)
