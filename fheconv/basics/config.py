"""Holds what users choose about quantization."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from fheconv.basics.checks import Auto, _is_number, _number, check_integer
from fheconv.basics.errors import InvalidArgumentError
from fheconv.basics.keywords import answers_keywords, shown_call

# One number for every layer, or one number for each layer by its name.
PerLayer: TypeAlias = int | Mapping[str, int]
PerLayerOrAuto: TypeAlias = int | Auto | Mapping[str, int | Auto]
Overflow: TypeAlias = Literal["proved", "defined"]
Method: TypeAlias = Literal["auto", "minmax", "mse", "gptq", "accumulator"]


@answers_keywords
@dataclass(frozen=True, kw_only=True, repr=False)
class QuantConfig:
    """Holds the choices for quantization.

    weight_bits: 1 to 8. Weights are symmetric integers in ±(2^(bits−1) − 1); one bit is {−1, 0, +1}.
    activation_bits: 1 to 8. The width of a lookup's output. None: 4, or half of accumulator_bits if that is
        less. Before rounded lookups with overflow="defined" it is 6: there more levels cost nothing.
    activation_levels: 2 to 256. The number of integers that a lookup's output can be. It replaces
        activation_bits and need not be a power of two. With overflow="defined" it is odd (one less).
    accumulator_bits: 1 to 16. No accumulator is wider than this, in offset form; this is guaranteed. None: as
        wide as the weights need. Before a rounded lookup, None means rounding_bits + 4: with more, rounding
        loses more than the weights gain. With overflow="defined" no window is wider, and None means 13; no
        weights or gains are then so large that their noise makes lookups dearer.
    rounding_bits: 2 to 8. The width to which an accumulator is rounded before its lookup. The rounding is
        approximate and makes the lookup cheaper. None: no rounding. (One bit is too few: rounding needs a
        free step at both ends.) Where 3 bits or fewer are kept, or activations have as few, with
        overflow="defined", `quantize` also tries a bit less of weights and of activations. It takes these
        numbers unless the given ones reduce the error of the results by 1 %.
    overflow: "proved": the window of each lookup holds the accumulators of the worst image. "defined": it
        holds what calibration reaches, so that its steps are finer. Outside, its table repeats mirrored, in
        the circuit and in the clear integers, for every image: the least activation becomes the greatest. So
        a value a little above the window still gets the right activation.
    margin: for "defined", a share of the range that calibration reaches, added at both ends. None: before a
        rounded lookup, the ends are those of least error of the activations, and cut at most 2 % of the
        values off, which are first stretched by 1/n at both ends for n images. Before other lookups it is
        1/n, as far as one more image reaches on average if values are uniform, and at least 0.05.
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
    slack: 0 to 1. Image values outside the range by at most this share of it are clipped, and counted in an
        `InputRangeWarning`. Values further outside are refused. 0: nothing is clipped.

    A setting of layers is one number for all of them, or a dict from layer names to numbers, such as
    {"conv1": 3}. Layers without a name in the dict get the default.

    weight_bits, activation_bits, accumulator_bits and input_bits can be "auto"; the first three also for one
    layer by its name. `fheconv.quantize` then chooses them by the error on every fifth calibration image (on
    all, if there are fewer than 20). It tries weights of 2 to 6 bits and 2 to 28 integers for activations and
    image values, and balances them against the accumulators. So accumulator_bits or rounding_bits must be
    given too. "auto" accumulators are those that enter lookups. They share one width, at most 8 (with
    rounding_bits: at most 4 more). It is the least width at which the network's results differ from the float
    network's by at most 6 % of their variance, or else the width of least difference. The network's own
    `config` has the chosen numbers.

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
    margin: float | None = None
    method: Method = "auto"
    input_bits: int | Auto = 4
    input_levels: int | None = None
    per_channel: bool = True
    input_signed: bool = False
    input_range: tuple[float, float] | None = None
    slack: float = 0.05

    def __post_init__(self) -> None:
        for name in ("per_channel", "input_signed"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise InvalidArgumentError(f"{name}={getattr(self, name)!r} must be True or False.")
        if str(self.overflow) == "calibrated":
            object.__setattr__(self, "overflow", "defined")
        for name, words in (("overflow", get_args(Overflow)), ("method", get_args(Method))):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in words:
                raise InvalidArgumentError(
                    f"{name}={getattr(self, name)!r}; it must be one of {', '.join(words)}."
                )
        if self.margin is not None and not (_is_number(self.margin) and 0 <= self.margin < np.inf):
            raise InvalidArgumentError(f"margin={self.margin!r} must be a number of at least 0, or None.")
        if not (_is_number(self.slack) and 0 <= self.slack <= 1):
            raise InvalidArgumentError(f"slack={self.slack!r} must be a number from 0 to 1.")
        object.__setattr__(self, "slack", float(self.slack))
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
        levels = self.of_layer("activation_levels", layer)
        if levels is None:
            limit, rounding = (self.of_layer(one, layer) for one in ("accumulator_bits", "rounding_bits"))
            default = min(4, 4 if limit is None else max(limit // 2, 1))
            if self.overflow == "defined" and rounding is not None:
                default = DEFINED_ACTIVATION_BITS
            levels = 2 ** (self.of_layer("activation_bits", layer) or default)
        # The middle of an activation's range must be an integer, where a table can be mirrored.
        return max(levels - 1 + levels % 2, 3) if self.overflow == "defined" else int(levels)

    def input_ends(self) -> tuple[int, int]:
        """Return the least and the greatest integer that an image value can be."""
        levels = self.input_levels or 2 ** int(self.input_bits)
        return (-(levels // 2), levels - 1 - levels // 2) if self.input_signed else (0, levels - 1)

    def accumulator_bits_of(self, layer: str, *, looks_up: bool) -> int | None:
        """Return the width that a layer's accumulators must not exceed; None for no limit."""
        limit, rounding = self.of_layer("accumulator_bits", layer), self.of_layer("rounding_bits", layer)
        rounded = rounding is not None and looks_up and self.overflow == "proved"
        if limit is None and rounded and self._keeps_widths:
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

    def __repr__(self) -> str:
        """Show the call that makes this configuration: widths always, the rest if it is not the default."""
        return shown_call(self, always=("weight_bits", "input_bits"))


# The number of bits that are rounded away from an accumulator, unless its width was chosen.
ROUNDED_AWAY = 4
# The default width of activations where their number of levels costs nothing.
DEFINED_ACTIVATION_BITS = 6
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
