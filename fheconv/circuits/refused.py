"""Finds out what does compile, where Concrete refuses a network: it compiles one change after the other."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, takewhile
from time import monotonic
from typing import Any, TypeVar

from fheconv.analysis.advice import Advice, applied, difference, sentence
from fheconv.analysis.affordability import LINEAR_P_ERRORS, rounded
from fheconv.analysis.trials import MOST_SECONDS, P_ERRORS, narrower, requantized
from fheconv.basics.compile_config import CompileConfig
from fheconv.basics.errors import AccumulatorOverflowError, CompilationError, FheConvError
from fheconv.basics.progress import status
from fheconv.circuits.native.protocol import Refused
from fheconv.quantized import QuantizedNetwork

Compile = Callable[[QuantizedNetwork, CompileConfig], Any]
C = TypeVar("C")

# The widths that are tried for rounded accumulators.
ROUNDED = (6, 5, 4)


def compiled(
    make: Callable[[QuantizedNetwork, CompileConfig], C],
    network: QuantizedNetwork,
    config: CompileConfig,
    first: Sequence[dict[str, Any]] = (),
) -> C:
    """Return what `make` compiles. If that is refused, raise the error with a change that does compile.

    Of the changes, those that are `first` are tried first.
    """
    try:
        return make(network, config)
    except AccumulatorOverflowError as error:
        raise _advice(make, network, config, first).after(error) from error
    except Refused as error:
        raise _advice(make, network, config, first).after(CompilationError(str(error))) from error


def _advice(
    make: Compile, network: QuantizedNetwork, config: CompileConfig, first: Sequence[dict[str, Any]]
) -> Advice:
    """Return the first change that compiles. Nothing new is tried after `MOST_SECONDS`."""
    end = monotonic() + MOST_SECONDS
    with status("Looking for what does compile…"):
        for settings in takewhile(lambda _: monotonic() < end, chain(first, _changes(network, config))):
            quant, compiling = applied(settings, network.config, config)
            try:
                changed = network
                if quant != network.config:
                    changed = QuantizedNetwork.of(requantized(network, quant))
                make(changed, compiling)
            except (FheConvError, MemoryError):
                continue
            return Advice(words=f"{sentence(settings)} This was tried, and compiles.", settings=settings)
    return Advice(words="None of the other settings that were tried compiles; fewer taps need fewer bits.")


def _changes(network: QuantizedNetwork, config: CompileConfig) -> Iterator[dict[str, Any]]:
    """Yield settings to try, those first that leave the network as it is."""
    first: dict[str, Any] = {}
    if isinstance(config.lanes, int) and config.lanes > 1:
        yield from ({"lanes": lanes} for lanes in range(config.lanes - 1, 0, -1))
        first = {"lanes": 1}
    for name in ("parameters", "configuration"):
        if getattr(config, name) is not None:
            yield {**first, name: None}
    if config.engine != "matrix":  # Concrete cannot take values of a tensor one by one if all are wide
        yield {**first, "engine": "matrix"}
    looks_up = len(network.layers) > 1
    asked = max(config.p_error or 0.0, config.global_p_error or 0.0)
    other = {} if config.global_p_error is None else {"global_p_error": None}
    for p_error in P_ERRORS if looks_up else LINEAR_P_ERRORS:
        if p_error > asked:
            yield {**first, "p_error": p_error, **other}
    for bits in ROUNDED if looks_up else ():
        yield {**rounded(network.config, bits), **first}
    for smaller in narrower(network.config):
        yield {**difference(network.config, smaller), **first}
