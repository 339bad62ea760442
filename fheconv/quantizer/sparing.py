"""Quantizes coarse networks with a bit less of weights or activations, where that is as good.

Where a lookup keeps 3 bits or fewer, or activations have as few, each layer errs much. How these errors meet
in later layers is chance, so that a bit more can make the results worse. Then the bit is not worth having.
"""

from dataclasses import replace

import numpy as np

from fheconv.basics.arrays import Array
from fheconv.basics.config import DEFINED_ACTIVATION_BITS, QuantConfig
from fheconv.networks.floats import Network
from fheconv.networks.integers import IntegerNetwork
from fheconv.networks.quantization import CalibratedInput
from fheconv.quantizer.layerwise import quantize_network
from fheconv.quantizer.rounding.methods import chosen_method

# A network is coarse if its lookups keep, or its activations have, at most so many bits.
COARSE = 3
# A bit more must reduce the error by this share.
SHARE = 0.01
# Fewer images do not tell which network is better, and more would take longer than they are worth.
ENOUGH, MOST = 20, 1000


def quantize_sparingly(
    network: Network, images: Array, calibrated: CalibratedInput, config: QuantConfig
) -> IntegerNetwork:
    """Quantize a network as `quantize_network` does, or a coarse one with a bit less, where that is as good.

    The errors of the results on the calibration images (N, C, *S) are compared. The network's own `config`
    says how many bits it has. Raises the errors of `fheconv.quantize`.
    """
    best = quantize_network(network, images, calibrated, config)
    plain = network.trained or not chosen_method(network, config).by_output or len(images) < ENOUGH
    if plain or not (fewer := _with_a_bit_less(config)):
        return best
    compared = images[:MOST]
    meant = network.tensors(compared)[-1]
    least = results_error(best, compared, meant) * (1 + SHARE)
    for other in fewer:
        quantized = quantize_network(network, images, calibrated, other)
        if (error := results_error(quantized, compared, meant)) < least:
            best, least = quantized, error
    return best


def results_error(quantized: IntegerNetwork, images: Array, meant: Array) -> float:
    """Return the mean squared error of the real results for images (N, C, *S), which should be `meant`."""
    results = quantized.accumulate(quantized.input.integers(images)) * quantized.last.scale
    return float(np.square(results - meant).mean())


def _with_a_bit_less(config: QuantConfig) -> list[QuantConfig]:
    """Return a coarse configuration with a bit less of weights, and of activations; none of another."""
    kept, weights = config.rounding_bits, config.weight_bits
    activations = config.activation_bits or DEFINED_ACTIVATION_BITS
    if config.overflow != "defined" or config.activation_levels is not None:
        return []
    if not (isinstance(kept, int) and isinstance(weights, int) and isinstance(activations, int)):
        return []
    found = []
    if min(kept, activations) <= COARSE:
        if weights > 2:
            found.append(replace(config, weight_bits=weights - 1))
        if activations > 2:
            found.append(replace(config, activation_bits=activations - 1))
    return found
