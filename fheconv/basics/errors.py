"""Defines every exception that fheconv raises on purpose.

FheConvError
├── InvalidArgumentError      an argument that has no meaning (stride 0, groups that do not divide…)
├── UnsupportedLayerError     a layer or option that fheconv cannot turn into integers
├── CalibrationError          calibration data or weights from which no scale can be chosen
├── AccumulatorOverflowError  a proved range that does not fit the accumulator
├── InputRangeError           an image of the wrong shape, type or range
├── CompilationError          Concrete cannot compile the circuit
├── ExecutionError            key generation, encryption, evaluation or decryption failed
├── NotCompiledError          calls in the wrong order
├── TuningError               no circuit that was tried meets the requirements
├── ArtifactError             a ciphertext, key or file that is damaged or belongs elsewhere
├── RemoteError               a server that cannot be reached, is busy or full, or refuses the token
└── MissingExtraError         a package of an optional extra that is not installed

A message says what was wrong, the value, the limit and the next step.
"""


class FheConvError(Exception):
    """The root: catch it to catch everything that fheconv raises on purpose."""


class InvalidArgumentError(FheConvError, ValueError):
    """An argument has no meaning for this operation."""


class UnsupportedLayerError(FheConvError):
    """A layer, or one of its options, cannot be turned into integer arithmetic."""


class CalibrationError(FheConvError, ValueError):
    """No quantization can be chosen from these weights or calibration images."""


class AccumulatorOverflowError(FheConvError, OverflowError):
    """A proved accumulator range does not fit its width.

    Attributes: `layer` and `channel` (where it happens), `value` (what is needed), `limit` (what is
    available) and `remedy` (what to change). Each is None if it does not apply.

    Example:
        >>> error = AccumulatorOverflowError("Too wide.", layer="conv1", value=300, limit=127)
        >>> error.layer, error.value - error.limit, error.remedy
        ('conv1', 173, None)
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
    ) -> None:
        super().__init__(message)
        self.layer = layer
        self.channel = channel
        self.value = value
        self.limit = limit
        self.remedy = remedy


class InputRangeError(FheConvError, ValueError):
    """An image does not have the shape, type or value range that the network takes."""


class CompilationError(FheConvError):
    """Concrete cannot compile the circuit."""


class ExecutionError(FheConvError):
    """Key generation, encryption, evaluation or decryption failed."""


class NotCompiledError(FheConvError):
    """A step was called before the step it needs."""


class TuningError(FheConvError):
    """No circuit that was tried is accurate enough, or cheap enough."""


class ArtifactError(FheConvError):
    """A ciphertext, key set or file is damaged or belongs to something else."""


class RemoteError(FheConvError):
    """A server cannot be reached, is busy or full, or refuses the request."""


class MissingExtraError(FheConvError, ImportError):
    """A package from one of fheconv's optional extras is not installed."""
