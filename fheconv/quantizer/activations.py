"""Chooses the scales of images and activations, by calibration images."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fheconv.basics.arrays import Array
from fheconv.basics.config import QuantConfig
from fheconv.basics.errors import CalibrationError
from fheconv.networks.floats import Layer, Maximum, Network
from fheconv.networks.grids import trained_quantization
from fheconv.networks.quantization import CalibratedInput, Quantization
from fheconv.quantizer.components import connected

# The clips that are tried, as shares of the greatest value that calibration observed.
CLIPS = np.linspace(0.3, 1.0, 36)
# The error of a clip is measured on at most this many values.
MOST_VALUES = 200_000


def input_quantization(
    images: CalibratedInput, config: QuantConfig, trained: Quantization | None = None
) -> Quantization:
    """Return the quantization of images, by `config` and the range of the calibration images.

    `trained` is what the model itself does to images, and is kept. Raises `CalibrationError` if the images
    leave `input_range`, or if no scale can be chosen.
    """
    if trained is not None:
        return trained
    least, greatest = config.input_ends()
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
            scale=1.0,
            zero_point=0,
            minimum=min(least, 0),
            maximum=max(greatest, 0),
            integral=True,
            slack=config.slack,
        )
    # 0 must have its own integer, because images are padded with it (Jacob et al. 2018).
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
    return Quantization(
        scale=scale, zero_point=zero_point, minimum=least, maximum=greatest, slack=config.slack
    )


def activation_quantizations(
    network: Network, tensors: Sequence[Array], image: Quantization, config: QuantConfig
) -> list[Quantization | None]:
    """Return the quantization of each tensor, None for the last, whose accumulators are decrypted.

    `tensors` holds the floats of the calibration images. The scale of an activation has the least mean
    squared error over a grid of clips, unless training has left one (`trained_quantization`). Tensors that
    are added without weights share a scale, so that their sum still needs no weights.

    Raises `CalibrationError` for activations that are not finite.
    """
    found: list[Quantization | None] = [image]
    for number, (layer, values) in enumerate(zip(network.layers, tensors[1:], strict=True), 1):
        if isinstance(layer, Maximum):
            found.append(found[layer.source])
        elif layer.activation is None:
            found.append(None)
        else:
            own = trained_quantization(layer.activation)
            found.append(own or least_error(layer.name, values, levels_of(network, number, config)))
    for number, (layer, mine) in enumerate(zip(network.layers, found[1:], strict=True), 1):
        if not isinstance(layer, Layer) or mine is None or trained_quantization(layer.activation):
            continue
        if not tensors[number].any():
            # The sums before the activation tell how large its values may become on other images.
            reach = float(np.ptp(layer.sums(tensors))) / max(mine.maximum, 1)
            scales = _scales_beside(network, number, tensors, found)
            if 0 < reach < np.inf:
                scales.append(reach)
            found[number] = replace(mine, scale=min(scales, default=mine.scale))
    for together in sharing(network):
        quantizations = [found[number] for number in together]
        scale = max(quantization.scale for quantization in quantizations if quantization is not None)
        for number, quantization in zip(together, quantizations, strict=True):
            if quantization is not None:
                found[number] = _at_scale(quantization, scale)
    if config.overflow == "defined":
        # The center of the range must be an integer (see `Lookup`).
        found[1:] = [one and replace(one, maximum=one.maximum + one.maximum % 2) for one in found[1:]]
    return [found[_origin(network, number)] for number in range(len(found))]


def levels_of(network: Network, number: int, config: QuantConfig) -> int:
    """Return how many integers activation `number` can be.

    Maxima look up differences, which have twice as many. So before maxima, the default is as many as the
    width to which accumulators are rounded allows.
    """
    layer = network.layers[number - 1]
    levels, rounding = config.activation_levels_of(layer.name), config.of_layer("rounding_bits", layer.name)
    chosen = any(config.of_layer(one, layer.name) for one in ("activation_levels", "activation_bits"))
    compared = any(isinstance(one, Maximum) and one.source == number for one in network.layers)
    if compared and rounding is not None and config.overflow == "defined" and not chosen:
        return max(min(levels, 2 ** (rounding - 1) - 1), 3)
    return levels


def _scales_beside(
    network: Network, number: int, tensors: Sequence[Array], found: Sequence[Quantization | None]
) -> list[float]:
    """Return the scales of the tensors that some layer reads together with tensor `number`.

    Tensors of zeros are left out. A tensor of zeros gets no greater scale than these: in the layer that reads
    both, all weights share a scale, and a large unit of one tensor makes it too coarse for the others.
    """
    beside = {
        source
        for reader in network.layers
        if number in (sources := {_origin(network, source) for source in reader.sources})
        for source in sources
    }
    return [q.scale for at in beside if tensors[at].any() and (q := found[at]) is not None]


def least_error(name: str, values: Array, levels: int) -> Quantization:
    """Return the quantization to [0, levels − 1] with the least mean squared error on `values`."""
    if not np.isfinite(values).all():
        raise CalibrationError(
            f"The activation of layer {name!r} is not finite on the calibration images; check the model."
        )
    seen = values.ravel()[:: -(-values.size // MOST_VALUES)]
    low, high, maximum = min(float(values.min()), 0.0), max(float(values.max()), 0.0), levels - 1
    if low == high:
        return Quantization(scale=1.0, zero_point=0, minimum=0, maximum=maximum)
    zero_point = int(np.rint(-low / (high - low) * maximum))

    def error(scale: float) -> float:
        steps = seen / scale
        off = np.rint(steps).clip(-zero_point, maximum - zero_point) - steps
        return float(np.linalg.norm(off)) * scale

    scale = min((CLIPS * (high - low) / maximum).tolist(), key=error)
    return Quantization(scale=scale, zero_point=zero_point, minimum=0, maximum=maximum)


def _at_scale(quantization: Quantization, scale: float) -> Quantization:
    """Return the quantization of the same range with a greater scale, which needs fewer integers."""
    ratio = quantization.scale / scale
    below = int(np.ceil(quantization.zero_point * ratio))
    above = int(np.ceil((quantization.maximum - quantization.zero_point) * ratio))
    return Quantization(scale=scale, zero_point=below, minimum=0, maximum=below + above)


def sharing(network: Network) -> list[list[int]]:
    """Return groups of activations that must share a scale, because they are added without weights."""
    pairs = []
    for layer in network.layers:
        if isinstance(layer, Layer):
            plain = [_origin(network, term.source) for term in layer.terms if term.is_plain()]
            pairs += [(plain[0], other) for other in plain[1:]]
    count = len(network.layers) + 1
    labels = connected(np.array(pairs, np.int64).reshape(-1, 2).T, count)
    groups = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    # A group with the image is left out, because the scale of the image is fixed, like those of training.
    fixed = {0} | {
        number
        for number, layer in enumerate(network.layers, 1)
        if isinstance(layer, Layer) and trained_quantization(layer.activation)
    }
    return [group for group in groups if len(group) > 1 and not fixed & {*group}]


def _origin(network: Network, number: int) -> int:
    """Return the tensor that the maxima in tensor `number` are taken of, or `number` itself."""
    while number and isinstance(layer := network.layers[number - 1], Maximum):
        number = layer.source
    return number
