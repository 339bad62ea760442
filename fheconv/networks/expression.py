"""Describes functions of one variable, such as activations and chains of them.

Lookup tables are made from these functions. They are plain data with torch's names of operators. Numpy
computes them in float64, so that building a table needs no torch and gives the same integers on every
machine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.special

from fheconv.basics.arrays import Array


@dataclass(frozen=True, eq=False)
class Expression:
    """Applies an operator of `FUNCTIONS` to expressions, numbers, or arrays (C, *1) of numbers.

    `Expression("x")` is the variable.
    """

    operator: str
    arguments: tuple[Any, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, x: Array) -> Array:
        """Return the values at `x` (N, C, *S), float64."""
        if self.operator == "x":
            return x
        values = (part(x) if isinstance(part, Expression) else part for part in self.arguments)
        with np.errstate(all="ignore"):  # whoever builds a table checks what is not finite
            return np.asarray(FUNCTIONS[self.operator](*values, **dict(self.options)), np.float64)

    def __str__(self) -> str:
        """Return the expression as a formula, such as relu(x)."""
        if self.operator == "x":
            return "x"
        shown = [*map(_shown, self.arguments), *(f"{name}={_shown(value)}" for name, value in self.options)]
        return f"{self.operator}({', '.join(shown)})"

    def operators(self) -> list[str]:
        """Return the names of what it computes, such as relu, the first applied first.

        Sums and products with constants are left out, unless there is nothing else.
        """
        parts = [part for part in self.arguments if isinstance(part, Expression)]
        names = [name for part in parts for name in part.operators() if name != "identity"]
        if self.operator != "x" and (self.operator not in _SCALING or len(parts) > 1):
            names.append(self.operator)
        return list(dict.fromkeys(names)) or ["identity"]

    def arrays(self) -> list[Array]:
        """Return the constants that are arrays."""
        inner = (part.arrays() for part in self.arguments if isinstance(part, Expression))
        own = [part for part in self.arguments if isinstance(part, np.ndarray) and part.ndim]
        return [*own, *(array for arrays in inner for array in arrays)]

    def at(self, shape: tuple[int, ...], positions: Array) -> "Expression":
        """Return the function at some flat positions of a tensor (C, *S), for values (positions, …)."""

        def part(value: Any) -> Any:
            if isinstance(value, Expression):
                return value.at(shape, positions)
            if isinstance(value, np.ndarray) and value.ndim:
                return np.broadcast_to(value, shape).ravel()[positions][:, None]
            return value

        return Expression(self.operator, tuple(map(part, self.arguments)), self.options)

    def of(self, inner: "Expression") -> "Expression":
        """Return the composition: this function, applied to the result of `inner`."""
        if self.operator == "x":
            return inner
        parts = (part.of(inner) if isinstance(part, Expression) else part for part in self.arguments)
        return Expression(self.operator, tuple(parts), self.options)


X = Expression("x")
# These only scale and shift, if all but one of their arguments are constants.
_SCALING = ("add", "sub", "rsub", "mul", "div", "neg", "dequantize_per_tensor")


def _shown(part: Any) -> str:
    if np.ndim(part):
        return "…"
    return f"{part:g}" if isinstance(part, int | float) else str(part)


def _clamp(x: Any, low: Any = None, high: Any = None) -> Any:
    return x if low is None and high is None else np.clip(x, low, high)


def _elu(x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    return np.where(x > 0, scale * x, scale * alpha * np.expm1(input_scale * np.minimum(x, 0)))


def _gelu(x: Any, approximate: str = "none") -> Any:
    if approximate == "tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return x * scipy.special.ndtr(x)


def _softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    return np.where(x * beta > threshold, x, np.logaddexp(0, x * beta) / beta)


def _divide(x: Any, y: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode == "floor":
        return np.floor_divide(x, y)
    quotient = np.true_divide(x, y)
    return quotient if rounding_mode is None else np.trunc(quotient)


def _fake_quantize(x: Any, scale: Any, zero_point: Any, low: int, high: int) -> Any:
    """Round to the nearest of the numbers scale · (low … high − zero_point)."""
    return _dequantize(_quantize(x, scale, zero_point, low, high), scale, zero_point)


def _quantize(x: Any, scale: Any, zero_point: Any, low: int, high: int) -> Any:
    """Return the integers that torch quantizes to: it multiplies with the inverse of a scale, in float32."""
    inverse = np.float64(np.float32(1) / np.float32(scale))
    return np.clip(np.rint(x * inverse) + zero_point, low, high)


def _dequantize(x: Any, scale: Any, zero_point: Any) -> Any:
    return (x - zero_point) * np.float64(np.float32(scale))


# The keys are torch's names; the functions take torch's arguments.
ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": lambda x, y, alpha=1: np.add(x, np.multiply(y, alpha)),
    "and": np.logical_and,
    "asinh": np.arcsinh,
    "atan": np.arctan,
    "ceil": np.ceil,
    "celu": lambda x, alpha=1.0: _elu(x, alpha, 1.0, 1 / alpha),
    "clamp": _clamp,
    "clamp_max": np.minimum,
    "clamp_min": np.maximum,
    "cos": np.cos,
    "cosh": np.cosh,
    "dequantize_per_tensor": _dequantize,
    "div": _divide,
    "elu": _elu,
    "eq": np.equal,
    "erfc": scipy.special.erfc,
    "erf": scipy.special.erf,
    "exp": np.exp,
    "expm1": np.expm1,
    "exp2": np.exp2,
    "fake_quantize_per_tensor_affine": _fake_quantize,
    "floor": np.floor,
    "floor_divide": np.floor_divide,
    "fmod": np.fmod,
    "frac": lambda x: x - np.trunc(x),
    "ge": np.greater_equal,
    "gelu": _gelu,
    "gt": np.greater,
    "hardshrink": lambda x, lambd=0.5: np.where(np.abs(x) > lambd, x, 0.0),
    "hardsigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hardtanh": lambda x, low=-1.0, high=1.0: np.clip(x, low, high),
    "le": np.less_equal,
    "leaky_relu": lambda x, slope=0.01: np.where(x > 0, x, x * slope),
    "log": np.log,
    "log10": np.log10,
    "log1p": np.log1p,
    "log2": np.log2,
    "log_sigmoid": lambda x: -np.logaddexp(0, -x),
    "logical_and": np.logical_and,
    "logical_not": np.logical_not,
    "logical_or": np.logical_or,
    "lt": np.less,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "or": np.logical_or,
    "pow": np.power,
    "quantize_per_tensor": _quantize,
    "prelu": lambda x, slope: np.where(x > 0, x, x * slope),
    "reciprocal": lambda x: np.true_divide(1.0, x),
    "remainder": np.mod,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "round": np.rint,
    "rsqrt": lambda x: np.true_divide(1.0, np.sqrt(x)),
    "rsub": lambda x, y, alpha=1: np.subtract(y, np.multiply(x, alpha)),
    "selu": lambda x: _elu(x, 1.6732632423543772, 1.0507009873554805),
    "sigmoid": scipy.special.expit,
    "sign": np.sign,
    "silu": lambda x: x * scipy.special.expit(x),
    "sin": np.sin,
    "sinh": np.sinh,
    "softplus": _softplus,
    "softshrink": lambda x, lambd=0.5: np.sign(x) * np.maximum(np.abs(x) - lambd, 0),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "sqrt": np.sqrt,
    "square": np.square,
    "sub": lambda x, y, alpha=1: np.subtract(x, np.multiply(y, alpha)),
    "tan": np.tan,
    "tanh": np.tanh,
    "tanhshrink": lambda x: x - np.tanh(x),
    "threshold": lambda x, threshold, value: np.where(x > threshold, x, value),
    "trunc": np.trunc,
    "where": np.where,
}
# The last three act on whole rows, not on elements. They are allowed only at the end, where the client
# computes them.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **ELEMENTWISE,
    "argmax": np.argmax,
    "log_softmax": scipy.special.log_softmax,
    "softmax": scipy.special.softmax,
}
