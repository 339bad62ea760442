"""From a trained model and calibration images to an integer network."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fheconv.arrays import Array, as_array, first_position, frozen
from fheconv.bounds import layer_bounds
from fheconv.capture import capture, single_convolution
from fheconv.config import QuantConfig
from fheconv.errors import AccumulatorOverflowError, CalibrationError, InvalidArgumentError
from fheconv.network import CalibratedInput, Conv, Layer, Maximum, Network, Quantization
from fheconv.quantized import AnyLayer, QuantizedLayer, QuantizedNetwork, blank_images
from fheconv.quantizer.activations import activation_quantizations, input_quantization
from fheconv.quantizer.tables import compressed, lookup, reserve, width
from fheconv.quantizer.weights import round_by_output, round_nearest

# The integers of a bias must stay exact in float64, through which they are computed.
BIAS_LIMIT = 2**53


def quantize(module: Any, calibration: Any, config: QuantConfig | None = None) -> QuantizedNetwork:
    """Turn a trained model into exact integer arithmetic.

    `module` is a `torch.nn.Module`, a weight array (K, C/groups, *k) or (Hf, Wf), or a `fheconv.Conv`;
    `calibration` a batch of images (N, C, *S), or one (C, *S) for a single convolution, which fix the image
    size and the scales. Integer images that fit `input_bits` are taken as they are, with scale 1 and the
    whole range of the data type; other images are scaled so that their range, and 0, is covered.

    Every activation becomes one lookup, whose tables are made of integers here; everything linear merges into
    the layer before or after it. Layers are quantized in order, each on what the quantized ones before it
    deliver.

    Raises `UnsupportedLayerError` for what cannot be compiled, `CalibrationError` where no scale can be
    chosen, `AccumulatorOverflowError` where `accumulator_bits` cannot be kept, `InvalidArgumentError` for
    images that do not go with the model.
    """
    config = QuantConfig() if config is None else config
    if not isinstance(config, QuantConfig):
        raise InvalidArgumentError(f"config is {config!r}; it must be a QuantConfig.")
    conv = single_convolution(module)
    images = _calibration_images(calibration, conv)
    network = capture(module if conv is None else conv, images.shape[1:])
    config.check_layers([layer.name for layer in network.layers if isinstance(layer, Layer)])
    calibrated = CalibratedInput(
        minimum=float(images.min()),
        maximum=float(images.max()),
        integral=images.dtype.kind in "iub",
        images=len(images),
    )
    image = input_quantization(calibrated, config)
    floats = network.tensors(images)
    quantizations = activation_quantizations(network, floats, image, config)
    tensors = [image.integers(images)]
    blanks = [blank_images(image, network.input_shape)]
    layers: list[AnyLayer] = []
    observed: list[tuple[Array, Array] | None] = []
    for layer, output in zip(network.layers, quantizations[1:], strict=True):
        if isinstance(layer, Maximum):
            layers.append(layer)
            observed.append(None)
        else:
            inputs = [q for source in layer.sources if (q := quantizations[source]) is not None]
            quantized, seen = _quantize_layer(layer, network, inputs, output, floats, tensors, blanks, config)
            layers.append(quantized)
            observed.append(seen)
        tensors.append(layers[-1].output(tensors))
        blanks.append(layers[-1].output(blanks))
    return QuantizedNetwork(
        config=config,
        input=image,
        calibrated=calibrated,
        layers=tuple(layers),
        observed=tuple(observed),
        source=network,
    )


def _calibration_images(calibration: Any, conv: Conv | None) -> Array:
    images = as_array(calibration, "calibration")
    if conv is not None:
        axes = len(conv.geometry.kernel)
        if images.ndim == axes + 1:
            images = images[None]
        if images.ndim != axes + 2 or images.shape[1] != conv.in_channels:
            raise InvalidArgumentError(
                f"calibration has shape {images.shape}; layer {conv.name!r} takes images (n, "
                f"{conv.in_channels}, {', '.join('MND'[:axes])}), or one of them without n."
            )
    elif images.ndim < 2:
        raise InvalidArgumentError(
            f"calibration has shape {images.shape}; a model takes a batch, (n, C, M, N) for images."
        )
    if images.size == 0:
        raise CalibrationError("calibration is empty; give at least one image.")
    if not np.isfinite(images).all():
        raise CalibrationError("calibration contains NaN or infinity; remove those images.")
    if conv is not None:
        conv.geometry.output_size(images.shape[2:])
    return images


def _quantize_layer(
    layer: Layer,
    network: Network,
    inputs: Sequence[Quantization],
    output: Quantization | None,
    floats: Sequence[Array],
    tensors: Sequence[Array],
    blanks: Sequence[Array],
    config: QuantConfig,
) -> tuple[QuantizedLayer, tuple[Array, Array]]:
    """Return the layer in integers, and the least and the greatest accumulator of each channel observed."""
    looks_up = layer.activation is not None
    weight_bits = config.of_layer("weight_bits", layer.name)
    rounding_bits = config.of_layer("rounding_bits", layer.name) if looks_up else None
    limit = config.accumulator_bits_of(layer.name, looks_up=looks_up)
    alone = len(network.layers) == 1 and len(layer.terms) == 1
    if config.method == "mse" or (config.method == "auto" and alone and limit is None):
        nearest = True
        rounded = round_nearest(layer, inputs, network.shapes, weight_bits, per_channel=config.per_channel)
    else:
        nearest = False
        budget = None if limit is None else 2**limit - 1 - reserve(limit, rounding_bits)
        rounded = round_by_output(
            layer, inputs, network.shapes, floats, tensors, weight_bits, budget, rounding_bits
        )
    none = np.zeros((1,) * len(layer.shape), np.int64)
    bare = QuantizedLayer(
        name=layer.name,
        shape=layer.shape,
        terms=rounded.terms,
        inputs=tuple(inputs),
        scale=none,
        bias=none,
        weight_range=rounded.range,
        lookup=None,
    )
    zeros = {source: q.zero_point for source, q in zip(layer.sources, inputs, strict=True)}
    # What the accumulators are where every real input is zero.
    zero = bare.accumulate(
        [np.full((1, *s), zeros.get(n, 0), np.int64) for n, s in enumerate(network.shapes)]
    )[0]
    sums = bare.accumulate(tensors)
    bias = layer.bias
    if not nearest:
        bias = bias + _mean_error(layer, rounded.step, sums - zero, floats)
    step = _steps(layer, rounded.step, bias)
    counted = none
    if layer.activation is None:
        counted = compressed(_bias_in_steps(layer, bias, step) - zero)
    quantized = replace(bare, scale=frozen(compressed(step)), bias=frozen(counted))
    accumulators = np.moveaxis(sums + counted, 1, 0).reshape(layer.shape[0], -1)
    observed = accumulators.min(axis=1), accumulators.max(axis=1)
    bounds = layer_bounds(bare, network.shapes)
    minimum, span, proved = bounds.channel_minimum, bounds.channel_span, True
    if layer.activation is None or output is None:
        bits = bounds.offset_bits
    else:
        extra = np.ceil(config.margin * (observed[1] - observed[0])).astype(np.int64)
        # Concrete, which sees the blank images, stops at what leaves a table.
        blank = np.moveaxis(quantized.accumulate(blanks), 1, 0).reshape(layer.shape[0], -1)
        least = np.minimum(observed[0] - extra, blank.min(axis=1))
        expected = np.maximum(observed[1] + extra, blank.max(axis=1)) - least
        number = network.layers.index(layer) + 1
        # Maxima are right for values in range only: what they make of one that wrapped cannot be foreseen.
        pooled = any(isinstance(one, Maximum) and one.source == number for one in network.layers)
        if config.overflow == "calibrated" and not pooled and expected.max() < span.max():
            minimum, span, proved = least, expected, False
        bits = width(layer.name, int(span.max()), rounding_bits)
        table = lookup(
            layer.name,
            layer.activation,
            output,
            step=step,
            bias=bias - step * zero,
            minimum=minimum,
            span=span,
            bits=bits,
            rounding_bits=rounding_bits,
            proved=proved,
        )
        quantized = replace(quantized, lookup=table)
    if limit is not None and bits > limit:
        raise AccumulatorOverflowError(
            f"Layer {layer.name!r} needs {bits} accumulator bits, and accumulator_bits={limit} are allowed; "
            'use method="accumulator", which keeps to them.',
            layer=layer.name,
            value=int(span.max()),
            limit=2**limit - 1,
            remedy='method="accumulator"',
        )
    return quantized, observed


def _mean_error(layer: Layer, step: Array, sums: Array, floats: Sequence[Array]) -> Array:
    """Return by how much `sums`, in units of `step` and without bias, are too small on average, (C, *1).

    The bias makes up for it, at no cost (Nagel et al. 2019).
    """
    with np.errstate(over="ignore", invalid="ignore"):  # refused below
        error: Array = layer.sums(floats) - layer.bias - step * sums
    if not np.isfinite(error).all():
        raise CalibrationError(
            f"The sums of layer {layer.name!r} on the calibration images are not finite; rescale the "
            "weights or the images."
        )
    return error.mean(axis=(0, *range(2, error.ndim))).reshape(-1, *[1] * (len(layer.shape) - 1))


def _steps(layer: Layer, step: Array, bias: Array) -> Array:
    """Return the real size of an accumulator step for each value, (C, *S), none of them 0.

    Raises `CalibrationError` where float64 does not hold it.
    """
    # A filter of zeros gives its bias everywhere: take that as the step, and the bias is exactly ±1.
    step = np.where(step != 0, step, np.where(bias != 0, np.abs(bias), 1.0))
    usable = np.isfinite(step) & (np.abs(step) >= np.finfo(np.float64).tiny)
    if not usable.all():
        where = first_position(~usable)
        raise CalibrationError(
            f"One accumulator step of channel {where[0]} of layer {layer.name!r} would be {step[where]:g}, "
            "which float64 does not hold; rescale the weights or the images, or prune the channel."
        )
    return step


def _bias_in_steps(layer: Layer, bias: Array, step: Array) -> Array:
    with np.errstate(over="ignore"):  # what overflows is refused below
        steps = np.rint(bias / step)
    if (np.abs(steps) >= BIAS_LIMIT).any():
        where = first_position(np.abs(steps) >= BIAS_LIMIT)
        raise CalibrationError(
            f"Channel {where[0]} of layer {layer.name!r} has bias {bias[where]:g}, but one accumulator step "
            f"is {step[where]:g}: too many to count. Its weights are vanishingly small; prune the channel."
        )
    return steps.astype(np.int64)
