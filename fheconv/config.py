"""What users choose: how to quantize, and how to compile."""

import sys
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from fheconv.errors import InvalidArgumentError

Engine: TypeAlias = Literal["auto", "conv", "separable", "shifts", "matrix"]


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How to quantize.

    weight_bits: 1 to 8. Symmetric integers in ±(2^(bits−1) − 1); one bit is {−1, +1}.
    input_bits: 1 to 16. How many bits an image value gets.
    per_channel: one weight scale for each output channel (True) or for the whole tensor.
    input_signed: image integers in [−2^(bits−1), 2^(bits−1) − 1] with zero-point 0, instead of
        [0, 2^bits − 1] with the zero-point that calibration asks for.
    input_range: the (smallest, greatest) image value, instead of what calibration shows.
    """

    weight_bits: int = 4
    input_bits: int = 4
    per_channel: bool = True
    input_signed: bool = False
    input_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("per_channel", "input_signed"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise InvalidArgumentError(f"{name}={getattr(self, name)!r} must be True or False.")
        check_integer("weight_bits", self.weight_bits, 1, 8)
        check_integer("input_bits", self.input_bits, 2 if self.input_signed else 1, 16)
        if self.input_range is not None:
            try:
                ends = tuple(self.input_range)
            except TypeError:
                ends = ()
            numbers = len(ends) == 2 and all(map(_is_number, ends))
            low, high = map(float, ends) if numbers else (np.nan, np.nan)
            if not (np.isfinite([low, high]).all() and low < high):
                raise InvalidArgumentError(
                    f"input_range={self.input_range} must be two finite numbers, the smaller first."
                )
            object.__setattr__(self, "input_range", (low, high))
        for name in ("weight_bits", "input_bits"):  # numpy's integers lack int's methods
            object.__setattr__(self, name, int(getattr(self, name)))

    def __str__(self) -> str:
        """Show the call that makes it, widths always and the rest where it is not the default."""
        always = ("weight_bits", "input_bits")
        shown = (
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.name in always or getattr(self, field.name) != field.default
        )
        return f"QuantConfig({', '.join(shown)})"


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """How to compile and run.

    engine: "conv" (Concrete's convolution), "separable" (two passes, for filters of rank one), "shifts" (the
        sum of shifted images, which leaves out zero weights), "matrix" (the dense product x·B), or "auto":
        the one that is predicted to be cheapest.
    p_error: probability that a result goes wrong. None: 2^−64, at the price of ciphertexts some 4 % larger
        than with Concrete's own default.
    compress_input: smaller ciphertexts for the images (bytes instead of kilobytes a pixel), slower to run.
    lanes: how many images of a batch ride in one ciphertext of a network without lookups. "auto" takes as
        many as fit beside each other, 4 at most (more is no faster); 1 is none.
    in_process: run the native library in this process, for debugging. It then takes the process with
        it when it crashes, and makes it exit with status 0 whatever happened.
    time_limit: seconds for one call of the native library: to compile, make keys, encrypt or decrypt a
        batch, run one image. Starting the worker does not count.
    memory_limit: bytes of memory that the native library's process may hold, during a call of this circuit,
        beyond what it has after its imports; checked every 20 ms. If other circuits have filled that
        process to the limit before the call, a new one is started for it. On Linux only.

    A call that exceeds a limit ends with `CompilationError` or `ExecutionError`; the circuit stays usable.
    Raises `InvalidArgumentError`, for limits with `in_process` too: nothing could enforce them there.
    """

    engine: Engine = "auto"
    p_error: float | None = None
    compress_input: bool = False
    lanes: int | Literal["auto"] = "auto"
    in_process: bool = False
    time_limit: float | None = None
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("compress_input", "in_process"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise InvalidArgumentError(f"{name}={getattr(self, name)!r} must be True or False.")
        if not isinstance(self.engine, str) or self.engine not in get_args(Engine):
            raise InvalidArgumentError(
                f"engine={self.engine!r}; it must be one of {', '.join(get_args(Engine))}."
            )
        if not isinstance(self.lanes, str) or self.lanes != "auto":
            check_integer("lanes", self.lanes, 1, 64)
        if self.p_error is not None:
            # Concrete's optimiser dies of numbers that are hardly more than 0.
            if not (_is_number(self.p_error) and 1e-300 <= self.p_error < 1):
                raise InvalidArgumentError(f"p_error={self.p_error!r} must lie between 1e-300 and 1.")
            object.__setattr__(self, "p_error", float(self.p_error))
        if self.time_limit is not None and not (_is_number(self.time_limit) and 0 < self.time_limit < np.inf):
            raise InvalidArgumentError(f"time_limit={self.time_limit!r} must be a number of seconds above 0.")
        if self.memory_limit is not None:
            check_integer("memory_limit", self.memory_limit, 1)
            if sys.platform != "linux":
                raise InvalidArgumentError(
                    f"memory_limit works on Linux only, and this is {sys.platform}; leave it out."
                )
        if self.in_process and (self.time_limit is not None or self.memory_limit is not None):
            raise InvalidArgumentError(
                "time_limit and memory_limit end the worker process, and in_process=True runs without one; "
                "leave out one or the other."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def check_integer(name: str, value: Any, least: int, greatest: int | None = None) -> None:
    """Raise `InvalidArgumentError` unless `value` is an integer from `least` to `greatest`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (greatest is not None and value > greatest):
        limits = f"of at least {least}" if greatest is None else f"from {least} to {greatest}"
        raise InvalidArgumentError(f"{name}={value!r} must be an integer {limits}.")
