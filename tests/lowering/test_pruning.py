from unittest import mock

import numpy as np
import pytest
import torch

import fheconv
from fheconv.lowering.lower import lower
from fheconv.lowering.pruning import Grid
from tests.support.layers import integer_network

ENGINES = ["auto", "conv", "shifts", "matrix"]


def multiply_adds(lowered):
    return sum(layer.multiply_adds for layer in lowered.layers)


def engine(network):
    (layer,) = lower(network).layers
    return layer.engine


def channels(lowered):
    """The channels of the image that are encrypted."""
    return np.unique(np.unravel_index(lowered.interface.inputs, lowered.network.input_shape)[0]).tolist()


def filters(lowered):
    """The channels of the results that are computed."""
    return np.unique(
        np.unravel_index(lowered.interface.outputs, lowered.network.accumulator_shape)[0]
    ).tolist()


def test_zero_weights_cost_nothing():
    rng = np.random.default_rng(0)
    weight = rng.integers(1, 7, (4, 3, 5, 5))
    full = lower(integer_network(weight, (3, 9, 9), padding=2), "conv")
    weight[:, 1] = 0  # an input channel
    weight[2] = 0  # a filter
    weight[:, :, [0, 4]] = 0  # two rows around the kernel
    network = integer_network(weight, (3, 9, 9), padding=2)
    lowered = lower(network, "conv")
    assert multiply_adds(full) == 4 * 3 * 5 * 5 * 81
    assert multiply_adds(lowered) == 3 * 2 * 3 * 5 * 81
    assert channels(lowered) == [0, 2]
    assert filters(lowered) == [0, 1, 3]
    weight[:, :, 2, 1:4] = 0  # a hole in the kernel
    holed = integer_network(weight, (3, 9, 9), padding=2)
    assert multiply_adds(lower(holed, "shifts")) == 3 * 2 * 12 * 81
    for each in (network, holed):
        q = rng.integers(0, 4, (2, 3, 9, 9))
        for engine in ENGINES:
            lowered = lower(each, engine)
            results = lowered.function(lowered.interface.prepare(q))
            np.testing.assert_array_equal(lowered.interface.accumulators(results, len(q)), each.accumulate(q))


def test_pixels_that_no_result_depends_on_are_not_encrypted():
    """A stride of 3 under a kernel of 2 leaves out every third row and column, and what is left over."""
    network = integer_network([[1, 2], [3, 4]], (1, 9, 8), stride=3)
    lowered = lower(network)
    expected = [r * 8 + c for r in range(8) if r % 3 < 2 for c in range(8) if c % 3 < 2]
    assert lowered.interface.inputs.tolist() == expected
    q = np.random.default_rng(0).integers(0, 4, (2, 1, 9, 8))
    results = lowered.function(lowered.interface.prepare(q))
    np.testing.assert_array_equal(lowered.interface.accumulators(results, len(q)), network.accumulate(q))


def test_results_that_are_constant_are_not_computed():
    """Padding by two leaves a border that the 1×1 kernel reads nothing of."""
    network = integer_network([[5]], (1, 3, 3), padding=2)
    lowered = lower(network)
    assert lowered.interface.outputs.tolist() == [r * 7 + c for r in range(2, 5) for c in range(2, 5)]
    q = np.random.default_rng(0).integers(0, 4, (2, 1, 3, 3))
    results = lowered.function(lowered.interface.prepare(q))
    np.testing.assert_array_equal(lowered.interface.accumulators(results, len(q)), network.accumulate(q))


@pytest.mark.parametrize("engine", ENGINES)
def test_one_bit_has_no_zero_so_that_weights_of_zero_are_computed(engine):
    weight = np.array([[[[1.0, 0.0]], [[0.0, 0.0]]]])
    images = np.random.default_rng(0).random((4, 2, 3, 3))
    network = fheconv.quantize(weight, images, fheconv.QuantConfig(weight_bits=1))
    assert network.last.convolution.weight.all()
    q, _ = network.quantize_input(images)
    lowered = lower(network, engine)
    results = lowered.function(lowered.interface.prepare(q))
    np.testing.assert_array_equal(lowered.interface.accumulators(results, len(q)), network.accumulate(q))


