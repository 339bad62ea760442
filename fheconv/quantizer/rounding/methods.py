"""The methods of rounding weights, by name, and which of them "auto" is."""

from dataclasses import dataclass

from fheconv.basics.config import QuantConfig
from fheconv.networks.floats import Layer, Network
from fheconv.quantizer.rounding.accumulator import round_accumulator
from fheconv.quantizer.rounding.base import Rounding
from fheconv.quantizer.rounding.gptq import round_gptq
from fheconv.quantizer.rounding.minmax import round_minmax
from fheconv.quantizer.rounding.mse import round_mse


@dataclass(frozen=True, kw_only=True)
class Method:
    """How weights are rounded; `by_output`: to what the layer computes, else to the weights alone."""

    round: Rounding
    by_output: bool


METHODS = {
    "minmax": Method(round=round_minmax, by_output=False),
    "mse": Method(round=round_mse, by_output=False),
    "gptq": Method(round=round_gptq, by_output=True),
    "accumulator": Method(round=round_accumulator, by_output=True),
}


def chosen_method(network: Network, config: QuantConfig) -> Method:
    """Return the method that `config` names."""
    if config.method != "auto":
        return METHODS[config.method]
    return METHODS["mse" if _is_one_filter(network, config) else "accumulator"]


def _is_one_filter(network: Network, config: QuantConfig) -> bool:
    """Whether there is but one convolution, whose accumulators may take any width."""
    first = network.layers[0]
    if len(network.layers) > 1 or not isinstance(first, Layer) or len(first.terms) > 1:
        return False
    return config.accumulator_bits_of(first.name, looks_up=False) is None
