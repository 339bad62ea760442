"""Makes the linear steps and the maxima of a network torch modules, and checks what was trained."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fheconv.arithmetic import OUTSIDE, expand
from fheconv.basics.arrays import Array, Shape
from fheconv.basics.errors import CalibrationError, UnsupportedLayerError
from fheconv.networks.floats import Maximum
from fheconv.networks.linear import Kernel, Select, Term
from fheconv.networks.quantization import Quantization

CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class Gather(nn.Module):
    """A selection: outputs (N, *shape of index) of inputs (N, …), zero where `OUTSIDE`."""

    index: Tensor

    def __init__(self, index: Array) -> None:
        super().__init__()
        self.register_buffer("index", torch.tensor(index), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the selected values."""
        # `OUTSIDE` is the index −1: it reads the zero that is appended at the end.
        return functional.pad(x.flatten(1), (0, 1))[:, self.index]


class Convolution(nn.Module):
    """A convolution of inputs (N, C, *S), with the kernel's weights unless others are given."""

    weight: Tensor

    def __init__(self, kernel: Kernel, shape: Shape) -> None:
        super().__init__()
        self.geometry = geometry = kernel.geometry
        if len(geometry.kernel) > max(CONVOLUTIONS):
            raise UnsupportedLayerError(
                f"A convolution over {len(geometry.kernel)} axes cannot be trained; torch has them over "
                f"{max(CONVOLUTIONS)} at most."
            )
        places = np.arange(math.prod(shape)).reshape(1, *shape)
        expanded = expand(places, geometry, OUTSIDE)[0]
        self.expansion = Gather(expanded) if geometry.expands else nn.Identity()
        self.register_buffer("weight", torch.tensor(kernel.weight, dtype=torch.float32), persistent=False)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the convolution (N, K, *Out)."""
        weight = self.weight if weight is None else weight
        geometry, x = self.geometry, self.expansion(x)
        if not geometry.kernel:
            return functional.conv1d(x[..., None], weight[..., None], groups=geometry.groups)[..., 0]
        convolution = CONVOLUTIONS[len(geometry.kernel)]
        return convolution(
            x, weight, stride=geometry.stride, dilation=geometry.dilation, groups=geometry.groups
        )


class Steps(nn.Module):
    """The steps of a term, which reads a tensor of `shape` (C, *S). Its weights are given in each call."""

    def __init__(self, term: Term, shape: Shape) -> None:
        super().__init__()
        self.at, _ = term.weighted()
        self.steps: Any = nn.ModuleList(
            Gather(step.index) if isinstance(step, Select) else Convolution(step, before)
            for step, before in zip(term.steps, term.shapes(shape)[:-1], strict=True)
        )

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return what the steps make of the tensor (N, C, *S), without the term's factor."""
        for place, step in enumerate(self.steps):
            x = step(x, weight) if place == self.at else step(x)
        return x


class MaximumModule(nn.Module):
    """Maxima of values of one tensor of a network."""

    def __init__(self, layer: Maximum) -> None:
        super().__init__()
        self.source = layer.source
        self.gather = Gather(layer.index)

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the maxima (N, C, *S), given all tensors so far."""
        return self.gather(tensors[self.source]).amax(dim=1)

    def draw_in(self) -> None:
        """Do nothing: a maximum has no weights."""


def image_steps(images: Tensor, quantization: Quantization) -> Tensor:
    """Return the integers of images, counted from the zero-point. Images are clipped to the range."""
    zero = quantization.zero_point  # tensors count from it, so that padding is with zeros
    steps = (images / quantization.scale).round()
    return steps.clamp(quantization.minimum - zero, quantization.maximum - zero)


def check_finite(module: nn.Module) -> None:
    """Raise `CalibrationError` if a parameter is not finite, because training has diverged."""
    for name, parameter in module.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise CalibrationError(
                f"The parameter {name} is not finite: training has diverged; lower the learning rate."
            )
