"""From float layers and calibration images to an integer network."""

from typing import Any

import numpy as np

from fheconv.arrays import Array, as_array, frozen
from fheconv.capture import capture
from fheconv.config import QuantConfig
from fheconv.errors import CalibrationError, InvalidArgumentError
from fheconv.network import CalibratedInput, Conv, Quantization, QuantizedConv, QuantizedNetwork
from fheconv.rounding import round_weight

# The integers of a bias must stay exact in float64, through which they are computed.
BIAS_LIMIT = 2**53


def quantize(module: Any, calibration: Any, config: QuantConfig | None = None) -> QuantizedNetwork:
    """Turn a trained convolution into exact integer arithmetic.

    `module` is a `torch.nn` convolution (1-d to 3-d, transposed or not), a weight array (K, C/groups, *k) or
    (Hf, Wf), or a `fheconv.Conv`; `calibration` some images (N, C, *S) or one (C, *S), which fix the image
    size and the input scale. Integer images that fit `input_bits` are taken as they are, with scale 1 and the
    whole range of the data type; other images are scaled so that their range, and 0, is covered.

    Raises `UnsupportedLayerError` for other layers, `CalibrationError` where no scale can be chosen,
    `InvalidArgumentError` for images that do not go with the layer.
    """
    config = QuantConfig() if config is None else config
    if not isinstance(config, QuantConfig):
        raise InvalidArgumentError(f"config is {config!r}; it must be a QuantConfig.")
    layer = capture(module)
    images = _calibration_images(calibration, layer)
    calibrated = CalibratedInput(
        minimum=float(images.min()), maximum=float(images.max()), integral=images.dtype.kind in "iub"
    )
    quantization = input_quantization(calibrated, config)
    quantized = _quantize_conv(layer, quantization, config)
    accumulators = quantized.accumulate(quantization.integers(images))
    per_channel = np.moveaxis(accumulators, 1, 0).reshape(len(quantized.weight), -1)
    return QuantizedNetwork(
        config=config,
        input_shape=images.shape[1:],
        calibrated=calibrated,
        layers=(quantized,),
        observed=((per_channel.min(axis=1), per_channel.max(axis=1)),),
        source=(layer,),
    )


def _calibration_images(calibration: Any, layer: Conv) -> Array:
    images = as_array(calibration, "calibration")
    axes = len(layer.geometry.kernel)
    if images.ndim == axes + 1:
        images = images[None]
    if images.ndim != axes + 2 or images.shape[1] != layer.in_channels:
        raise InvalidArgumentError(
            f"calibration has shape {images.shape}; layer {layer.name!r} takes images (n, "
            f"{layer.in_channels}, {', '.join('MND'[:axes])}), or one of them without n."
        )
    if images.size == 0:
        raise CalibrationError("calibration is empty; give at least one image.")
    if not np.isfinite(images).all():
        raise CalibrationError("calibration contains NaN or infinity; remove those images.")
    layer.geometry.output_size(images.shape[2:])
    return images


def input_quantization(images: CalibratedInput, config: QuantConfig) -> Quantization:
    """Return how `config` quantizes images such as calibration showed.

    Raises `CalibrationError` where they leave `input_range`, or no scale can be chosen.
    """
    if config.input_signed:
        least, greatest = -(2 ** (config.input_bits - 1)), 2 ** (config.input_bits - 1) - 1
    else:
        least, greatest = 0, 2**config.input_bits - 1
    seen = images.minimum, images.maximum
    low, high = config.input_range or seen
    if seen[0] < low or seen[1] > high:
        raise CalibrationError(
            f"calibration reaches from {seen[0]:g} to {seen[1]:g}, outside input_range={config.input_range}; "
            "clip the images or widen the range."
        )
    if images.integral and least <= low and high <= greatest:
        if config.input_range is not None:
            least, greatest = int(np.ceil(low)), int(np.floor(high))
        return Quantization(
            scale=1.0, zero_point=0, minimum=min(least, 0), maximum=max(greatest, 0), integral=True
        )
    # 0 must have an integer of its own, because it is what images are padded with (Jacob et al. 2018).
    low, high = min(low, 0.0), max(high, 0.0)
    if config.input_signed:
        scale, zero_point = max(low / least, high / greatest), 0
    else:
        scale = (high - low) / greatest
        zero_point = int(np.rint(-low / scale)) if scale > 0 else 0
    if not np.finfo(np.float64).tiny <= scale < np.inf:
        raise CalibrationError(
            f"No input scale can be chosen from images between {low:g} and {high:g}; calibrate on images "
            "that are not all zero, or set QuantConfig.input_range."
        )
    return Quantization(scale=scale, zero_point=zero_point, minimum=least, maximum=greatest)


def _quantize_conv(layer: Conv, quantization: Quantization, config: QuantConfig) -> QuantizedConv:
    weight, scale, weight_range = round_weight(
        layer.weight, config.weight_bits, per_channel=config.per_channel
    )
    bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.astype(np.float64)
    with np.errstate(over="ignore"):  # what overflows is refused below
        # A filter of zeros gives its bias everywhere: take that as the step, and the bias is exactly ±1.
        scale = np.where(scale > 0, scale, np.where(bias != 0, np.abs(bias) / quantization.scale, 1.0))
        steps = scale * quantization.scale
        usable = np.isfinite(steps) & (steps >= np.finfo(np.float64).tiny)
        if not usable.all():
            channel = int(np.argmin(usable))
            raise CalibrationError(
                f"One accumulator step of channel {channel} of layer {layer.name!r} would be "
                f"{scale[channel]:g} · {quantization.scale:g}, which float64 does not hold; rescale "
                "the weights or the images, or prune the channel."
            )
        integer_bias = np.rint(bias / steps)
    if (np.abs(integer_bias) >= BIAS_LIMIT).any():
        channel = int(np.argmax(np.abs(integer_bias)))
        raise CalibrationError(
            f"Channel {channel} of layer {layer.name!r} has bias {bias[channel]:g}, but one accumulator step "
            f"is {steps[channel]:g}: too many to count. Its weights are vanishingly small; prune the channel."
        )
    folded = quantization.zero_point * weight.reshape(len(weight), -1).sum(axis=1)
    return QuantizedConv(
        name=layer.name,
        weight=frozen(weight),
        bias=frozen(integer_bias.astype(np.int64) - folded),
        geometry=layer.geometry,
        weight_scale=frozen(scale),
        weight_range=weight_range,
        input=quantization,
    )
