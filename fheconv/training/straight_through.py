"""Gives lookups a gradient, because a table has none."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fheconv.basics.arrays import Array
from fheconv.networks.expression import Expression
from fheconv.networks.quantization import Quantization


def looked_up(real: Tensor, step: Tensor, activation: Expression, output: Quantization) -> Tensor:
    """Turn real sums into the integers of an activation, counted from the zero-point, as a lookup does.

    The slope is the change of the activation over one accumulator step, because a table has no values between
    two steps.
    """
    x, half = real.detach().double().numpy(), np.abs(step.detach().double().numpy()) / 2

    def level(x: Array) -> Array:
        least, greatest = output.minimum - output.zero_point, output.maximum - output.zero_point
        return np.clip(activation(x) / output.scale, least, greatest)

    with np.errstate(invalid="ignore", over="ignore"):  # if training has diverged, `quantized` raises
        numbers = np.rint(level(x)), slopes(level, x, half)
    return with_slopes(real, *(torch.as_tensor(one, dtype=real.dtype) for one in numbers))


def slopes(function: Callable[[Array], Array], x: Array, half: Array) -> Array:
    """Return the slope of a function from `half` before to `half` after each `x`.

    Where an activation is not a number, such as a logarithm below 0, its slope is set to 0.
    """
    slope: Array = np.nan_to_num((function(x + half) - function(x - half)) / (2 * half))
    return slope


def with_slopes(x: Tensor, values: Tensor, slopes: Tensor) -> Tensor:
    """Return `values`, as a function of `x` that has these slopes."""
    result: Tensor = _WithSlopes.apply(x, values, slopes)  # type: ignore[no-untyped-call]
    return result


class _WithSlopes(torch.autograd.Function):
    """Replaces a tensor by values that have slopes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, slopes: Tensor) -> Tensor:
        """Return the values."""
        ctx.save_for_backward(slopes)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the tensor, which is that of the values times the slopes."""
        (slopes,) = ctx.saved_tensors
        return gradients[0] * slopes, None, None
