"""Holds what a message advises: settings that were tried, and the words for them."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from fheconv.basics.compile_config import CompileConfig
from fheconv.basics.config import QuantConfig
from fheconv.basics.errors import AccumulatorOverflowError, CompilationError

E = TypeVar("E", AccumulatorOverflowError, CompilationError)


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Holds the `words` that end a message, and the `settings` in them that were tried and worked.

    Without such settings, the words promise nothing.

    Example:
        >>> advice = Advice(words="Compile with p_error=0.01.", settings={"p_error": 0.01})
        >>> advice.remedy
        'p_error=0.01'
    """

    words: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def remedy(self) -> str | None:
        """The settings as they are typed, None if there are none."""
        if not self.settings:
            return None
        one_call = not all(_parted(self.settings))
        return spelled(self.settings) if one_call else _phrase(self.settings)

    def after(self, error: E) -> E:
        """Return the error with the advice at the end of its message."""
        told = copy(error)
        told.args = (f"{error} {self.words}",)
        told.remedy, told.settings = self.remedy, dict(self.settings)
        return told


def spelled(settings: Mapping[str, Any]) -> str:
    """Return settings as they are typed.

    Example:
        >>> spelled({"method": "mse", "weight_bits": 3})
        'method="mse" and weight_bits=3'
    """
    return " and ".join(
        f'{name}="{value}"' if isinstance(value, str) else f"{name}={value!r}"
        for name, value in settings.items()
    )


def sentence(settings: Mapping[str, Any]) -> str:
    """Return the sentence that tells to quantize, to compile, or both, with these settings.

    Example:
        >>> sentence({"rounding_bits": 5, "p_error": 0.01})
        'Quantize with rounding_bits=5 and compile with p_error=0.01.'
    """
    said = _phrase(settings)
    return f"{said[0].upper()}{said[1:]}."


def applied(
    settings: Mapping[str, Any], config: QuantConfig, compiling: CompileConfig
) -> tuple[QuantConfig, CompileConfig]:
    """Return both configurations with the settings in them.

    Example:
        >>> applied({"weight_bits": 2, "p_error": 0.01}, QuantConfig(), CompileConfig())
        (QuantConfig(weight_bits=2, input_bits=4), CompileConfig(p_error=0.01))
    """
    quant, chosen = _parted(settings)
    return replace(config, **quant), replace(compiling, **chosen)


def difference(old: QuantConfig, new: QuantConfig) -> dict[str, Any]:
    """Return the fields that `new` changes. Accumulators come first: they are what did not fit.

    Example:
        >>> difference(QuantConfig(), QuantConfig(method="mse", accumulator_bits=8))
        {'accumulator_bits': 8, 'method': 'mse'}
    """
    names = [one.name for one in fields(old) if getattr(old, one.name) != getattr(new, one.name)]
    return {name: getattr(new, name) for name in sorted(names, key=lambda name: name != "accumulator_bits")}


def _phrase(settings: Mapping[str, Any]) -> str:
    quant, compiling = _parted(settings)
    words = [f"quantize with {spelled(quant)}"] if quant else []
    words += [f"compile with {spelled(compiling)}"] if compiling else []
    return " and ".join(words)


def _parted(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of `QuantConfig`, and those of `CompileConfig`. They share no name."""
    quant = {one.name for one in fields(QuantConfig)}
    return (
        {name: value for name, value in settings.items() if name in quant},
        {name: value for name, value in settings.items() if name not in quant},
    )
