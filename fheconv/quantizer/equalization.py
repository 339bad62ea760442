"""Channels of equal size: each activation channel is scaled to fill the integers that all of them share.

The integers of an activation have one scale, and a channel of small values would use few of them. Divide the
channel by its own size, and multiply the weights that read it: the network computes the same. Neither costs
anything, because the one is in the lookup table and the other in weights that are rounded anyway (cross-layer
equalization, Nagel et al. 2019, for any activation).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fheconv.basics.arrays import Array, along_channels, frozen
from fheconv.basics.config import QuantConfig
from fheconv.networks.expression import Expression
from fheconv.networks.floats import Layer, Network
from fheconv.quantizer.activations import least_error, sharing


def equalized(network: Network, tensors: Sequence[Array], config: QuantConfig) -> Network:
    """Return a network of the same results, in which every channel of an activation has the same best scale.

    `tensors` are the network's on the calibration images. Activations that are added up as they are stay so,
    and so do those whose channels are mixed before they meet weights.
    """
    together = {number for group in sharing(network) for number in group}
    for number, layer in enumerate(network.layers, 1):
        if not isinstance(layer, Layer) or layer.activation is None or number in together:
            continue
        levels, channels = config.activation_levels_of(layer.name), np.moveaxis(tensors[number], 1, 0)
        alive = channels.reshape(len(channels), -1).any(axis=1)
        if alive.any():
            best = [least_error(layer.name, channel, levels).scale for channel in channels[alive]]
            scales = np.full(len(channels), np.mean(best))
            scales[alive] = best
            network = _divided(network, number, scales / np.mean(best)) or network
    return network


def _divided(network: Network, number: int, scales: Array) -> Network | None:
    """Return the network with tensor `number`, an activation, divided by `scales` (C,), or None."""
    rescaled = network.rescaled(number, scales)
    layer = network.layers[number - 1]
    if rescaled is None or not isinstance(layer, Layer) or layer.activation is None:
        return None
    by_channel = frozen(along_channels(scales, len(layer.shape)))
    divided = replace(layer, activation=Expression("div", (layer.activation, by_channel)))
    layers = rescaled[0].layers
    return replace(network, layers=(*layers[: number - 1], divided, *layers[number:]))
