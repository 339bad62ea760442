"""Holds what users choose: how to quantize, and how to compile."""

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from fheconv.basics.checks import Auto, _is_number, _number, check_integer
from fheconv.basics.errors import InvalidArgumentError

Engine: TypeAlias = Literal["auto", "conv", "separable", "shifts", "matrix"]


# One number for every layer, or one number for each layer by its name.
PerLayer: TypeAlias = int | Mapping[str, int]
PerLayerOrAuto: TypeAlias = int | Auto | Mapping[str, int | Auto]
Overflow: TypeAlias = Literal["proved", "calibrated"]
Method: TypeAlias = Literal["auto", "minmax", "mse", "gptq", "accumulator"]


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Holds the choices for quantization.

    weight_bits: 1 to 8. Weights are symmetric integers in ±(2^(bits−1) − 1); one bit is {−1, 0, +1}.
    activation_bits: 1 to 8. The width of a lookup's output. None: 4, or half of accumulator_bits if that is
        less. Then an accumulator can hold several products.
    activation_levels: 2 to 256. The number of integers that a lookup's output can be. It replaces
        activation_bits and need not be a power of two. With narrow accumulators each level counts.
    accumulator_bits: 1 to 16. No accumulator is wider than this, in offset form; this is guaranteed. None: as
        wide as the weights need. Before a rounded lookup, None means rounding_bits + 4: with more, rounding
        loses more than the weights gain.
    rounding_bits: 2 to 8. The width to which an accumulator is rounded before its lookup. The rounding is
        approximate and makes the lookup cheaper. None: no rounding. (One bit is too few: rounding needs a
        free step at both ends.)
    overflow: "proved": accumulators are as wide as the worst image needs. "calibrated": they are as wide as
        calibration observed, plus `margin` at both ends. Values outside then give wrong results.
    margin: for "calibrated", as a share of the observed range.
    method: how weights are rounded. "minmax": to the nearest integers; a filter's greatest weight becomes the
        greatest integer. "mse": to the integers and the scale of least squared error. "gptq": to the integers
        that change the layer's sums on the calibration images least. "accumulator": like "gptq", and it keeps
        to `accumulator_bits`; no other method does. "auto": "accumulator"; but for a single convolution
        without `accumulator_bits` it is "mse", so that the result does not depend on the images.
    input_bits: 1 to 16. The width of an image value. Floats, and integers that need more bits, are rounded.
    input_levels: 2 to 65536. The number of integers that an image value can be. It replaces input_bits.
    per_channel: True: each output channel has its own weight scale. False: the whole tensor has one scale;
        only "minmax" and "mse" can do this.
    input_signed: image integers lie in [−2^(bits−1), 2^(bits−1) − 1] with zero-point 0. Otherwise they lie in
        [0, 2^bits − 1], and calibration gives the zero-point.
    input_range: the (smallest, greatest) image value. None: calibration decides.

    A setting of layers is one number for all of them, or a dict from layer names to numbers, such as
    {"conv1": 3}. Layers without a name in the dict get the default.

    weight_bits, activation_bits, accumulator_bits and input_bits can be "auto"; the first three also for one
    layer by its name. `fheconv.quantize` then chooses them on calibration images. It holds out every fifth
    image. If there are fewer than 20 images, all serve for both. It tries weights of 2 to 6 bits and 2 to 28
    integers for activations and image values, and balances them against the accumulators. So accumulator_bits
    or rounding_bits must be given too. "auto" accumulators are those that enter lookups. They share one
    width, at most 8 (with rounding_bits: at most 4 more than those). It is the least width at which the
    network's results differ from the float network's by at most 6 % of their variance. If no width reaches
    that, it is the width of least difference. The network's own `config` has the chosen numbers.

    Example:
        >>> config = QuantConfig(weight_bits={"conv1": 3}, input_bits=8)
        >>> config.of_layer("weight_bits", "conv1"), config.of_layer("weight_bits", "conv2")
        (3, 4)
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
        """Return whether any number is "auto"."""
        return any(map(self.asks, _AUTO))

    def asks(self, name: str) -> bool:
        """Return whether the setting `name`, such as "weight_bits", is "auto" for any layer."""
        value = getattr(self, name)
        return "auto" in (value.values() if isinstance(value, Mapping) else (value,))

    @property
    def _keeps_widths(self) -> bool:
        """Return whether the method chooses weights that keep accumulators to their widths."""
        return self.method in ("auto", "accumulator")

    def of_layer(self, name: str, layer: str) -> Any:
        """Return the choice for one layer in the setting `name`, such as "weight_bits"."""
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
        """Return the width that a layer's accumulators must not exceed; None for no limit."""
        limit, rounding = self.of_layer("accumulator_bits", layer), self.of_layer("rounding_bits", layer)
        if limit is None and rounding is not None and looks_up and self._keeps_widths:
            return min(rounding + ROUNDED_AWAY, _LAYER_NUMBERS["accumulator_bits"][1])
        return limit

    def check_layers(self, layers: Collection[str]) -> None:
        """Raise `InvalidArgumentError` if a setting names a layer that does not exist."""
        for name in _LAYER_NUMBERS:
            value = getattr(self, name)
            unknown = [layer for layer in value if layer not in layers] if isinstance(value, Mapping) else []
            if unknown:
                raise InvalidArgumentError(
                    f"{name} names {', '.join(map(repr, unknown))}; the layers of this network are "
                    f"{', '.join(map(repr, layers))}."
                )

    def __str__(self) -> str:
        """Show the call that makes this configuration: widths always, the rest if it is not the default."""
        always = ("weight_bits", "input_bits")
        shown = (
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.name in always or getattr(self, field.name) != field.default
        )
        return f"QuantConfig({', '.join(shown)})"


# The number of bits that are rounded away from an accumulator, unless its width was chosen.
ROUNDED_AWAY = 4
# The smallest and the greatest allowed number.
_LAYER_NUMBERS = {
    "weight_bits": (1, 8),
    "activation_bits": (1, 8),
    "activation_levels": (2, 256),
    "accumulator_bits": (1, 16),
    "rounding_bits": (2, 8),
}
# The settings that `fheconv.quantize` can choose.
_AUTO = ("weight_bits", "activation_bits", "accumulator_bits", "input_bits")


SECURITY_LEVELS = (128, 132)


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


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """Holds the choices for compiling and running.

    engine: "conv" (Concrete's convolution), "separable" (two passes, for filters of rank one), "shifts" (the
        sum of shifted images, without zero weights), "matrix" (the dense product x·B), or "auto": the one
        with the lowest predicted cost.
    p_error: the probability that a lookup goes wrong, or a result in a network without lookups. None: with
        lookups, `global_p_error` decides; without, 2^−64, and ciphertexts are some 4 % larger than with
        Concrete's own default.
    global_p_error: the probability that anything goes wrong in one image. None, and no p_error: 10^−5,
        Concrete's default. A greater number makes lookups cheaper. A failed lookup mostly returns a
        neighbouring entry.
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
        or run one image. Starting the worker does not count.
    memory_limit: bytes of memory that the native library's process may hold during a call of this circuit,
        beyond what it has after its imports. Checked every 20 ms, on Linux only. If other circuits have
        filled the process to the limit before the call, a new process starts.

    A call that exceeds a limit ends with `CompilationError` or `ExecutionError`; the circuit stays usable.
    Raises `InvalidArgumentError`, also for limits together with `in_process`: there, nothing could enforce
    them.

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
