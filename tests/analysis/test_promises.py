"""What forecasts, budgets and errors say is possible, Concrete compiles."""

import re
from functools import cache

import numpy as np
import pytest

import fheconv
from fheconv import CompileConfig, QuantConfig
from fheconv.analysis.advice import applied
from tests.support.nets import quantize, random_net

# Some of these networks are dear. That is said elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore::fheconv.CostWarning")


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Remedies are tried to the end, so that no result hangs on how fast the machine is."""
    for module in ("trials", "affordability"):
        monkeypatch.setattr(f"fheconv.analysis.{module}.MOST_SECONDS", np.inf)


class Drawn:
    """Random options for a random network, narrow and wide ones."""

    def __init__(self, seed):
        rng = np.random.default_rng([seed, 7])
        self.module, self.images = random_net(seed)
        self.options = {
            "weight_bits": int(rng.integers(2, 8)),
            "activation_bits": int(rng.integers(2, 9)),
            "input_bits": int(rng.integers(2, 9)),
            "accumulator_bits": int(rng.integers(5, 17)),
        }
        if rng.integers(3) == 0:
            self.options |= {"overflow": "defined", "rounding_bits": int(rng.integers(2, 9))}
        self.compiling = {
            "p_error": [None, 1e-2, 1e-4, 1e-9, 1e-15][rng.integers(5)],
            "engine": ["auto", "auto", "matrix", "conv"][rng.integers(4)],
        }
        self.limit = int(rng.integers(2, 9))
        self.seconds = float(10 ** rng.uniform(-1, 2))

    def quantized(self, config):
        return quantize(self.module, self.images, **{name: getattr(config, name) for name in FIELDS})


FIELDS = QuantConfig.__dataclass_fields__
REFUSALS = fheconv.AccumulatorOverflowError, fheconv.CostError


def refusal(call):
    """The error with which something too wide or too dear is refused, None if it is not."""
    try:
        call()
    except REFUSALS as error:
        return error
    return None


@cache
def drawn(seed):
    """The options, and the network with them. If it is refused, the one that is advised instead."""
    one = Drawn(seed)
    config, compiling = QuantConfig(**one.options), CompileConfig()
    refused = refusal(lambda: one.quantized(config))
    if refused is None:
        return one, one.quantized(config)
    config, compiling = applied(refused.settings, config, compiling)
    network = one.quantized(config)
    fheconv.compile(network, compiling)
    return one, network


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_what_is_forecast_as_possible_compiles(seed):
    one, network = drawn(seed)
    config = CompileConfig(**one.compiling)
    if network.forecast(config).possible:
        assert fheconv.FheCircuit(network, config).cost.complexity > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [*range(8), 85, 105, 138])
def test_what_a_budget_requires_or_advises_compiles(seed):
    one, network = drawn(seed)
    for limit, proved in ((None, False), (one.limit, False), (None, True), (one.limit, True)):
        report = network.budget(limit)
        told = refusal(lambda report=report, proved=proved: report.require(proved=proved))
        if told is None:
            fheconv.FheCircuit(network, CompileConfig())
            continue
        if not told.settings:  # nothing fits so few bits
            assert limit is not None
            continue
        config, compiling = applied(told.settings, network.config, CompileConfig())
        better = one.quantized(config)
        more = re.search(r"Allow (?:accumulator_bits=)?(\d+)", str(told))
        fits = better.budget(int(more[1]) if more else limit)
        assert fits.fits
        assert fits.proved or not proved
        fheconv.compile(better, compiling)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [*range(8), 41])
def test_what_a_refused_cost_advises_is_allowed(seed):
    one, network = drawn(seed)
    config = CompileConfig(most_seconds=one.seconds, **one.compiling)
    told = refusal(lambda: fheconv.compile(network, config))
    if told is not None and told.settings:
        quantizing, compiling = applied(told.settings, network.config, config)
        better = network if quantizing == network.config else one.quantized(quantizing)
        fheconv.compile(better, compiling)
