"""What users choose: how to quantize, and how to compile."""

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from fheconv.basics.checks import Auto, _is_number, _number, check_integer
from fheconv.basics.errors import InvalidArgumentError

Engine: TypeAlias = Literal["auto", "conv", "separable", "shifts", "matrix"]


# What holds for every layer, or for each by its name.
PerLayer: TypeAlias = int | Mapping[str, int]
PerLayerOrAuto: TypeAlias = int | Auto | Mapping[str, int | Auto]
Overflow: TypeAlias = Literal["proved", "calibrated"]
Method: TypeAlias = Literal["auto", "minmax", "mse", "gptq", "accumulator"]


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How to quantize.

    weight_bits: 1 to 8. Symmetric integers in ±(2^(bits−1) − 1); one bit is {−1, 0, +1}.
    activation_bits: 1 to 8. How many bits the output of a lookup gets. None: 4, or half of accumulator_bits
        if that is less, so that an accumulator holds some products.
    activation_levels: 2 to 256. How many integers the output of a lookup can be, instead of
        activation_bits: it need not be a power of two, and where accumulators are narrow each one counts.
    accumulator_bits: 1 to 16, the width that every accumulator is guaranteed to have at most, in offset
        form; None: whatever the weights need, or, before a rounded lookup, 4 more than rounding_bits:
        rounding loses what weights gain from more.
    rounding_bits: 2 to 8. How many bits are left of an accumulator that enters a lookup; the others are
        rounded away, approximately, which makes the lookup cheaper. None: all. (Of one bit nothing would be
        left: rounding needs a step free at both ends.)
    overflow: "proved": accumulators are as wide as the worst image needs. "calibrated": as wide as what
        calibration observed, and `margin` more at both ends; values outside give wrong results.
    margin: of "calibrated", as a share of the observed range.
    method: how weights are rounded. "minmax": to the nearest integers, where a filter's greatest weight
        becomes the greatest integer. "mse": to the integers and the scale of least squared error. "gptq": to
        those that change what the layer computes on the calibration images least. "accumulator": the same,
        under the budget of `accumulator_bits`, to which no other method keeps. "auto": "accumulator", but
        "mse" for a single convolution without `accumulator_bits`, which then does not depend on the images.
    input_bits: 1 to 16. How many bits an image value gets.
    input_levels: 2 to 65536. How many integers an image value can be, instead of input_bits.
    per_channel: one weight scale for each output channel (True), or for the whole tensor, which "minmax" and
        "mse" can do.
    input_signed: image integers in [−2^(bits−1), 2^(bits−1) − 1] with zero-point 0, instead of
        [0, 2^bits − 1] with the zero-point that calibration asks for.
    input_range: the (smallest, greatest) image value, instead of what calibration shows.

    What layers have is one number for all of them, or a number for each by its name, such as {"conv1": 3};
    layers that are not named get the default.

    weight_bits, activation_bits, accumulator_bits and input_bits can be "auto", the first three also for a
    layer by its name: `fheconv.quantize` then chooses them on calibration images, every fifth of which it
    holds out (of fewer than 20 images all serve for both). Weights of 2 to 6 bits, 2 to 28 integers for each
    activation and for image values are balanced against the accumulators, so that accumulator_bits, or
    rounding_bits, have to be given too. Of accumulators only those that enter lookups are "auto": they get
    one width, the least up to 8 (with rounding_bits, up to 4 more than those) at which the network's results
    differ from the float network's by at most 6 % of their variance, or else the one of least difference.
    The network's own `config` has the numbers that were chosen.
    """

    weight_bits: PerLayerOrAuto = 4
    activation_bits: PerLayerOrAuto | None = None
    activation_levels: PerLayer | None = None
    accumulator_bits: PerLayerOrAuto | None = None
    rounding_bits: PerLayer | None = None
    overflow: Overflow = "proved"
    margin: float = 0.25
    method: Method = "auto"
    input_bits: int | Auto = 4
    input_levels: int | None = None
    per_channel: bool = True
    input_signed: bool = False
    input_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("per_channel", "input_signed"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise InvalidArgumentError(f"{name}={getattr(self, name)!r} must be True or False.")
        for name, words in (("overflow", get_args(Overflow)), ("method", get_args(Method))):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in words:
                raise InvalidArgumentError(
                    f"{name}={getattr(self, name)!r}; it must be one of {', '.join(words)}."
                )
        if not (_is_number(self.margin) and 0 <= self.margin < np.inf):
            raise InvalidArgumentError(f"margin={self.margin!r} must be a number of at least 0.")
        for name, (least, greatest) in _LAYER_NUMBERS.items():
            value = getattr(self, name)
            if isinstance(value, Mapping):
                value = {
                    str(layer): _number(f"{name}[{layer!r}]", one, least, greatest, auto=name in _AUTO)
                    for layer, one in value.items()
                }
            elif value is not None or name == "weight_bits":
                value = _number(name, value, least, greatest, auto=name in _AUTO)
            object.__setattr__(self, name, value)
        bits = _number("input_bits", self.input_bits, 2 if self.input_signed else 1, 16, auto=True)
        object.__setattr__(self, "input_bits", bits)
        if self.input_levels is not None:
            check_integer("input_levels", self.input_levels, 3 if self.input_signed else 2, 2**16)
            object.__setattr__(self, "input_levels", int(self.input_levels))
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
        unbalanced = [name for name in _AUTO if name != "accumulator_bits" and self.asks(name)]
        if unbalanced and not self.accumulator_bits and not (self.rounding_bits and self._keeps_widths):
            raise InvalidArgumentError(
                f'{unbalanced[0]}="auto" balances it against the width of accumulators, and any width is '
                'allowed; give accumulator_bits too, a number or "auto".'
            )

    @property
    def is_auto(self) -> bool:
        """Whether there are numbers to choose."""
        return any(map(self.asks, _AUTO))

    def asks(self, name: str) -> bool:
        """Whether some number of this name, such as "weight_bits", is "auto"."""
        value = getattr(self, name)
        return "auto" in (value.values() if isinstance(value, Mapping) else (value,))

    @property
    def _keeps_widths(self) -> bool:
        """Whether weights are chosen to keep accumulators to widths."""
        return self.method in ("auto", "accumulator")

    def of_layer(self, name: str, layer: str) -> Any:
        """Return what was chosen for a layer, of what layers have, such as "weight_bits"."""
        value = getattr(self, name)
        if not isinstance(value, Mapping):
            return value
        default = next(field.default for field in fields(self) if field.name == name)
        return value.get(layer, default)

    def activation_levels_of(self, layer: str) -> int:
        """Return how many integers the output of a layer's lookups can be."""
        if levels := self.of_layer("activation_levels", layer):
            return int(levels)
        chosen, limit = self.of_layer("activation_bits", layer), self.of_layer("accumulator_bits", layer)
        return 2 ** int(chosen or min(4, 4 if limit is None else max(limit // 2, 1)))

    def input_ends(self) -> tuple[int, int]:
        """Return the least and the greatest integer that an image value can be."""
        levels = self.input_levels or 2 ** int(self.input_bits)
        return (-(levels // 2), levels - 1 - levels // 2) if self.input_signed else (0, levels - 1)

    def accumulator_bits_of(self, layer: str, *, looks_up: bool) -> int | None:
        """Return the width that a layer's accumulators have to keep to, None for any."""
        limit, rounding = self.of_layer("accumulator_bits", layer), self.of_layer("rounding_bits", layer)
        if limit is None and rounding is not None and looks_up and self._keeps_widths:
            return min(rounding + ROUNDED_AWAY, _LAYER_NUMBERS["accumulator_bits"][1])
        return limit

    def check_layers(self, layers: Collection[str]) -> None:
        """Raise `InvalidArgumentError` for numbers of a layer that there is not."""
        for name in _LAYER_NUMBERS:
            value = getattr(self, name)
            unknown = [layer for layer in value if layer not in layers] if isinstance(value, Mapping) else []
            if unknown:
                raise InvalidArgumentError(
                    f"{name} names {', '.join(map(repr, unknown))}; the layers of this network are "
                    f"{', '.join(map(repr, layers))}."
                )

    def __str__(self) -> str:
        """Show the call that makes it, widths always and the rest where it is not the default."""
        always = ("weight_bits", "input_bits")
        shown = (
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.name in always or getattr(self, field.name) != field.default
        )
        return f"QuantConfig({', '.join(shown)})"


# How many bits of an accumulator are rounded away, unless its width was chosen.
ROUNDED_AWAY = 4
# The least and the most.
_LAYER_NUMBERS = {
    "weight_bits": (1, 8),
    "activation_bits": (1, 8),
    "activation_levels": (2, 256),
    "accumulator_bits": (1, 16),
    "rounding_bits": (2, 8),
}
# What can be left to `fheconv.quantize`.
_AUTO = ("weight_bits", "activation_bits", "accumulator_bits", "input_bits")


SECURITY_LEVELS = (128, 132)


@dataclass(frozen=True, kw_only=True)
class ParameterRange:
    """The parameters of TFHE that Concrete may choose from; () leaves it all that it knows.

    log2_polynomial_sizes and glwe_dimensions shape what a lookup computes with, and the bootstrapping key;
    keyswitch_levels the key switch before each lookup. Security is not among them: the noise of keys follows
    from these dimensions and the security level.

    Where no parameters of the range do, Concrete takes others without a word, or finds none.
    Raises `InvalidArgumentError` for numbers that no parameters have.
    """

    log2_polynomial_sizes: tuple[int, ...] = ()
    glwe_dimensions: tuple[int, ...] = ()
    keyswitch_levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, (least, greatest) in _PARAMETERS.items():
            for number in getattr(self, name):
                check_integer(name, number, least, greatest)


# The least and the most of what Concrete's optimiser tries.
_PARAMETERS = {"log2_polynomial_sizes": (8, 18), "glwe_dimensions": (1, 6), "keyswitch_levels": (1, 64)}


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """How to compile and run.

    engine: "conv" (Concrete's convolution), "separable" (two passes, for filters of rank one), "shifts" (the
        sum of shifted images, which leaves out zero weights), "matrix" (the dense product x·B), or "auto":
        the one that is predicted to be cheapest.
    p_error: probability that a lookup goes wrong, or, in a network without lookups, a result. None: where
        there are lookups, `global_p_error`; where there are none, 2^−64, at the price of ciphertexts some 4 %
        larger than with Concrete's own default.
    global_p_error: probability that anything goes wrong in one image. None, and no p_error: 10^−5, Concrete's
        default. Lookups get cheaper with more, and what a failed one returns is mostly a neighbouring entry.
    security_level: bits, 128 or 132.
    compress_input: smaller ciphertexts for the images (bytes instead of kilobytes a pixel). None: where there
        are lookups; a network without runs slower on them.
    compress_evaluation_keys: smaller evaluation keys.
    parameters: the range from which Concrete chooses them. None: all, or what `configuration` says.
    configuration: a `concrete.fhe.Configuration` with which everything else starts: strategies, say.
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
                # Concrete's optimiser dies of numbers that are hardly more than 0.
                if not (_is_number(value) and 1e-300 <= value < 1):
                    raise InvalidArgumentError(f"{name}={value!r} must lie between 1e-300 and 1.")
                object.__setattr__(self, name, float(value))
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
