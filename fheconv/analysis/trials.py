"""Finds a configuration that a network fits, by quantizing it in other ways until one works."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from time import monotonic
from typing import Any, cast

import numpy as np

from fheconv.analysis.advice import Advice, difference, sentence
from fheconv.analysis.forecast import allowed, forecast_of
from fheconv.basics.arrays import Array
from fheconv.basics.compile_config import ROUNDED_P_ERROR, CompileConfig
from fheconv.basics.config import QuantConfig
from fheconv.basics.errors import AccumulatorOverflowError, FheConvError
from fheconv.lowering.lower import lower
from fheconv.networks.integers import IntegerNetwork
from fheconv.quantizer.layerwise import quantize_network

# The widest accumulators of a lookup, and the widest values, that `QuantConfig` takes.
WIDEST, MOST_BITS = 16, 8
# Remedies are tried for so long.
MOST_SECONDS = 60.0
# Remedies may cost this share of what `CompileConfig` allows: with the user's own images they can cost more.
SHARE = 1 / 8
# The failure probabilities of a lookup that are tried where Concrete has no parameters at the usual one.
P_ERRORS = (1e-3, 1e-2, ROUNDED_P_ERROR)
# The number of images that stand in for those of calibration, to try numbers of bits with.
STAND_INS = 4


@dataclass(frozen=True, kw_only=True)
class Found:
    """Holds a configuration that fits, and the failure probability that it needs (None: the usual one)."""

    config: QuantConfig
    p_error: float | None = None

    def settings(self, old: QuantConfig) -> dict[str, Any]:
        """Return what changes `old`, and the failure probability if the usual one does not do."""
        return difference(old, self.config) | ({} if self.p_error is None else {"p_error": self.p_error})

    @property
    def words(self) -> str:
        """A sentence about the failure probability, empty if it is the usual one."""
        if self.p_error is None:
            return ""
        return (
            f"Compile it with p_error={self.p_error:g}: at the usual failure probability, Concrete has no "
            "parameters for its lookups, or they cost more than is allowed."
        )

    def advice(self, old: QuantConfig) -> Advice:
        """Return the advice to quantize with what changes `old`."""
        changed = sentence(difference(old, self.config))
        words = f"{changed} This was tried, and fits. {self.words}".rstrip()
        return Advice(words=words, settings=self.settings(old))


class Trials:
    """Quantizes with one configuration after another. `fits` says whether a network is as it should be.

    `failed` is what the last configuration was refused with, None if it was quantized. `second_best` is the
    first that fits, but compiles only with a larger failure probability than usual. `fitted` is True if
    the last one fits, whether it compiles or not.
    """

    def __init__(
        self,
        quantize: Callable[[QuantConfig], IntegerNetwork],
        fits: Callable[[IntegerNetwork], bool] = lambda _: True,
    ) -> None:
        self._quantize, self._fits = quantize, fits
        self.failed: FheConvError | None = None
        self.second_best: Found | None = None
        self.fitted = False

    def works(self, config: QuantConfig) -> bool:
        """Return whether a network is quantized with this, fits, has parameters and is cheap enough.

        Wide lookups do not count. They are possible only if there are no narrow ones beside them, which
        hangs on the calibration images, and others may stand in for these (see `requantized`).
        """
        self.failed, self.fitted = None, False
        try:
            network = self._quantize(config)
        except FheConvError as error:
            self.failed = error
            return False
        except MemoryError:  # other methods need more memory than the one that was asked for
            return False
        if not self._fits(network):
            return False
        self.fitted, lowered = True, lower(network)

        def compiles(options: CompileConfig) -> bool:
            expected = forecast_of(lowered, options)
            return allowed(expected, options, SHARE) and not expected.wide

        if compiles(CompileConfig()):
            return True
        if self.second_best is None:
            p_error = next((p for p in P_ERRORS if compiles(CompileConfig(p_error=p))), None)
            self.second_best = None if p_error is None else Found(config=config, p_error=p_error)
        return False

    def first(self, configs: Iterator[QuantConfig]) -> Found | None:
        """Return the first of the configurations that works, or the second best, or None.

        Large networks take long to quantize, so nothing new is tried after `MOST_SECONDS`.
        """
        end = monotonic() + MOST_SECONDS
        in_time = takewhile(lambda _: monotonic() < end, configs)
        found = next(filter(self.works, in_time), None)
        return self.second_best if found is None else Found(config=found)


def requantized(network: IntegerNetwork, config: QuantConfig) -> IntegerNetwork:
    """Return the network quantized in another way, on images that stand in for those of calibration."""
    return quantize_network(network.source, _stand_ins(network), network.calibrated, config)


def _stand_ins(network: IntegerNetwork) -> Array:
    """Return images in the range of the calibration images, which the network has not kept."""
    low, high = network.calibrated.minimum, network.calibrated.maximum
    shape = (STAND_INS, *network.input_shape)
    images = np.random.default_rng(0).uniform(low, high, shape)
    return np.rint(images).astype(np.int64) if network.calibrated.integral else images


def tried(
    error: AccumulatorOverflowError,
    config: QuantConfig,
    quantize: Callable[[QuantConfig], IntegerNetwork],
    first: Iterable[QuantConfig] = (),
) -> AccumulatorOverflowError:
    """Return the error with a remedy that was tried. `quantize` has raised it for `config`.

    The configurations in `first` are tried before others. The remedy is None if none was found that works.
    """
    trials = Trials(quantize)
    found = trials.first(chain(first, _changed(error, config, trials)))
    if found is None:
        words = "None of the other numbers of bits that were tried fits; fewer taps need fewer bits."
        return Advice(words=words).after(error)
    return found.advice(config).after(error)


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
