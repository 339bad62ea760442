"""The forecast of a network against what Concrete says of the compiled circuit."""

import json
import math
import time

import numpy as np
import pytest

import fheconv
from fheconv.analysis.noise import failure, greatest_variance
from fheconv.analysis.parameters import IMAGE, Sum, choose, linear_dimension
from tests.support.nets import quantized

# As near the forecast must be.
WITHIN = 0.25
OPTIONS = (
    {"weight_bits": 2, "activation_bits": 2, "input_bits": 2},
    {"overflow": "defined", "rounding_bits": 5},
    {"overflow": "defined", "rounding_bits": 4},
    {"weight_bits": 2, "activation_bits": 3, "input_bits": 3, "accumulator_bits": 6},
    {"overflow": "defined", "rounding_bits": 6},
)
P_ERRORS = (None, 1e-2, 1e-3)


def near(forecast, compiled):
    return forecast == pytest.approx(compiled, rel=WITHIN, abs=1)


@pytest.mark.sampled(59)
@pytest.mark.parametrize("seed", range(60))
def test_it_says_what_compiling_says(seed):
    try:
        network = quantized(seed, **OPTIONS[seed % len(OPTIONS)])
    except fheconv.AccumulatorOverflowError:
        return  # the network does not fit the widths that are asked for
    config = fheconv.CompileConfig(p_error=P_ERRORS[seed % len(P_ERRORS)])
    started = time.perf_counter()
    forecast = network.forecast(config)
    assert time.perf_counter() - started < 5  # a hang, or a machine of a hundred jobs
    cost = fheconv.FheCircuit(network, config).cost
    assert near(forecast.complexity, cost.complexity)
    assert near(forecast.key_bytes, cost.key_bytes)
    assert forecast.lookups == cost.lookups
    if cost.lookups:
        assert forecast.p_error == pytest.approx(cost.p_error, rel=WITHIN)
        if config.p_error is not None:
            assert forecast.p_error <= config.p_error
        assert sum(layer.complexity for layer in forecast.layers) == pytest.approx(forecast.complexity)
        assert sum(layer.share for layer in forecast.layers) == pytest.approx(1)


def test_lookups_that_are_too_wide_for_one_bootstrap():
    network = quantized(3, "conv", size=(1, 4, 4), weight_bits=8, input_bits=6, activation_bits=4)
    config = fheconv.CompileConfig(p_error=1e-6)
    forecast, cost = network.forecast(config), fheconv.FheCircuit(network, config).cost
    assert max(layer.looked_up for layer in forecast.layers) > 11
    assert near(forecast.complexity, cost.complexity)


def test_a_larger_norm_and_more_bits_and_fewer_failures_cost_more():
    def price(bits=5, norm=16.0, p_error=1e-2):
        sums = [
            Sum(bits=bits, noise={IMAGE: 1.0}, home=0, lookup=0, count=1),
            Sum(bits=bits, noise={0: norm**2}, home=0, lookup=0, count=1),
        ]
        return choose(sums, {}, p_error).price(0, 0)

    assert price(bits=6) > price() > price(bits=4)
    assert price(norm=64.0) > price() > price(norm=1.0)
    assert price(p_error=1e-6) > price() > price(p_error=0.1)


def test_noise_of_the_greatest_variance_fails_as_often_as_allowed():
    rng = np.random.default_rng(0)
    noise = rng.normal(scale=math.sqrt(greatest_variance(4, 0.05)), size=200_000)
    # A value of four bits has one bit more above it, and moves when noise is half a step or more.
    assert (np.abs(noise) > 0.5 * 2.0**-5).mean() == pytest.approx(0.05, abs=0.003)
    assert failure(4, greatest_variance(4, 0.05)) == pytest.approx(0.05)
    assert failure(4, 0.0) == 0


def test_without_lookups_it_refuses_where_concrete_has_no_parameters():
    assert linear_dimension(16, 4.0**10, 2.0**-64) is not None
    assert linear_dimension(60, 4.0**10, 2.0**-64) is None


def test_what_is_impossible_has_no_finite_cost():
    sums = [Sum(bits=16, noise={0: 2.0**40}, home=0, lookup=0, count=1)]
    assert choose(sums, {}, 1e-12) is None


def test_it_is_shown_and_stored():
    forecast = quantized(11, overflow="defined", rounding_bits=5).forecast()
    assert forecast.layers[0].name in str(forecast)
    assert f"{forecast.lookups:,}" in str(forecast)
    stored = json.loads(json.dumps(forecast.to_dict()))
    assert stored["lookups"] == forecast.lookups
    assert [layer["name"] for layer in stored["layers"]] == [layer.name for layer in forecast.layers]
