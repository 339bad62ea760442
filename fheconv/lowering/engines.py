"""Computes a convolution without padding, in numpy and in Concrete.

Tensors are numpy arrays (N, C, *S) or Concrete's tracers (1, C, *S).
"""

from typing import Any

import numpy as np

from fheconv.basics.arrays import Array
from fheconv.basics.errors import InvalidArgumentError
from fheconv.lowering.dialect import convolve
from fheconv.lowering.pruning import Plain

# Microseconds of one multiply-add, measured by tests/benchmarks/engines.py. They are used to choose the
# engine, so only their ratios matter.
UNIT_COST = {"conv": 1.2, "separable": 2.6, "shifts": 2.7, "matrix": 0.3}
WHY = {
    "conv": "It has no weights, or reads nothing but padding.",
    "shifts": "It has no weights, or reads nothing but padding.",
    "separable": "Two passes need 2-d filters that read one channel each and have rank one.",
}


def run(engine: str, plain: Plain, x: Any, every: int = 1) -> Any:
    """Return the convolution (N, K', *Out') of x (N, C', *S'). Its constant is multiplied by `every`.

    `every` is 1 when a ciphertext holds one image, and `Lanes.every` when it holds several.
    """
    return _ENGINES[engine](plain, x, plain.constant * every)


def _conv_engine(plain: Plain, x: Any, constant: Array) -> Any:
    return convolve(x, plain.weight, constant, plain.stride, plain.dilation, plain.groups)


def _separable_engine(plain: Plain, x: Any, constant: Array) -> Any:
    separated = plain.separated()
    if separated is None:
        raise InvalidArgumentError(WHY["separable"])
    columns, rows = separated
    none = np.zeros_like(constant)
    down, across = ((plain.stride[0], 1), (1, plain.stride[1]))
    half = convolve(x, columns, none, down, (plain.dilation[0], 1), plain.groups)
    return convolve(half, rows, constant, across, (1, plain.dilation[1]), len(plain.weight))


def _shifts_engine(plain: Plain, x: Any, constant: Array) -> Any:
    output = plain.outputs.shape[1:]
    ones = (1,) * len(output)
    y = None
    for tap in plain.nonzero_taps():
        window = tuple(
            slice(t * d, t * d + (o - 1) * s + 1, s)
            for t, o, s, d in zip(tap, output, plain.stride, plain.dilation, strict=True)
        )
        weight = plain.weight[(slice(None), slice(None), *(slice(t, t + 1) for t in tap))]
        bias = constant if y is None else np.zeros_like(constant)
        term = convolve(x[(slice(None), slice(None), *window)], weight, bias, ones, ones, plain.groups)
        y = term if y is None else y + term
    return y


_ENGINES = {"conv": _conv_engine, "separable": _separable_engine, "shifts": _shifts_engine}
