"""Lists the methods of rounding weights by name, and chooses the method for "auto"."""

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
    """Holds a method; `by_output` says that it minimises the error of outputs, not of weights."""

    round: Rounding
    by_output: bool


METHODS = {
    "minmax": Method(round=round_minmax, by_output=False),
    "mse": Method(round=round_mse, by_output=False),
    "gptq": Method(round=round_gptq, by_output=True),
    "accumulator": Method(round=round_accumulator, by_output=True),
}


def chosen_method(network: Network, config: QuantConfig) -> Method:
    """Return the method that `config` names, or the method for "auto"."""
    if config.method != "auto":
        return METHODS[config.method]
    return METHODS["mse" if _is_one_filter(network, config) else "accumulator"]


def _is_one_filter(network: Network, config: QuantConfig) -> bool:
    """Return whether the network is a single convolution without a limit for the width."""
    first = network.layers[0]
    if len(network.layers) > 1 or not isinstance(first, Layer) or len(first.terms) > 1:
        return False
    return config.accumulator_bits_of(first.name, looks_up=False) is None
