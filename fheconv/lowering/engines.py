"""Computes a convolution without padding, in numpy and in Concrete.

Tensors are numpy arrays (N, C, *S) or Concrete's tracers (1, C, *S).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fheconv.arithmetic import tap_slices
from fheconv.basics.errors import InvalidArgumentError
from fheconv.lowering.dialect import convolve
from fheconv.lowering.pruning import Plain

# Microseconds of one multiply-add of a dense matrix, measured by tests/benchmarks/engines.py.
MATRIX_COST = 0.3
NO_WORK = "It has no weights, or reads nothing but padding."


@dataclass(frozen=True, kw_only=True)
class ConvolutionEngine:
    """Describes one way to compute a convolution without padding.

    `unit_cost` is the microseconds of one multiply-add, measured by tests/benchmarks/engines.py. The costs
    serve to choose an engine, so only their ratios matter. `count` returns the number of multiply-adds, None
    if the engine cannot compute the convolution. `needs` tells users why it cannot.
    """

    compute: Callable[[Plain, Any], Any]
    count: Callable[[Plain], int | None]
    unit_cost: float
    needs: str


def multiply_adds(plain: Plain) -> dict[str, int]:
    """Return the number of multiply-adds for each engine that can compute the convolution."""
    # Concrete cannot build a convolution whose weights or inputs are all zero.
    if not (plain.weight.any() and plain.inputs.inside):
        return {}
    counts = {name: engine.count(plain) for name, engine in ENGINES.items()}
    return {name: count for name, count in counts.items() if count is not None}


def run(engine: str, plain: Plain, x: Any) -> Any:
    """Return the convolution (N, K', *Out') of x (N, C', *S')."""
    return ENGINES[engine].compute(plain, x)


def _conv_engine(plain: Plain, x: Any) -> Any:
    return convolve(x, plain.weight, plain.stride, plain.dilation, plain.groups)


def _separable_engine(plain: Plain, x: Any) -> Any:
    separated = plain.separated()
    if separated is None:
        raise InvalidArgumentError(ENGINES["separable"].needs)
    columns, rows = separated
    down, across = ((plain.stride[0], 1), (1, plain.stride[1]))
    half = convolve(x, columns, down, (plain.dilation[0], 1), plain.groups)
    return convolve(half, rows, across, (1, plain.dilation[1]), len(plain.weight))


def _shifts_engine(plain: Plain, x: Any) -> Any:
    output = plain.outputs.shape[1:]
    ones = (1,) * len(output)
    y = None
    for tap in plain.nonzero_taps():
        window = tap_slices(tap, output, plain.stride, plain.dilation)
        weight = plain.weight[(slice(None), slice(None), *(slice(t, t + 1) for t in tap))]
        term = convolve(x[(slice(None), slice(None), *window)], weight, ones, ones, plain.groups)
        y = term if y is None else y + term
    return y


def _outputs(plain: Plain) -> int:
    """Return the number of positions of the output."""
    return math.prod(plain.outputs.shape[1:])


def _count_separable(plain: Plain) -> int | None:
    if plain.separated() is None:
        return None
    height, width = plain.weight.shape[2:]
    half = plain.outputs.shape[1] * plain.inputs.shape[2]
    return len(plain.weight) * (height * half + width * _outputs(plain))


ENGINES = {
    "conv": ConvolutionEngine(
        compute=_conv_engine,
        count=lambda plain: plain.weight.size * _outputs(plain),
        unit_cost=1.2,
        needs=NO_WORK,
    ),
    "separable": ConvolutionEngine(
        compute=_separable_engine,
        count=_count_separable,
        unit_cost=2.6,
        needs="Two passes need 2-d filters that read one channel each and have rank one.",
    ),
    "shifts": ConvolutionEngine(
        compute=_shifts_engine,
        count=lambda plain: math.prod(plain.weight.shape[:2]) * len(plain.nonzero_taps()) * _outputs(plain),
        unit_cost=2.7,
        needs=NO_WORK,
    ),
}
