"""Holds what users choose about compilation."""

import sys
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from fheconv.basics.checks import _is_number, check_integer
from fheconv.basics.errors import InvalidArgumentError
from fheconv.basics.keywords import answers_keywords, shown_call

Engine: TypeAlias = Literal["auto", "conv", "separable", "shifts", "matrix"]


SECURITY_LEVELS = (128, 132)
# Unless asked for: the probability that anything goes wrong in an image, Concrete's default, and that a
# result goes wrong in a network without lookups.
GLOBAL_P_ERROR = 1e-5
LINEAR_P_ERROR = 2.0**-64
# The same of a lookup whose accumulators are rounded, which may be off by a step anyway. With it the
# simulated accuracy of TinyCNN and RESCNN is that of the clear integers. Less makes lookups dearer.
ROUNDED_P_ERROR = 0.03


@answers_keywords
@dataclass(frozen=True, kw_only=True)
class ParameterRange:
    """Limits the TFHE parameters that Concrete may choose from; () allows all that it knows.

    log2_polynomial_sizes and glwe_dimensions set the shape of what a lookup computes with, and of the
    bootstrapping key. keyswitch_levels sets the key switch before each lookup. Security is not a choice here:
    the noise of keys follows from these dimensions and the security level.

    If no parameters in the range work, Concrete silently takes others, or finds none. Raises
    `InvalidArgumentError` for numbers that no parameters have.

    Example:
        >>> ParameterRange(glwe_dimensions=(1, 2)).keyswitch_levels
        ()
    """

    log2_polynomial_sizes: tuple[int, ...] = ()
    glwe_dimensions: tuple[int, ...] = ()
    keyswitch_levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, (least, greatest) in _PARAMETERS.items():
            for number in getattr(self, name):
                check_integer(name, number, least, greatest)


# The smallest and the greatest number that Concrete's optimiser tries.
_PARAMETERS = {"log2_polynomial_sizes": (8, 18), "glwe_dimensions": (1, 6), "keyswitch_levels": (1, 64)}


