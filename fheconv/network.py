"""The data that flows between the stages: float layers, integer layers, and networks of them.

Frozen, plain numpy inside. A stage reads one of these and makes the next one.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from fheconv.arithmetic import ConvGeometry, conv, expand
from fheconv.arithmetic.geometry import Padding, PaddingMode, PerAxis, direct_form
from fheconv.arrays import Array, as_array, channel_vector, first_position, frozen
from fheconv.config import QuantConfig
from fheconv.errors import InputRangeError, InvalidArgumentError

if TYPE_CHECKING:
    from fheconv.budget import BudgetReport


@dataclass(frozen=True, kw_only=True, eq=False)
class Conv:
    """A convolution in floats: `weight` (K, C/groups, *k), `bias` (K,) or None.

    The weight of a transposed convolution is kept flipped and in this layout, for the plain convolution over
    the expanded input that `geometry` describes.
    """

    name: str
    weight: Array
    bias: Array | None
    geometry: ConvGeometry

    @classmethod
    def of(
        cls,
        weight: Any,
        bias: Any = None,
        *,
        stride: PerAxis = 1,
        padding: Padding = 0,
        dilation: PerAxis = 1,
        groups: int = 1,
        padding_mode: PaddingMode = "zeros",
        transposed: bool = False,
        output_padding: PerAxis = 0,
        name: str = "conv",
    ) -> "Conv":
        """Make one from a weight (K, C/groups, *k), or a plain (Hf, Wf), and torch's arguments.

        A transposed convolution's weight is (C, K/groups, *k), as torch keeps it.

        Raises `InvalidArgumentError` for arguments that do not go together.
        """
        weight = as_array(weight, "weight")
        if weight.ndim == 2:
            weight = weight[None, None]
        if weight.ndim < 3 or 0 in weight.shape:
            raise InvalidArgumentError(
                f"weight has shape {weight.shape}; it must be (out_channels, in_channels/groups, *kernel), "
                "none of them 0, or a plain (Hf, Wf)."
            )
        weight, geometry = direct_form(
            weight,
            transposed=transposed,
            padding_mode=padding_mode,
            output_padding=output_padding,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
        geometry.check_channels(weight.shape[1] * groups, weight.shape)
        bias = None if bias is None else channel_vector(bias, len(weight))
        return cls(
            name=str(name),
            weight=frozen(weight),
            bias=None if bias is None else frozen(bias),
            geometry=geometry,
        )

    @property
    def in_channels(self) -> int:
        """C."""
        return int(self.weight.shape[1]) * self.geometry.groups


@dataclass(frozen=True, kw_only=True)
class CalibratedInput:
    """What calibration showed of the images: all that the choice of their quantization depends on."""

    minimum: float
    maximum: float
    integral: bool


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Which real number each integer stands for: real = scale · (integer − zero_point).

    Integers lie in [minimum, maximum] (Jacob et al. 2018, formula 1). `integral` says that the real
    numbers are the integers themselves, so that a fraction among them is a mistake.
    """

    scale: float
    zero_point: int
    minimum: int
    maximum: int
    integral: bool = False

    @property
    def bits(self) -> int:
        """The width that holds `maximum − minimum`."""
        return (self.maximum - self.minimum).bit_length()

    def integers(self, x: Array) -> Array:
        """Return the int64 integers nearest to the real numbers `x`.

        Raises `InputRangeError` naming the first value that is not finite, is more than half a step
        outside the range, or has a fraction where integers are asked.
        """
        finite = np.isfinite(x)
        if not finite.all():
            where = first_position(~finite)
            raise InputRangeError(
                f"The value at {where} is {x[where]}; only finite numbers can be encrypted."
            )
        steps = x.astype(np.float64) / self.scale + self.zero_point
        # A zero-point is rounded, so an end of the calibrated range may lie half a step outside.
        slack = 0.0 if self.integral else 0.5 + 1e-6
        outside = (steps < self.minimum - slack) | (steps > self.maximum + slack)
        if outside.any():
            where = first_position(outside)
            low, high = ((end - self.zero_point) * self.scale for end in (self.minimum, self.maximum))
            raise InputRangeError(
                f"The value {x[where]:g} at {where} is outside the input range [{low:g}, {high:g}]; clip the "
                "images to it, or quantize again with calibration images (or QuantConfig.input_range) that "
                "cover it."
            )
        nearest = np.rint(steps)
        if self.integral and (nearest != steps).any():
            where = first_position(nearest != steps)
            raise InputRangeError(
                f"The value {x[where]} at {where} has a fraction, and this network was calibrated on integer "
                "images; round the images, or calibrate on floats."
            )
        return np.clip(nearest, self.minimum, self.maximum).astype(np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedConv:
    """A convolution in integers, with all that turns its accumulator back into real numbers.

    `weight` (K, C/groups, *k) and `bias` (K,) are int64. With inputs `q` quantized by `input` and
    padded by its zero-point, the accumulator of output channel c is `Σ weight·q + bias`, and the real
    output is `accumulator · weight_scale[c] · input.scale`: the bias holds −zero_point·Σ weight as
    well. `weight_range` is the range of the weights' data type.
    """

    name: str
    weight: Array
    bias: Array
    geometry: ConvGeometry
    weight_scale: Array
    weight_range: tuple[int, int]
    input: Quantization

    @property
    def output_scale(self) -> Array:
        """The real size of one accumulator step, (K,)."""
        return self.weight_scale * self.input.scale

    @property
    def taps(self) -> int:
        """How many products one output sums, C/groups · Πk."""
        return int(np.prod(self.weight.shape[1:]))

    def accumulate(self, q: Array) -> Array:
        """Return the int64 accumulators (N, K, *Out) of integer inputs (N, C, *S)."""
        return conv(
            expand(q, self.geometry, self.input.zero_point),
            self.weight,
            self.bias,
            stride=self.geometry.stride,
            dilation=self.geometry.dilation,
            groups=self.geometry.groups,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedNetwork:
    """What `fheconv.quantize` returns: exact integer arithmetic between float images and float results.

    `observed` holds, for each layer, the per-channel (minimum, maximum) of its accumulators on the
    calibration images (None: nobody looked), `source` the float layers it was made from, `calibrated`
    the images' range.
    """

    config: QuantConfig
    input_shape: tuple[int, ...]
    calibrated: CalibratedInput
    layers: tuple[QuantizedConv, ...]
    observed: tuple[tuple[Array, Array], ...] | None
    source: tuple[Conv, ...]

    @property
    def input(self) -> Quantization:
        """How the images are quantized."""
        return self.layers[0].input

    @cached_property
    def output_shape(self) -> tuple[int, ...]:
        """(K, *Out)."""
        last = self.layers[-1]
        return (len(last.weight), *last.geometry.output_size(self.input_shape[1:]))

    def quantize_input(self, x: Any) -> tuple[Array, bool]:
        """Return the images as an int64 batch (N, *input_shape), and whether `x` was a batch.

        Raises `InputRangeError` for a wrong shape or a value that cannot be represented, naming it.
        """
        try:
            x = as_array(x, "The image")
        except InvalidArgumentError as error:
            raise InputRangeError(str(error)) from error
        batched = x.ndim == len(self.input_shape) + 1
        if x.shape[int(batched) :] != self.input_shape:
            raise InputRangeError(
                f"The images have shape {x.shape}; this network takes (n, "
                f"{', '.join(map(str, self.input_shape))}), or one image without n. For another image size, "
                "quantize with calibration images of it."
            )
        q = self.input.integers(x)
        return (q if batched else q[None]), batched

    def accumulate(self, q: Array) -> Array:
        """Return the integer outputs (N, K, *Out) of integer images (N, *input_shape)."""
        for layer in self.layers:
            q = layer.accumulate(q)
        return q

    def dequantize(self, accumulators: Array) -> Array:
        """Return the real numbers (float64) that integer outputs (..., K, *Out) stand for."""
        scale = self.layers[-1].output_scale
        return accumulators * scale.reshape(-1, *[1] * (len(self.output_shape) - 1))

    def integers(self, x: Any) -> Array:
        """Return the exact integer outputs for float images, (N, K, *Out) or (K, *Out).

        Raises `InputRangeError` like `quantize_input`.
        """
        q, batched = self.quantize_input(x)
        y = self.accumulate(q)
        return y if batched else y[0]

    def __call__(self, x: Any) -> Array:
        """Return the float outputs for float images, through the exact integers."""
        return self.dequantize(self.integers(x))

    def budget(self, accumulator_bits: int | None = None) -> "BudgetReport":
        """Return the proved accumulator widths, held against a limit if one is given."""
        # The only call against the direction of the imports: a convenience, so that the report is
        # found where the network is.
        from fheconv.budget import report

        return report(self, accumulator_bits)
