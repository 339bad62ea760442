"""Maps the integers of a tensor to real numbers, and back."""

import math
from dataclasses import dataclass

import numpy as np

from fheconv.basics.arrays import Array, Shape, first_position
from fheconv.basics.errors import InputRangeError, InvalidArgumentError
from fheconv.basics.samples import Data, channel_remedy, images_of
from fheconv.basics.warning import InputRangeWarning, InputScaleWarning, warn

# A batch that stays within this share of the input range is suspicious. Values 0..1 where 0..255 or 0..16
# were calibrated do so, and values divided by 16. A dark photograph hardly ever does: one bright pixel is
# enough.
SLIVER = 0.1


def twos_complement_bits(minimum: int, maximum: int) -> int:
    """Return the width that holds [minimum, maximum]: unsigned if nothing is negative, else signed."""
    if minimum >= 0:
        return maximum.bit_length()
    return 1 + max(maximum.bit_length() if maximum > 0 else 0, (-minimum - 1).bit_length())


@dataclass(frozen=True, kw_only=True)
class CalibratedInput:
    """Describes the calibration images: their range, their number, and whether they are integers."""

    minimum: float
    maximum: float
    integral: bool
    images: int


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Maps integers to real numbers: real = scale · (integer − zero_point).

    Integers lie in [minimum, maximum] (Jacob et al. 2018, formula 1). `integral` says that the real numbers
    are the integers themselves; a fraction among them is then an error. Of images, `slack` is the share of
    the range by which they may lie outside: they are then clipped. `clips` says that the model itself clips
    its images, however far outside they are.
    """

    scale: float
    zero_point: int
    minimum: int
    maximum: int
    integral: bool = False
    slack: float = 0.0
    clips: bool = False

    @property
    def bits(self) -> int:
        """The width that holds `maximum − minimum`."""
        return (self.maximum - self.minimum).bit_length()

    @property
    def integer_bits(self) -> int:
        """The width of the integers themselves; it includes a sign bit if one of them is negative."""
        return twos_complement_bits(self.minimum, self.maximum)

    @property
    def real_range(self) -> tuple[float, float]:
        """The real numbers of the least and the greatest integer."""
        low, high = ((end - self.zero_point) * self.scale for end in (self.minimum, self.maximum))
        return low, high

    def nearest(self, x: Array) -> Array:
        """Return the int64 integers nearest to the real numbers `x`, clipped to the range."""
        return np.clip(np.rint(x / self.scale) + self.zero_point, self.minimum, self.maximum).astype(np.int64)

    def real(self, integers: Array) -> Array:
        """Return the real numbers (float64) that integers stand for."""
        return (integers - self.zero_point) * self.scale

    def integers(self, x: Array) -> Array:
        """Return the int64 integers nearest to the real numbers `x`.

        Half a step is rounded to the even number of steps, as torch does. Numbers outside the range are
        clipped within `slack`, with an `InputRangeWarning` that counts them, and in silence if it `clips`.
        Warns with `InputScaleWarning` if no value is farther from 0 than `SLIVER` times the farthest end of
        the range, and not all are 0. It does not warn where integers are asked: their range is that of the
        data type, and images may need a small part of it.

        Raises `InputRangeError` naming the first value that is not finite, is further outside the range, or
        has a fraction although `integral` is set.
        """
        finite = np.isfinite(x)
        if not finite.all():
            where = first_position(~finite)
            raise InputRangeError(
                f"The value at {where} is {x[where]}; only finite numbers can be encrypted."
            )
        with np.errstate(over="ignore"):  # infinity is outside the range
            steps = x.astype(np.float64) / self.scale
        nearest = np.rint(steps)
        if not self.clips:
            self._check_range(x, steps + self.zero_point)
        if self.integral and (nearest != steps).any():
            where = first_position(nearest != steps)
            raise InputRangeError(
                f"The value {x[where]} at {where} has a fraction, and this network was calibrated on integer "
                "images; round the images, or calibrate on floats."
            )
        self._warn_of_other_scale(x)
        return np.clip(nearest + self.zero_point, self.minimum, self.maximum).astype(np.int64)

    def _check_range(self, x: Array, steps: Array) -> None:
        """Refuse real numbers far outside the range, and warn of others outside; `steps` counts from 0."""
        # The zero-point is rounded, so an end of the calibrated range can lie half a step outside.
        rounding = 0.0 if self.integral else 0.5 + 1e-6
        beyond = np.maximum(self.minimum - steps, steps - self.maximum)
        (low, high), most = self.real_range, self.slack * (self.maximum - self.minimum)
        if (beyond > max(rounding, most)).any():
            where = first_position(beyond > max(rounding, most))
            raise InputRangeError(
                f"The value {x[where]:g} at {where} is outside the input range [{low:g}, {high:g}] by more "
                f"than {self.slack:.0%} of it (QuantConfig.slack); clip the images to it, or quantize again "
                "with calibration images (or QuantConfig.input_range) that cover it."
            )
        if outside := int((beyond > rounding).sum()):
            warn(
                f"{outside:,} of {x.size:,} values are outside the input range [{low:g}, {high:g}] by up to "
                f"{beyond.max() * self.scale:.2g}, and are clipped to it.",
                InputRangeWarning,
            )

    def _warn_of_other_scale(self, x: Array) -> None:
        low, high = self.real_range
        sliver = SLIVER * max(-low, high)
        if not self.integral and 0 < np.abs(x.astype(np.float64)).max(initial=0) < sliver:
            # The text is the same for all images, so that Python shows it once in a loop.
            warn(
                f"No value of these images is above {sliver:g} in size, and the input range is [{low:g}, "
                f"{high:g}]. If they are on another scale than the calibration images, such as 0..1 instead "
                "of 0..255, the results are wrong: bring them to that scale. If they are only dark, ignore "
                "fheconv.InputScaleWarning.",
                InputScaleWarning,
            )


def integer_images(x: Data, quantization: Quantization, shape: Shape) -> tuple[Array, bool]:
    """Return images of `shape` as an int64 batch (N, *shape), and whether `x` was a batch.

    `x` may also be a loader, a dataset or batches (`fheconv.basics.samples`). Warns with
    `InputScaleWarning` of images that are probably on another scale.

    Raises `InputRangeError` for a wrong shape or a value that cannot be represented, naming it.
    """
    try:
        x = images_of(x, "The image", len(shape))
    except InvalidArgumentError as error:
        raise InputRangeError(str(error)) from error
    batched = x.ndim == len(shape) + 1
    if x.shape[int(batched) :] != shape:
        remedy = channel_remedy(x.shape, shape[0], len(shape)) if shape else ""
        if not remedy and x.ndim == 2 and x.shape[1] == math.prod(shape):
            remedy = f" They have as many values: give images.reshape(-1, {', '.join(map(str, shape))})."
        raise InputRangeError(
            f"The images have shape {x.shape}; this network takes (n, {', '.join(map(str, shape))}), or one "
            f"image without n.{remedy or ' For another image size, quantize with calibration images of it.'}"
        )
    q = quantization.integers(x)
    return (q if batched else q[None]), batched
