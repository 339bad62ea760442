"""Says what to change when a network's accumulators are wider than the limit."""

from dataclasses import replace
from itertools import product

from fheconv.basics.config import QuantConfig
from fheconv.networks.bounds import accumulator_bounds
from fheconv.networks.floats import Layer
from fheconv.networks.integers import IntegerNetwork
from fheconv.networks.linear import Kernel
from fheconv.quantizer.activations import input_quantization
from fheconv.quantizer.rounding.mse import round_mse


def remedy_for(network: IntegerNetwork, limit: int, input_bits: int) -> str:
    """Return advice that makes the network fit `limit` bits: a way to quantize it, or another change.

    `input_bits` is the width of the widest values that any layer of the network reads.
    """
    config, kernel = network.config, network.last.convolution
    nearest = config.method == "mse" or (config.method == "auto" and config.accumulator_bits is None)
    if kernel is not None and len(network.layers) == 1 and nearest:
        return _smaller_bits(network, kernel, limit)
    # A single weight of 1 already needs as many bits as the value that it multiplies.
    if input_bits > limit:
        return (
            f"Some layer reads {input_bits}-bit values, and a single weight of 1 needs as many accumulator "
            f"bits; use activation_bits and input_bits of less than {limit}, and accumulator_bits={limit}."
        )
    kept = replace(config, accumulator_bits=limit, overflow="proved", method="auto")
    return f"Quantize with {kept}: the weights are then chosen to keep to {limit} bits."


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
