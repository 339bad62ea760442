"""Gives lookups a gradient, because a table has none."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fheconv.basics.arrays import Array
from fheconv.networks.expression import Expression
from fheconv.networks.quantization import Quantization


class StraightThroughLookup(torch.autograd.Function):
    """Turns real sums into the integers of an activation, as a lookup does.

    The slope is the change of the activation over one accumulator step, because a table has no values between
    two steps.
    """

    @staticmethod
    @np.errstate(invalid="ignore", over="ignore")  # if training has diverged, `quantized` raises
    def forward(ctx: Any, real: Tensor, step: Tensor, activation: Expression, output: Quantization) -> Tensor:
        """Return the integers of the activation, counted from the zero-point."""
        x, half = real.detach().double().numpy(), np.abs(step.detach().double().numpy()) / 2

        def level(x: Array) -> Array:
            least, greatest = output.minimum - output.zero_point, output.maximum - output.zero_point
            return np.clip(activation(x) / output.scale, least, greatest)

        # Where an activation is not a number, such as a logarithm below 0, its slope is set to 0.
        slope = np.nan_to_num((level(x + half) - level(x - half)) / (2 * half))
        ctx.save_for_backward(torch.as_tensor(slope, dtype=real.dtype))
        return torch.as_tensor(np.rint(level(x)), dtype=real.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of the sums, which is the gradient of the integers times the slope."""
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope, None, None, None
