"""Finds a configuration that a network fits, by quantizing it in other ways until one works."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from itertools import takewhile
from time import monotonic
from typing import Any, cast

from fheconv.analysis.forecast import forecast
from fheconv.basics.config import QuantConfig
from fheconv.basics.errors import AccumulatorOverflowError, FheConvError
from fheconv.networks.integers import IntegerNetwork

# The widest accumulators of a lookup, and the widest values, that `QuantConfig` takes.
WIDEST, MOST_BITS = 16, 8
# Remedies are tried for so long.
MOST_SECONDS = 60.0
# What a message says of a configuration that fits and yet cannot be compiled as it is.
NO_PARAMETERS = (
    "This was tried and fits, but Concrete has no parameters for its lookups at the usual failure "
    "probability: compile with a larger p_error, or quantize with rounding_bits too."
)


class Trials:
    """Quantizes with one configuration after another. `fits` says whether a network is as it should be.

    `failed` is what the last configuration was refused with, None if it was quantized. `second_best` is the
    first that fits, but for which Concrete has no parameters at the usual failure probability.
    """

    def __init__(
        self,
        quantize: Callable[[QuantConfig], IntegerNetwork],
        fits: Callable[[IntegerNetwork], bool] = lambda _: True,
    ) -> None:
        self._quantize, self._fits = quantize, fits
        self.failed: FheConvError | None = None
        self.second_best: QuantConfig | None = None

    def works(self, config: QuantConfig) -> bool:
        """Return whether a network is quantized with this, fits, and has parameters."""
        self.failed = None
        try:
            network = self._quantize(config)
        except FheConvError as error:
            self.failed = error
            return False
        except MemoryError:  # other methods need more memory than the one that was asked for
            return False
        if not self._fits(network):
            return False
        possible = forecast(network).possible
        if not possible and self.second_best is None:
            self.second_best = config
        return possible

    def first(self, configs: Iterator[QuantConfig]) -> QuantConfig | None:
        """Return the first of the configurations that works, or the second best, or None.

        Large networks take long to quantize, so nothing new is tried after `MOST_SECONDS`.
        """
        end = monotonic() + MOST_SECONDS
        in_time = takewhile(lambda _: monotonic() < end, configs)
        return next(filter(self.works, in_time), self.second_best)


def tried(
    error: AccumulatorOverflowError, config: QuantConfig, quantize: Callable[[QuantConfig], IntegerNetwork]
) -> AccumulatorOverflowError:
    """Return the error with a remedy that was tried. `quantize` has raised it for `config`.

    It is the error itself if its own remedy works. The remedy is None if none was found that does.
    """
    trials = Trials(quantize)
    found = trials.first(_changed(error, config, trials))
    remedy = None if found is None else difference(config, found)
    if remedy == error.remedy and found is not trials.second_best:
        return error
    if remedy is None:
        advice = "None of the other numbers of bits that were tried fits: give the layer fewer taps."
    else:
        advice = f"Quantize with {remedy}."
        advice += f" {NO_PARAMETERS}" if found is trials.second_best else " This was tried, and fits."
    fact, _, _ = str(error).rpartition("; ")
    return AccumulatorOverflowError(
        f"{fact}. {advice}",
        layer=error.layer,
        channel=error.channel,
        value=error.value,
        limit=error.limit,
        remedy=remedy,
    )


def _changed(error: AccumulatorOverflowError, config: QuantConfig, trials: Trials) -> Iterator[QuantConfig]:
    """Yield changes of a refused configuration: those that cost least accuracy come first."""
    keeping = replace(config, method="accumulator", per_channel=True)
    if config.accumulator_bits is not None and config.method not in ("auto", "accumulator"):
        yield keeping
    yield from _wider(error, config, trials)
    if config.accumulator_bits is None:
        yield from (replace(keeping, accumulator_bits=bits) for bits in range(WIDEST, 4, -2))
    yield from narrower(keeping)


def _wider(error: AccumulatorOverflowError, config: QuantConfig, trials: Trials) -> Iterator[QuantConfig]:
    """Yield the configuration with wider accumulators, as long as they are what is missing."""
    kept, failed = config, cast("FheConvError | None", error)
    while isinstance(failed, AccumulatorOverflowError) and failed.layer is not None:
        limits, old = kept.accumulator_bits, kept.of_layer("accumulator_bits", failed.layer)
        bits = max(old + 1 if isinstance(old, int) else 1, (failed.value or 0).bit_length())
        if limits is None or bits > WIDEST:
            return
        wider: Any = {**limits, failed.layer: bits} if isinstance(limits, Mapping) else bits
        kept = replace(kept, accumulator_bits=wider)
        yield kept
        failed = trials.failed


def narrower(config: QuantConfig) -> Iterator[QuantConfig]:
    """Yield a configuration with fewer and fewer bits for values, and then with fewer for weights too."""
    least = 2 if config.input_signed else 1
    last = config
    for names in (("input_bits", "activation_bits"), ("input_bits", "activation_bits", "weight_bits")):
        for bits in range(MOST_BITS, 0, -1):
            changed: dict[str, Any] = {name: _at_most(getattr(config, name), bits) for name in names}
            changed["input_bits"] = max(changed["input_bits"], least)
            smaller = replace(config, **changed, input_levels=None, activation_levels=None)
            if smaller != last:
                yield smaller
            last = smaller


def _at_most(value: Any, bits: int) -> int:
    """Return a number of bits that is at most `bits`, for all layers. What was left open is at most 4."""
    return min(value if isinstance(value, int) else 4, bits)


def difference(old: QuantConfig, new: QuantConfig) -> str:
    """Return what `new` changes, such as 'method="accumulator" and accumulator_bits=8'."""
    words = []
    for field in fields(old):
        value = getattr(new, field.name)
        if value != getattr(old, field.name):
            shown = f'"{value}"' if isinstance(value, str) else repr(value)
            words.append(f"{field.name}={shown}")
    # Accumulators come first: they are what did not fit.
    words.sort(key=lambda word: not word.startswith("accumulator_bits"))
    return " and ".join(words)
