"""Quantizes a network layer by layer, each layer on the results of the quantized layers before it."""

from collections.abc import Sequence

import numpy as np

from fheconv.basics.arrays import Array, channel_means
from fheconv.basics.config import QuantConfig
from fheconv.basics.errors import CalibrationError
from fheconv.networks.floats import Layer, Maximum, Network
from fheconv.networks.integers import IntegerNetwork
from fheconv.networks.quantization import CalibratedInput
from fheconv.quantizer.activations import activation_quantizations, input_quantization
from fheconv.quantizer.building import Building
from fheconv.quantizer.equalization import equalized
from fheconv.quantizer.rounding.methods import chosen_method
from fheconv.quantizer.weights import round_by_output, round_nearest

# How much further than the float sums the integer sums may reach, in windows that need no proof. More leaves
# less of the window for the weights.
HEADROOMS = (1.1, 1.3, 1.6, 2.0)


def quantize_network(
    network: Network, images: Array, calibrated: CalibratedInput, config: QuantConfig
) -> IntegerNetwork:
    """Quantize a network as `config` says, by calibration images (N, C, *S).

    Raises the errors of `fheconv.quantize`.
    """
    floats = network.tensors(images)
    method = chosen_method(network, config)
    if method.by_output:
        network = equalized(network, floats, config)
        floats = network.tensors(images)
    image = input_quantization(calibrated, config)
    quantizations = activation_quantizations(network, floats, image, config)
    building = Building(network, config, quantizations, calibrated, images)
    for layer in network.layers:
        if isinstance(layer, Maximum):
            building.add_maximum(layer)
            continue
        inputs = building.inputs(layer)
        bits = config.of_layer("weight_bits", layer.name)
        if not method.by_output:
            rounded = round_nearest(
                layer, inputs, network.shapes, bits, method.round, per_channel=config.per_channel
            )
            building.add(layer, rounded, layer.bias)
        else:
            budget = building.budget(layer)
            for headroom in HEADROOMS:
                rounded = round_by_output(
                    layer,
                    inputs,
                    network.shapes,
                    floats,
                    building.tensors,
                    bits,
                    method.round,
                    budget and budget.shrunk(headroom),
                )
                if building.fits(layer, rounded):
                    break
            bias = layer.bias + _mean_error(layer, rounded.step, building.sums(layer, rounded), floats)
            building.add(layer, rounded, bias)
    return building.network()


def _mean_error(layer: Layer, step: Array, sums: Array, floats: Sequence[Array]) -> Array:
    """Return the mean error (C, *1) of `sums`, which are in units of `step` and without bias.

    The bias corrects the error at no cost (Nagel et al. 2019).
    """
    with np.errstate(over="ignore", invalid="ignore"):  # refused below
        error: Array = layer.sums(floats) - layer.bias - step * sums
    if not np.isfinite(error).all():
        raise CalibrationError(
            f"The sums of layer {layer.name!r} on the calibration images are not finite; rescale the "
            "weights or the images."
        )
    return channel_means(error)
