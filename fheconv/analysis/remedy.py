"""Says what to change when a network's accumulators are wider than the limit."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import numpy as np

from fheconv.analysis.trials import NO_PARAMETERS, WIDEST, Trials, narrower
from fheconv.basics.arrays import Array
from fheconv.basics.config import QuantConfig
from fheconv.networks.bounds import accumulator_bounds
from fheconv.networks.floats import Layer
from fheconv.networks.integers import IntegerNetwork
from fheconv.networks.linear import Kernel
from fheconv.quantizer.activations import input_quantization
from fheconv.quantizer.layerwise import quantize_network
from fheconv.quantizer.rounding.mse import round_mse

# The number of images that stand in for those of calibration, to try widths with.
STAND_INS = 4


def remedy_for(network: IntegerNetwork, limit: int, widest: Callable[[IntegerNetwork], int]) -> str:
    """Return advice that makes the network fit `limit` bits: a way to quantize it, or another change.

    It was tried. `widest` returns the width of a network's widest accumulator.
    """
    config, kernel = network.config, network.last.convolution
    nearest = config.method == "mse" or (config.method == "auto" and config.accumulator_bits is None)
    if kernel is not None and len(network.layers) == 1 and nearest:
        return _smaller_bits(network, kernel, limit)
    images = _stand_ins(network)

    def trials(most: int) -> Trials:
        return Trials(
            lambda config: quantize_network(network.source, images, network.calibrated, config),
            lambda tried: widest(tried) <= most,
        )

    kept, tried = replace(config, overflow="proved", method="auto", per_channel=True), trials(limit)
    found = tried.first(_keeping(kept, limit, tried))
    if found is not None:
        words = f"the weights are then chosen to keep to {found.accumulator_bits} bits."
        return f"Quantize with {found}: {words}" + (f" {NO_PARAMETERS}" if found is tried.second_best else "")
    # Where maxima look up differences, even the narrowest values may need more bits.
    for bits in range(limit + 1, WIDEST + 1):
        *_, least = narrower(replace(kept, accumulator_bits=bits))
        if trials(bits).works(least):
            return f"No widths that were tried fit {limit} bits. Allow {bits}, and quantize with {least}."
    return f"No widths that were tried fit {limit} bits: give the layers fewer taps."


def _keeping(config: QuantConfig, limit: int, tried: Trials) -> Iterator[QuantConfig]:
    """Yield configurations whose accumulators keep to `limit` bits, then to fewer if only parameters lack."""
    for bits in range(min(limit, WIDEST), 0, -1):
        kept = replace(config, accumulator_bits=bits)
        for one in (kept, *narrower(kept)):
            yield one
            if tried.second_best is not None:
                break
        else:
            return


def _stand_ins(network: IntegerNetwork) -> Array:
    """Return images in the range of the calibration images, which the network has not kept."""
    low, high = network.calibrated.minimum, network.calibrated.maximum
    shape = (STAND_INS, *network.input_shape)
    images = np.random.default_rng(0).uniform(low, high, shape)
    return np.rint(images).astype(np.int64) if network.calibrated.integral else images


def _smaller_bits(network: IntegerNetwork, kernel: Kernel, limit: int) -> str:
    """Try smaller (weight_bits, input_bits) on the float weights, and return advice with the first that fits.

    Pairs with the most bits in all are tried first, and among them those with the most weight bits.
    """
    config = network.config
    terms = (term for layer in network.source.layers if isinstance(layer, Layer) for term in layer.terms)
    (source,) = (step.weight for term in terms for step in term.steps if isinstance(step, Kernel))
    rows = source if config.per_channel else source[None]
    weights = {
        bits: round_mse(rows, bits).values.reshape(source.shape)
        for bits in range(config.of_layer("weight_bits", network.last.name), 0, -1)
    }
    candidates = product(weights, range(network.input.bits, 1 if config.input_signed else 0, -1))
    tried: list[tuple[int, QuantConfig]] = []
    for weight_bits, input_bits in sorted(candidates, key=lambda bits: (sum(bits), bits), reverse=True):
        smaller = replace(config, weight_bits=weight_bits, input_bits=input_bits, input_levels=None)
        inputs = input_quantization(network.calibrated, smaller)
        bits = accumulator_bounds(
            weights[weight_bits],
            kernel.geometry,
            network.input_shape[1:],
            (inputs.minimum, inputs.maximum),
            pad_value=inputs.zero_point,
        ).offset_bits
        if bits <= limit:
            return f"Quantize with {smaller}: that is proved to need {bits} bits."
        tried.append((bits, smaller))
    least, smaller = min(tried, key=lambda attempt: attempt[0])
    return (
        f"No width of weights and inputs fits: with {smaller} it still needs {least}. Allow "
        f"accumulator_bits={least}, or give the layer fewer taps (groups, a smaller kernel)."
    )