def test_a_layer_that_nobody_reads_still_compiles():
    """The last weights are all zero: the results are the bias, whatever comes before."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8, 3)
    )
    torch.nn.init.zeros_(model[3].weight)
    images = np.random.default_rng(0).random((4, 1, 4, 4))
    network = fheconv.quantize(model, images, fheconv.QuantConfig(accumulator_bits=6))
    circuit = fheconv.compile(network)
    for fhe in ("disable", "simulate"):
        y = circuit.predict(images, fhe=fhe)
        np.testing.assert_array_equal(y, network(images))
        np.testing.assert_allclose(y, np.broadcast_to(model[3].bias.detach(), (4, 3)), rtol=1e-6)
        assert circuit.predict(images[:0], fhe=fhe).shape == (0, 3)


def test_groups_without_weights_are_dropped_whole():
    weight = np.arange(4 * 2 * 3 * 3).reshape(4, 2, 3, 3) % 7 - 3
    weight[2:] = 0
    network = integer_network(weight, (4, 6, 6), groups=2)
    lowered = lower(network, "conv")
    assert channels(lowered) == [0, 1]
    assert filters(lowered) == [0, 1]
    q = np.random.default_rng(0).integers(0, 4, (2, 4, 6, 6))
    results = lowered.function(lowered.interface.prepare(q))
    np.testing.assert_array_equal(lowered.interface.accumulators(results, len(q)), network.accumulate(q))


@pytest.mark.parametrize(
    "options", [{}, {"padding": 2}, {"stride": (2, 1), "dilation": (1, 2), "padding": 3}]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_filters_of_rank_one_may_run_in_two_passes(channels, options):
    rng = np.random.default_rng(1)
    columns, rows = rng.integers(-2, 3, (channels, 5, 1)), rng.integers(-3, 4, (channels, 1, 5))
    columns[:, 2] = rows[:, :, 2] = 1
    network = integer_network((columns * rows)[:, None], (channels, 12, 12), groups=channels, **options)
    lowered = lower(network, "separable")
    assert multiply_adds(lowered) < multiply_adds(lower(network, "conv"))
    q = rng.integers(0, 4, (2, channels, 12, 12))
    results = lowered.function(lowered.interface.prepare(q))
    np.testing.assert_array_equal(lowered.interface.accumulators(results, len(q)), network.accumulate(q))


def test_two_passes_are_taken_by_counting():
    box = np.ones(7, int)
    assert engine(integer_network(np.outer(box, box), (1, 28, 28))) == "separable"
    # Few outputs need many of the first pass: the direct form is cheaper.
    assert engine(integer_network(np.outer(box, box), (1, 28, 28), stride=(1, 4))) == "conv"


def test_two_passes_are_refused_where_there_are_none():
    with pytest.raises(fheconv.InvalidArgumentError, match="rank one"):
        lower(integer_network([[1, 2], [3, 4]], (1, 6, 6)), "separable")


def test_a_matrix_past_its_limit_is_refused_and_not_considered():
    network = integer_network(np.ones((3, 3), int), (1, 200, 200))
    assert "matrix" not in lower(network).layers[0].reason
    with pytest.raises(fheconv.InvalidArgumentError, match="2 GiB"):
        lower(network, "matrix")


def test_an_all_zero_layer_still_has_a_function():
    network = integer_network(np.zeros((2, 1, 3, 3), int), (1, 5, 5), padding=1)
    for engine in ("auto", "matrix"):
        lowered = lower(network, engine)
        assert lowered.bits == 0
        x = np.full((1, 1, 5, 5), 3)
        results = lowered.function(lowered.interface.prepare(x))
        assert (results == 0).all()
        np.testing.assert_array_equal(lowered.interface.accumulators(results, 1), np.zeros((1, 2, 5, 5)))
    with pytest.raises(fheconv.InvalidArgumentError, match="no weights"):
        lower(network, "shifts")


def test_a_layer_without_weights_compiles_whatever_it_reads():
    source = fheconv.Conv.of(np.zeros((1, 1, 3, 1, 1)), padding=(1, 0, 0))
    images = np.random.default_rng(0).uniform(-3, -1, (2, 1, 1, 2, 2))
    config = fheconv.QuantConfig(weight_bits=8, input_bits=3, input_signed=True)
    circuit = fheconv.compile(fheconv.quantize(source, images, config))
    circuit.keygen()
    assert circuit.verify(images).ok


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_circuit_costs_is_known_without_the_positions_of_its_values(engine):
    network = integer_network([[1, 2], [3, 4]], (1, 9, 8), padding=1, stride=2)
    with mock.patch.object(Grid, "flat", mock.PropertyMock(side_effect=AssertionError)):
        lowered = lower(network, engine)
        assert multiply_adds(lowered) > 0
        assert network.budget().accumulator_bits == lowered.bits
    q = np.random.default_rng(0).integers(0, 4, (2, 1, 9, 8))
    results = lowered.function(lowered.interface.prepare(q))
    np.testing.assert_array_equal(lowered.interface.accumulators(results, len(q)), network.accumulate(q))