@answers_keywords
@dataclass(frozen=True, kw_only=True, repr=False)
class CompileConfig:
    """Holds the choices for compiling and running.

    engine: "conv" (Concrete's convolution), "separable" (two passes, for filters of rank one), "shifts" (the
        sum of shifted images, without zero weights), "matrix" (the dense product x·B), or "auto": the one
        with the lowest predicted cost.
    p_error: the probability that a lookup goes wrong, or a result in a network without lookups. None, and no
        global_p_error: 0.03 if accumulators are rounded before lookups, which may be off by one step anyway;
        2^−64 without lookups, where ciphertexts are some 4 % larger than with Concrete's own default.
    global_p_error: the probability that anything goes wrong in one image. None, and no p_error: 10^−5,
        Concrete's default, with lookups that are all exact. A greater number makes lookups cheaper. A failed
        lookup mostly returns a neighbouring entry.
    security_level: bits, 128 or 132.
    compress_input: smaller ciphertexts for the images (bytes instead of kilobytes a pixel). None: only in
        networks with lookups; a network without lookups runs slower with it.
    compress_evaluation_keys: smaller evaluation keys.
    parameters: the range from which Concrete chooses its parameters. None: all, or as `configuration` says.
    configuration: a `concrete.fhe.Configuration` that gives all other settings, such as strategies.
    lanes: how many images of a batch share one ciphertext in a network without lookups. "auto": as many as
        fit, at most 4 (more is no faster). 1: no sharing.
    in_process: run the native library in this process, for debugging. A crash of the library then ends this
        process too, and the process then exits with status 0 in every case.
    time_limit: seconds for one call of the native library: to compile, make keys, encrypt or decrypt a batch,
        or run one image (in stages: one block). Starting the worker does not count.
    memory_limit: bytes of memory that the native library's process may hold during a call of this circuit,
        beyond what it has after its imports. Checked every 20 ms, on Linux only. If other circuits have
        filled the process to the limit before the call, a new process starts.

    most_seconds: the seconds that an encrypted image may take by the forecast. Above, `fheconv.compile`
        raises `CostError` before Concrete starts. None: no limit.
    most_key_bytes: in the same way, the bytes of evaluation keys in memory.

    A call that exceeds `time_limit` or `memory_limit` ends with `CompilationError` or `ExecutionError`; the
    circuit stays usable. Raises `InvalidArgumentError`, also for these two together with `in_process`: there,
    nothing could enforce them.

    Example:
        >>> config = CompileConfig(engine="shifts", p_error=1e-6)
        >>> config.engine, config.security_level
        ('shifts', 128)
    """

    engine: Engine = "auto"
    p_error: float | None = None
    global_p_error: float | None = None
    security_level: int = 128
    compress_input: bool | None = None
    compress_evaluation_keys: bool = True
    parameters: ParameterRange | None = None
    configuration: Any = None
    lanes: int | Literal["auto"] = "auto"
    in_process: bool = False
    time_limit: float | None = None
    memory_limit: int | None = None
    most_seconds: float | None = 3600.0
    most_key_bytes: int | None = 16 * 10**9

    def __post_init__(self) -> None:
        for name in ("compress_input", "compress_evaluation_keys", "in_process"):
            value = getattr(self, name)
            if not (isinstance(value, bool | np.bool_) or (name == "compress_input" and value is None)):
                raise InvalidArgumentError(f"{name}={value!r} must be True or False.")
        if not _is_number(self.security_level) or self.security_level not in SECURITY_LEVELS:
            raise InvalidArgumentError(
                f"security_level={self.security_level!r}; Concrete has parameters for "
                f"{' and '.join(map(str, SECURITY_LEVELS))} bits."
            )
        if not isinstance(self.engine, str) or self.engine not in get_args(Engine):
            raise InvalidArgumentError(
                f"engine={self.engine!r}; it must be one of {', '.join(get_args(Engine))}."
            )
        if not isinstance(self.lanes, str) or self.lanes != "auto":
            check_integer("lanes", self.lanes, 1, 64)
        if self.configuration is not None and type(self.configuration).__name__ != "Configuration":
            raise InvalidArgumentError(
                f"configuration={self.configuration!r:.50}; it must be a concrete.fhe.Configuration."
            )
        for name in ("range_restriction", "keyset_restriction"):  # they do not get into another process
            if getattr(self.configuration, name, None) is not None and not self.in_process:
                raise InvalidArgumentError(
                    f"configuration.{name} cannot be passed to the native library's process; use "
                    "CompileConfig.parameters instead, or in_process=True."
                )
        if self.parameters is not None and not isinstance(self.parameters, ParameterRange):
            raise InvalidArgumentError(
                f"parameters={self.parameters!r:.50}; it must be a fheconv.ParameterRange."
            )
        for name in ("p_error", "global_p_error"):
            value = getattr(self, name)
            if value is not None:
                # Concrete's optimiser crashes on numbers that are hardly above 0.
                if not (_is_number(value) and 1e-300 <= value < 1):
                    raise InvalidArgumentError(f"{name}={value!r} must lie between 1e-300 and 1.")
                object.__setattr__(self, name, float(value))
        if self.time_limit is not None and not (_is_number(self.time_limit) and 0 < self.time_limit < np.inf):
            raise InvalidArgumentError(f"time_limit={self.time_limit!r} must be a number of seconds above 0.")
        if self.most_seconds is not None and not (_is_number(self.most_seconds) and self.most_seconds > 0):
            raise InvalidArgumentError(
                f"most_seconds={self.most_seconds!r} must be a number above 0, or None."
            )
        if self.most_key_bytes is not None:
            check_integer("most_key_bytes", self.most_key_bytes, 1)
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

    def __repr__(self) -> str:
        """Show the call that makes this configuration, without defaults."""
        return shown_call(self)
