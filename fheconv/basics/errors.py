"""Defines every exception that fheconv raises on purpose.

FheConvError
├── InvalidArgumentError      an argument that has no meaning (stride 0, groups that do not divide…)
│   ├── UnknownKeywordError   a keyword that a call does not have
│   └── LookupBudgetError     fewer lookups than a network can do with
├── UnsupportedLayerError     a layer or option that fheconv cannot turn into integers
├── CalibrationError          calibration data or weights from which no scale can be chosen
├── AccumulatorOverflowError  a proved range that does not fit the accumulator
├── InputRangeError           an image of the wrong shape, type or range
├── CompilationError          Concrete cannot compile the circuit
│   └── CostError             it is known beforehand that the circuit costs too much, or has no parameters
├── ExecutionError            key generation, encryption, evaluation or decryption failed
│   └── UnfinishedError       a run that ended at its time limit, and can go on
├── NotCompiledError          calls in the wrong order
├── TuningError               no circuit that was tried meets the requirements
├── ArtifactError             a ciphertext, key or file that is damaged or belongs elsewhere
├── RemoteError               a server that cannot be reached, is busy or full, or refuses the token
└── MissingExtraError         a package of an optional extra that is not installed

A message says what was wrong, the value, the limit and the next step. What it advises as a remedy was tried
before, and worked.
"""

from collections.abc import Mapping
from typing import Any


class FheConvError(Exception):
    """The root: catch it to catch everything that fheconv raises on purpose.

    Example:
        >>> import fheconv
        >>> try:
        ...     fheconv.max_taps(input_bits=0, weight_bits=2, accumulator_bits=7)
        ... except fheconv.FheConvError as error:
        ...     print(type(error).__name__)
        InvalidArgumentError
    """


class InvalidArgumentError(FheConvError, ValueError):
    """An argument has no meaning for this operation.

    Example:
        >>> import fheconv
        >>> fheconv.QuantConfig(weight_bits=9)
        Traceback (most recent call last):
        fheconv.basics.errors.InvalidArgumentError: weight_bits=9 must be an integer from 1 to 8.
    """


class UnknownKeywordError(InvalidArgumentError, TypeError):
    """A call does not have this keyword. The message names the nearest that it has.

    Example:
        >>> import fheconv
        >>> fheconv.QuantConfig(weights_bits=4)
        Traceback (most recent call last):
        fheconv.basics.errors.UnknownKeywordError: QuantConfig has no weights_bits=4; the nearest ...
    """


class LookupBudgetError(InvalidArgumentError):
    """A network needs more lookups than its budget, with all taken out that can be."""


class UnsupportedLayerError(FheConvError):
    """A layer, or one of its options, cannot be turned into integer arithmetic."""


class CalibrationError(FheConvError, ValueError):
    """No quantization can be chosen from these weights or calibration images.

    Example:
        >>> import fheconv, numpy as np
        >>> fheconv.quantize([[1, 2]], np.full((1, 4, 4), np.nan))
        Traceback (most recent call last):
        fheconv.basics.errors.CalibrationError: calibration contains NaN or infinity; remove those images.
    """


class AccumulatorOverflowError(FheConvError, OverflowError):
    """A proved accumulator range does not fit its width.

    Attributes: `layer` and `channel` (where it happens), `value` (what is needed), `limit` (what is
    available) and `remedy` (what to change, in words). Each is None if it does not apply. `settings` are the
    fields of `QuantConfig` and `CompileConfig` that the remedy sets, empty if there is none.

    Example:
        >>> error = AccumulatorOverflowError("Too wide.", layer="conv1", value=300, limit=127)
        >>> error.layer, error.value - error.limit, error.remedy, error.settings
        ('conv1', 173, None, {})
    """

    def __init__(
        self,
        message: str,
        *,
        layer: str | None = None,
        channel: int | None = None,
        value: int | None = None,
        limit: int | None = None,
        remedy: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.layer = layer
        self.channel = channel
        self.value = value
        self.limit = limit
        self.remedy = remedy
        self.settings = dict(settings or {})


class InputRangeError(FheConvError, ValueError):
    """An image does not have the shape, type or value range that the network takes.

    Example:
        >>> import fheconv, numpy as np
        >>> network = fheconv.quantize([[1, 2]], np.arange(16).reshape(1, 4, 4))
        >>> network(np.full((1, 4, 4), 16))
        Traceback (most recent call last):
        fheconv.basics.errors.InputRangeError: The value 16 at (0, 0, 0) is outside the input range ...
    """


class CompilationError(FheConvError):
    """Concrete cannot compile the circuit.

    Attributes: `remedy`, what to change, in words, None if nothing was found that helps, and `settings`, the
    fields of `QuantConfig` and `CompileConfig` that the remedy sets, empty if there is none.

    Example:
        >>> error = CompilationError("No parameters.", remedy="p_error=0.01", settings={"p_error": 0.01})
        >>> error.remedy, error.settings
        ('p_error=0.01', {'p_error': 0.01})
    """

    def __init__(
        self, message: str, *, remedy: str | None = None, settings: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.remedy = remedy
        self.settings = dict(settings or {})


class CostError(CompilationError):
    """A circuit would cost more than `CompileConfig` allows, or Concrete has no parameters for it.

    It is raised before Concrete starts. `remedy` is a change with which the circuit is allowed.
    """


class ExecutionError(FheConvError):
    """Key generation, encryption, evaluation or decryption failed."""


class UnfinishedError(ExecutionError):
    """A run in stages ended at its time limit. What it has computed is kept, and the next run goes on."""


class NotCompiledError(FheConvError):
    """A step was called before the step it needs."""


class TuningError(FheConvError):
    """No circuit that was tried is accurate enough, or cheap enough."""


class ArtifactError(FheConvError):
    """A ciphertext, key set or file is damaged or belongs to something else.

    Example:
        >>> import fheconv
        >>> fheconv.Ciphertext.from_bytes(b"not a ciphertext")
        Traceback (most recent call last):
        fheconv.basics.errors.ArtifactError: These bytes are no ciphertext: ...
    """


class RemoteError(FheConvError):
    """A server cannot be reached, is busy or full, or refuses the request."""


class MissingExtraError(FheConvError, ImportError):
    """A package from one of fheconv's optional extras is not installed."""
