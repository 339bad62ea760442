import numpy as np
import pytest

import fheconv
from fheconv.lowering.lower import lower
from fheconv.networks.bounds import worst_case_inputs
from tests.support.layers import KINDS, random_network, unlike_calibration

ENGINES = ["auto", "conv", "shifts", "matrix"]


@pytest.mark.sampled(7)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_the_circuits_function_on_numpy_is_the_integer_network(engine, kind, seed):
    network, _, _ = random_network(seed, kind)
    q, _ = network.quantize_input(unlike_calibration(network, seed, 5))
    try:
        lowered = lower(network, engine)
    except fheconv.InvalidArgumentError:  # nothing to read, nothing to shift
        assert network.budget().accumulator_bits == 0
        return
    results = lowered.function(lowered.interface.prepare(q))
    assert results.min() >= 0
    assert int(results.max()).bit_length() <= lowered.bits
    np.testing.assert_array_equal(lowered.interface.accumulators(results, len(q)), network.accumulate(q))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_worst_cases_reach_zero_and_the_proved_width(kind, seed):
    network, _, _ = random_network(seed, kind)
    lowered = lower(network)
    worst = worst_case_inputs(network.last, network.input_shape, lowered.planes.bounds)
    results = lowered.function(lowered.interface.prepare(worst))
    # The results that are computed, by the channel that each belongs to.
    channels = np.unravel_index(lowered.interface.outputs, network.accumulator_shape)[0]
    for channel in np.unique(channels):
        ours = results[:, channels == channel]
        assert int(ours.max()) == lowered.planes.bounds.channel_span[channel]
        # The least may belong to a position whose result is constant, and is not computed.
        minimum = lowered.planes.bounds.minimum[channel].ravel()
        computed = lowered.interface.outputs[channels == channel] - channel * minimum.size
        assert int(ours.min()) == minimum[computed].min() - lowered.planes.bounds.channel_minimum[channel]
    assert int(results.max()).bit_length() == lowered.bits


def test_auto_takes_the_engine_predicted_cheapest_and_says_so():
    network, _, _ = random_network(0)
    lowered = {engine: lower(network, engine) for engine in ("conv", "matrix", "auto")}
    (conv,), (matrix,), (auto,) = (one.layers for one in lowered.values())
    assert conv.multiply_adds < matrix.multiply_adds
    assert auto.engine == "conv"
    assert auto.reason.startswith("cheapest predicted, in ms: conv")
    assert "matrix" in auto.reason
    assert matrix.reason == "asked for"


@pytest.mark.sampled(7)
@pytest.mark.parametrize("engine", ["conv", "matrix"])
@pytest.mark.parametrize("lanes", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(300, 304))
def test_lanes_neither_borrow_nor_carry(engine, lanes, kind, seed):
    """Images at the least and the greatest accumulators side by side, and a batch that fills no lane."""
    network, _, _ = random_network(seed, kind)
    try:
        lowered = lower(network, engine, lanes)
    except fheconv.InvalidArgumentError:
        assert network.budget().accumulator_bits == 0
        return
    worst = worst_case_inputs(network.last, network.input_shape, lowered.planes.bounds)
    order = np.random.default_rng(seed).permutation(len(worst) * 2) % len(worst)
    random, _ = network.quantize_input(unlike_calibration(network, seed, 3))
    images = np.concatenate([worst, worst[order], random])
    inputs = lowered.interface.prepare(images)
    assert len(inputs) == -(-len(images) // lanes)
    results = lowered.function(inputs)
    assert results.min() >= 0
    assert int(results.max()).bit_length() <= lowered.bits
    np.testing.assert_array_equal(
        lowered.interface.accumulators(results, len(images)), network.accumulate(images)
    )
