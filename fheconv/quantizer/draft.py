"""Holds a layer with integer weights, before gains multiply them and before it has a lookup."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fheconv.basics.arrays import Array, Shape, first_position
from fheconv.basics.errors import CalibrationError
from fheconv.networks.bounds import AccumulatorBounds, layer_bounds, norm_bits
from fheconv.networks.floats import Layer
from fheconv.networks.integers import QuantizedLayer
from fheconv.networks.quantization import Quantization
from fheconv.quantizer.placement import Reached
from fheconv.quantizer.rows import IntegerTerms, Rows

# The integers of a bias are computed in float64, and must stay exact there.
BIAS_LIMIT = 2**53


@dataclass(kw_only=True, eq=False)
class Draft:
    """Holds a layer of integer weights, and its accumulators on the calibration images.

    `bare` has neither bias nor lookup. Accumulator `a` of it means the real number (a − zero) · step + bias,
    where `zero` are the accumulators of real inputs of zero. `step`, `bias` and `zero` are (C, *S).
    `accumulators` are (N, C, *S), `blank` (1, C, *S) those of the blank image. `reached` says where a window
    should lie that need not be proved (None: the window is proved, or there is none). It is chosen last, from
    all the others.
    """

    layer: Layer
    bare: QuantizedLayer
    shapes: Sequence[Shape]
    step: Array
    bias: Array
    zero: Array
    accumulators: Array
    blank: Array
    evidence: float | None
    reached: Reached | None = None

    @classmethod
    def of(
        cls,
        layer: Layer,
        rounded: IntegerTerms,
        bias: Array,
        *,
        inputs: Sequence[Quantization],
        shapes: Sequence[Shape],
        tensors: Sequence[Array],
        blanks: Sequence[Array],
    ) -> "Draft":
        """Return the draft of a layer with rounded weights and a bias (C, *S).

        `tensors` and `blanks` are the integer tensors before it, of calibration images and of a blank image.
        Raises `CalibrationError` if float64 cannot hold a step.
        """
        bare = _bare(layer, rounded, inputs)
        return cls(
            layer=layer,
            bare=bare,
            shapes=shapes,
            step=_steps(layer, rounded.step, bias),
            bias=bias,
            zero=bare.zero(shapes),
            accumulators=bare.accumulate(tensors),
            blank=bare.accumulate(blanks),
            evidence=min(rounded.evidence, default=None),
        )

    @cached_property
    def bounds(self) -> AccumulatorBounds:
        """The least and the greatest accumulators of any image."""
        return layer_bounds(self.bare, self.shapes)

    @cached_property
    def norm_bits(self) -> Array:
        """The bits (C,) by which sums multiply the noise of their summands (`fheconv.networks.bounds`)."""
        return norm_bits(self.bare, self.shapes)

    @cached_property
    def origin(self) -> Array:
        """The real numbers (C, *S) that accumulators of 0 mean."""
        origin: Array = self.bias - self.step * self.zero
        return origin

    @cached_property
    def rows(self) -> Rows:
        """The rows of the layer."""
        return Rows(self.layer, self.bare.inputs, self.shapes)

    def bias_in_steps(self) -> Array:
        """Return the integers (C, *S) that give the bias, and remove what the zero-points cause.

        Raises `CalibrationError` if they have 2^53 or more steps.
        """
        with np.errstate(over="ignore"):  # overflow is refused below
            steps = np.rint(self.bias / self.step)
        if (np.abs(steps) >= BIAS_LIMIT).any():
            where = first_position(np.abs(steps) >= BIAS_LIMIT)
            raise CalibrationError(
                f"Channel {where[0]} of layer {self.layer.name!r} has bias {self.bias[where]:g}, but one "
                f"accumulator step is {self.step[where]:g}: the bias has too many steps (2^53 or more). Its "
                "weights are vanishingly small; prune the channel."
            )
        integers: Array = steps.astype(np.int64) - self.zero
        return integers


def _bare(layer: Layer, rounded: IntegerTerms, inputs: Sequence[Quantization]) -> QuantizedLayer:
    none = np.zeros((1,) * len(layer.shape), np.int64)
    return QuantizedLayer(
        name=layer.name,
        shape=layer.shape,
        terms=rounded.terms,
        inputs=tuple(inputs),
        scale=none,
        bias=none,
        real_bias=none,
        gain=np.ones((1,) * len(layer.shape), np.int64),
        weight_range=rounded.range,
        lookup=None,
    )


def _steps(layer: Layer, step: Array, bias: Array) -> Array:
    """Return the real size of an accumulator step for each value, (C, *S), never 0.

    Raises `CalibrationError` if float64 cannot hold it.
    """
    # A filter of zeros gives its bias everywhere. With the bias as the step, it is exactly ±1.
    step = np.where(step != 0, step, np.where(bias != 0, np.abs(bias), 1.0))
    usable = np.isfinite(step) & (np.abs(step) >= np.finfo(np.float64).tiny)
    if not usable.all():
        where = first_position(~usable)
        raise CalibrationError(
            f"One accumulator step of channel {where[0]} of layer {layer.name!r} would be {step[where]:g}, "
            "which float64 does not hold; rescale the weights or the images, or prune the channel."
        )
    return step
