"""Reads off a function of one variable which few numbers it can give, at equal distances: its grid.

Training for integers (QAT) leaves such functions. Some call an operator for it
(`fake_quantize_per_tensor_affine`), others divide, round, clamp and multiply.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fheconv.networks.expression import Expression
from fheconv.networks.quantization import Quantization

# An activation has at most 8 bits.
MOST_LEVELS = 256
# Where a grid ends is measured at 0 and at numbers of many sizes, up to this one.
FARTHEST = 1e30
# Zero-points are whole numbers except for the rounding of floats.
ROUNDING = 1e-3
# Operators with which training for integers rounds weights, or says what integers stand for.
ROUNDING_OPERATORS = {
    "dequantize_affine", "dequantize_per_channel", "dequantize_per_tensor",
    "fake_quantize_per_channel_affine", "fake_quantize_per_tensor_affine", "round",
}  # fmt: skip
# What these give are whole numbers.
_WHOLE = (
    "ceil", "eq", "floor", "ge", "gt", "le", "logical_and", "logical_not", "logical_or", "lt", "ne", "round",
    "sign", "trunc",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """Describes the numbers step · k + shift for integers k in [low, high]; an end may be infinite."""

    step: float
    shift: float
    low: float
    high: float

    def scaled(self, factor: float, shift: float = 0.0) -> "_Grid":
        """Return the grid times `factor` plus `shift`."""
        return replace(self, step=self.step * factor, shift=self.shift * factor + shift)

    def clamped(self, least: float, greatest: float) -> "_Grid | None":
        """Return what is left between two numbers, each on the grid or beyond it; None if it is not."""
        ends = sorted((end - self.shift) / self.step for end in (least, greatest))
        for end in ends:
            inside = self.low < end < self.high
            if inside and np.isfinite(end) and abs(end - np.rint(end)) > ROUNDING:
                return None
        low, high = (float(np.clip(np.rint(end), self.low, self.high)) for end in ends)
        return replace(self, low=low, high=high)


def trained_quantization(function: Expression | None) -> Quantization | None:
    """Return the quantization that a function ends with, as training left it, or None.

    Its numbers are at equal distances, at most 256 of them, and 0 is one of them, or in the middle between
    two: of −1 and 1, as binary networks have them, 0 is counted too.

    Example:
        >>> from fheconv.networks.expression import X
        >>> trained = Expression("fake_quantize_per_tensor_affine", (X, 0.5, 2, -1, 6))
        >>> trained_quantization(trained).real_range
        (-1.5, 2.0)
    """
    grid = None if function is None else _grid(function)
    if grid is None or not grid.step:
        return None
    if grid.step < 0:
        grid = replace(grid, step=-grid.step, low=-grid.high, high=-grid.low)
    zero_point = -grid.shift / grid.step - grid.low
    if abs(zero_point % 1 - 0.5) <= ROUNDING:
        grid = replace(grid, step=grid.step / 2, low=2 * grid.low, high=2 * grid.high)
        zero_point *= 2
    if not 0 < grid.high - grid.low < MOST_LEVELS or abs(zero_point - np.rint(zero_point)) > ROUNDING:
        return None
    if not grid.low <= zero_point + grid.low <= grid.high or not np.isfinite(grid.step):
        return None
    return Quantization(
        scale=grid.step, zero_point=int(np.rint(zero_point)), minimum=0, maximum=int(grid.high - grid.low)
    )


def _grid(function: Expression) -> _Grid | None:
    """Return the grid of a function, None if it has none that is known here."""
    name, arguments = function.operator, function.arguments
    if name in _WHOLE:
        return _Grid(step=1.0, shift=0.0, **_ends(function))
    if name in ("fake_quantize_per_tensor_affine", "quantize_per_tensor"):
        _, scale, zero, low, high = arguments
        if np.ndim(scale) or np.ndim(zero):
            return None
        numbers = _Grid(step=1.0, shift=0.0, low=low, high=high)
        if name == "quantize_per_tensor":
            return numbers
        return _dequantized(numbers, None, scale, zero)
    if name == "where":
        return _of_where(*arguments)
    inner = [part for part in arguments if isinstance(part, Expression)]
    if len(inner) != 1 or any(np.ndim(part) for part in arguments):
        return None
    grid = _grid(inner[0]) if name in _KEEPING else None
    return None if grid is None else _KEEPING[name](grid, *arguments, **dict(function.options))


def _ends(function: Expression) -> dict[str, float]:
    """Return the least and the greatest number that a function gives, found by trying."""
    sizes = np.concatenate([[0], np.logspace(-6, np.log10(FARTHEST), 2000)])
    axes = max((array.ndim for array in function.arrays()), default=1)
    x = np.concatenate([-sizes[::-1], sizes]).reshape(-1, *[1] * axes)
    values = function(x)
    if np.isnan(values).any():
        return {"low": -np.inf, "high": np.inf}
    low, high = float(values.min()), float(values.max())
    return {"low": low if low > -(2**31) else -np.inf, "high": high if high < 2**31 else np.inf}


def _of_where(condition: Any, x: Any, y: Any) -> _Grid | None:
    """Return the grid of two numbers, or of where(v > c, c, v), or with <: the way in which some clamp."""
    if not isinstance(x, Expression) and not isinstance(y, Expression):
        two = np.ndim(x) == np.ndim(y) == 0 and np.isfinite([x, y]).all()
        return _Grid(step=abs(float(x - y)), shift=float(min(x, y)), low=0.0, high=1.0) if two else None
    if not isinstance(condition, Expression) or condition.operator not in ("gt", "ge", "lt", "le"):
        return None
    value, end = condition.arguments
    above = condition.operator.startswith("g")
    clamps = isinstance(value, Expression) and _same(y, value) and not isinstance(x, Expression)
    if not clamps or np.ndim(x) or np.ndim(end) or x != end:
        return None
    grid = _grid(value)
    if grid is None:
        return None
    return grid.clamped(-np.inf, float(x)) if above else grid.clamped(float(x), np.inf)


def _same(a: Any, b: Any) -> bool:
    """Return whether two expressions, or parts of them, are written alike."""
    if isinstance(a, Expression) and isinstance(b, Expression):
        alike = (a.operator, a.options, len(a.arguments)) == (b.operator, b.options, len(b.arguments))
        return a is b or (alike and all(map(_same, a.arguments, b.arguments)))
    return type(a) is type(b) and np.array_equal(a, b)


def _sum(grid: _Grid, x: Any, y: Any, alpha: float = 1) -> _Grid:
    """Return the grid of x + alpha · y, one of them a number."""
    return grid.scaled(alpha, float(x)) if isinstance(y, Expression) else grid.scaled(1, alpha * float(y))


def _difference(grid: _Grid, x: Any, y: Any, alpha: float = 1) -> _Grid:
    return _sum(grid, x, y, -alpha)


def _product(grid: _Grid, x: Any, y: Any) -> _Grid:
    return grid.scaled(float(x if isinstance(y, Expression) else y))


def _quotient(grid: _Grid, x: Any, y: Any, rounding_mode: str | None = None) -> _Grid | None:
    usable = rounding_mode is None and not isinstance(y, Expression) and y
    return grid.scaled(1 / float(y)) if usable else None


def _dequantized(grid: _Grid, _: Any, scale: Any, zero: Any) -> _Grid:
    step = float(np.float32(scale))  # torch multiplies with it in float32
    return grid.scaled(step, -float(zero) * step)


def _clamp(grid: _Grid, _: Any, low: Any = None, high: Any = None) -> _Grid | None:
    return grid.clamped(-np.inf if low is None else low, np.inf if high is None else high)


# The operators that keep a grid, with functions of the grid of their one argument and of all arguments.
_KEEPING: dict[str, Any] = {
    "add": _sum,
    "clamp": _clamp,
    "clamp_max": lambda grid, x, high: grid.clamped(-np.inf, high),
    "clamp_min": lambda grid, x, low: grid.clamped(low, np.inf),
    "dequantize_per_tensor": _dequantized,
    "div": _quotient,
    "hardtanh": lambda grid, x, low=-1.0, high=1.0: grid.clamped(low, high),
    "maximum": lambda grid, x, y: grid.clamped(float(x if isinstance(y, Expression) else y), np.inf),
    "minimum": lambda grid, x, y: grid.clamped(-np.inf, float(x if isinstance(y, Expression) else y)),
    "mul": _product,
    "neg": lambda grid, x: grid.scaled(-1),
    "relu": lambda grid, x: grid.clamped(0.0, np.inf),
    "relu6": lambda grid, x: grid.clamped(0.0, 6.0),
    "rsub": lambda grid, x, y, alpha=1: _sum(grid, y, x, -alpha),
    "sub": _difference,
}
