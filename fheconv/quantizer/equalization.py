"""Scales each channel of an activation so that it uses all integers of the activation.

All channels of an activation share a scale, so that a channel of small values would use few integers. Divide
the channel by its own size, and multiply the weights that read it: the results stay the same. This costs
nothing, because the lookup table includes the division, and the weights are rounded after the multiplication
(cross-layer equalization, Nagel et al. 2019, for any activation).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fheconv.basics.arrays import Array, along_channels, frozen
from fheconv.basics.config import QuantConfig
from fheconv.networks.expression import Expression
from fheconv.networks.floats import Layer, Network
from fheconv.quantizer.activations import least_error, levels_of, sharing
from fheconv.quantizer.evidence import independent_images, trust


def equalized(network: Network, tensors: Sequence[Array], config: QuantConfig) -> Network:
    """Return a network with equal results, in which all channels of an activation have the same best scale.

    `tensors` holds the network's tensors for the calibration images. If these are few or alike, small
    channels keep headroom, because other images may give them greater values. Two kinds of activations do
    not change: those that are added without weights, and those whose channels are mixed before weights
    multiply them.
    """
    together = {number for group in sharing(network) for number in group}
    for number, layer in enumerate(network.layers, 1):
        if not isinstance(layer, Layer) or layer.activation is None or number in together:
            continue
        levels, channels = levels_of(network, number, config), np.moveaxis(tensors[number], 1, 0)
        alive = channels.reshape(len(channels), -1).any(axis=1)
        if alive.any():
            best = np.array([least_error(layer.name, channel, levels).scale for channel in channels[alive]])
            # Few images do not show how large the values of a channel become.
            best = np.minimum(best / trust(independent_images(tensors[number])), best.max())
            scales = np.full(len(channels), best.mean())
            scales[alive] = best
            network = _divided(network, number, scales / best.mean()) or network
    return network


def _divided(network: Network, number: int, scales: Array) -> Network | None:
    """Return the network with activation `number` divided by `scales` (C,), or None if that is impossible."""
    rescaled = network.rescaled(number, scales)
    layer = network.layers[number - 1]
    if rescaled is None or not isinstance(layer, Layer) or layer.activation is None:
        return None
    by_channel = frozen(along_channels(scales, len(layer.shape)))
    divided = replace(layer, activation=Expression("div", (layer.activation, by_channel)))
    layers = rescaled[0].layers
    return replace(network, layers=(*layers[: number - 1], divided, *layers[number:]))
