"""Says what to change when a network's accumulators are wider than the limit, or not proved."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product

from fheconv.analysis.advice import Advice, difference
from fheconv.analysis.trials import WIDEST, Trials, narrower, requantized
from fheconv.basics.config import QuantConfig
from fheconv.networks.bounds import accumulator_bounds
from fheconv.networks.floats import Layer
from fheconv.networks.integers import IntegerNetwork
from fheconv.networks.linear import Kernel
from fheconv.quantizer.activations import input_quantization
from fheconv.quantizer.rounding.mse import round_mse

# The widths that accumulators keep to where wider ones have no parameters. Above 10 bits few networks have.
FEWER_BITS = (10, *range(8, 0, -1))


def remedy_for(network: IntegerNetwork, limit: int, widest: Callable[[IntegerNetwork], int]) -> Advice:
    """Return advice that makes the network fit `limit` bits: a way to quantize it, or another change.

    It was tried. `widest` returns the width of a network's widest accumulator.
    """
    config, kernel = network.config, network.last.convolution
    nearest = config.method == "mse" or (config.method == "auto" and config.accumulator_bits is None)
    if kernel is not None and len(network.layers) == 1 and nearest:
        return _smaller_bits(network, kernel, limit)

    def trials(most: int) -> Trials:
        return Trials(partial(requantized, network), lambda tried: widest(tried) <= most)

    kept, tried = replace(config, overflow="proved", method="auto", per_channel=True), trials(limit)
    found = tried.first(_keeping(kept, limit, tried))
    if found is not None:
        return Advice(
            words=f"Quantize with {found.config}: the weights are then chosen to keep to "
            f"{found.config.accumulator_bits} bits. {found.words}".rstrip(),
            settings=found.settings(config),
        )
    # Where maxima look up differences, even the narrowest values may need more bits.
    for bits in range(limit + 1, WIDEST + 1):
        *_, least = narrower(replace(kept, accumulator_bits=bits))
        if trials(bits).works(least):
            return Advice(
                words=f"No widths that were tried fit {limit} bits. Allow {bits}, and quantize with {least}.",
                settings=difference(config, least),
            )
    return Advice(words=f"No widths that were tried fit {limit} bits; fewer taps need fewer bits.")


def remedy_for_proof(
    network: IntegerNetwork, limit: int | None, widest: Callable[[IntegerNetwork], int]
) -> Advice:
    """Return advice that makes all windows of the network proved, within `limit` bits if there is a limit."""
    most = WIDEST if limit is None else limit
    proved = replace(network.config, overflow="proved")
    kept = replace(proved, method="auto", per_channel=True)
    trials = Trials(partial(requantized, network), lambda tried: widest(tried) <= most)

    def configs() -> Iterator[QuantConfig]:
        yield proved
        yield from _keeping(kept, most, trials)

    found = trials.first(configs())
    if found is None:
        return Advice(words='Nothing that was tried with overflow="proved" fits.')
    return found.advice(network.config)


def _keeping(config: QuantConfig, limit: int, tried: Trials) -> Iterator[QuantConfig]:
    """Yield configurations whose accumulators keep to `limit` bits, then to fewer if only parameters lack."""
    most = min(limit, WIDEST)
    for bits in (most, *(fewer for fewer in FEWER_BITS if fewer < most)):
        kept = replace(config, accumulator_bits=bits)
        for one in (kept, *narrower(kept)):
            yield one
            if tried.fitted:
                break
        else:
            return


def _smaller_bits(network: IntegerNetwork, kernel: Kernel, limit: int) -> Advice:
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
            return Advice(
                words=f"Quantize with {smaller}: that is proved to need {bits} bits.",
                settings=difference(config, smaller),
            )
        tried.append((bits, smaller))
    least, smaller = min(tried, key=lambda attempt: attempt[0])
    return Advice(
        words=f"No width of weights and inputs fits: with {smaller} it still needs {least}. Allow "
        f"accumulator_bits={least}; fewer taps (groups, a smaller kernel) need fewer bits.",
        settings=difference(config, smaller),
    )
