import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import digits
import fheconv
from fheconv.analysis.failures import accuracies, failing_lookups, noise_deviation, noisy
from fheconv.basics.errors import InvalidArgumentError
from tests.support import nets
from train_tinycnn_digits import shipped


def tail(distance, deviation):
    """How often Gaussian noise exceeds a distance, on one side."""
    return math.erfc(distance / deviation / math.sqrt(2)) / 2


@given(st.floats(1e-15, 0.99))
def test_noise_leaves_half_a_column_as_often_as_lookups_fail(p_error):
    assert 2 * tail(0.5, noise_deviation(p_error)) == pytest.approx(p_error, rel=1e-6)


@pytest.mark.parametrize("p_error", [-0.1, 1.0, float("nan")])
def test_a_failure_probability_outside_its_range_is_refused(p_error):
    network = one_lookup(4)
    network, images = EXACT
    with pytest.raises(InvalidArgumentError, match="at least 0 and less than 1"):
        noisy(network, images, p_error, np.random.default_rng(0))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("options", [{"accumulator_bits": 7}, {"rounding_bits": 4}], ids=["exact", "rounded"])
@pytest.mark.parametrize("seed", range(6))
def test_lookups_that_never_fail_give_the_clear_integers(seed, options):
    network = nets.quantized(seed, **options)
    q = nets.integer_images(network, seed, 20)
    np.testing.assert_array_equal(noisy(network, q, 0.0, np.random.default_rng(0)), network.accumulate(q))


@cache
def one_lookup(bits, **options):
    """A network whose results are one lookup of each pixel in a table, and images (1, 1, M, N) of all pixels.

    The images hold each pixel value 8 times.
    """
    module = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), nn.Conv2d(1, 1, 1, bias=False))
    for conv in (module[0], module[2]):
        nn.init.ones_(conv.weight)
    images = np.repeat(np.arange(2**bits), 8).reshape(1, 1, 8, -1)
    return nets.quantize(module, images, input_bits=bits, weight_bits=1, **options), images


EXACT = one_lookup(4, activation_bits=4)
ROUNDED = one_lookup(6, activation_bits=4, rounding_bits=4, accumulator_bits=8)


def within_luck(ours, theirs, slack=0.0):
    """Whether counts can come from the same probabilities, or from such as differ by a share of `slack`.

    Each count sums independent indicators. If their means are the same, the difference of two counts has a
    variance of at most their expected sum, and exceeds 5 standard deviations once in two million times.
    """
    total = ours + theirs
    return np.abs(ours - theirs) <= 5 * np.sqrt(total + 1) + slack * total / 2


@pytest.mark.parametrize(("network", "images"), [EXACT, ROUNDED], ids=["exact", "rounded"])
@pytest.mark.parametrize("p_error", [0.3, 0.1, 0.01])
def test_columns_are_missed_as_often_as_gaussian_noise_reaches_others(network, images, p_error):
    lookup, repeats = network.layers[0].lookup, 500
    q = np.repeat(images, repeats, axis=0)
    results = noisy(network, q, p_error, np.random.default_rng(0))
    column = 2**lookup.dropped_bits
    deviation = noise_deviation(p_error) * column
    for pixel in np.unique(images):
        offset = pixel - int(lookup.minimum[0])
        seen = results[q == pixel]
        for value in np.unique(lookup.tables):
            columns = np.flatnonzero(lookup.tables[0] == value)
            if columns[0] == 0 or columns[-1] == lookup.tables.shape[1] - 1:
                continue  # what leaves the table is another test
            # Between the middles of neighbouring columns, half a step lower if steps are rounded away.
            low, high = ((end - 0.5) * column - (column > 1) / 2 for end in (columns[0], columns[-1] + 1))
            share = tail(low - offset, deviation) - tail(high - offset, deviation)
            expected = share * len(seen)
            assert abs((seen == value).sum() - expected) <= 5 * math.sqrt(expected * (1 - share)) + 5


def test_what_leaves_the_table_comes_back_with_the_opposite_sign():
    network, images = EXACT
    results = noisy(network, np.repeat(images, 100, axis=0), 0.1, np.random.default_rng(0))
    least, most = (results[:, images[0] == pixel] for pixel in (0, 15))
    # Column -1 holds minus the last entry, -15, which four bits and one above them decrypt as 17.
    assert set(np.unique(least)) == {0, 1, 17}
    assert set(np.unique(most)) == {14, 15, 0}


@pytest.mark.parametrize(("network", "images"), [EXACT, ROUNDED], ids=["exact", "rounded"])
def test_one_lookup_gives_each_value_as_often_as_simulated(network, images):
    circuit = fheconv.compile(network, fheconv.CompileConfig(p_error=0.1))
    q = np.repeat(images, 40, axis=0)
    simulated = circuit.accumulate(q, "simulate")
    ours = noisy(network, q, circuit.cost.p_error, np.random.default_rng(0))
    for pixel in np.unique(images):
        theirs, counts = (np.bincount(y[q == pixel], minlength=32) for y in (simulated, ours))
        assert within_luck(counts, theirs).all()
    wrong, theirs = ((y != network.accumulate(q)).sum() for y in (ours, simulated))
    assert within_luck(wrong, theirs, slack=0.1)


MIXED = {"accumulator_bits": {"0.0": 4, "1.0": 6}, "activation_bits": 2}


@pytest.mark.parametrize(
    ("names", "options", "strategy"),
    [
        (("conv", "conv"), {"accumulator_bits": 5}, "multi"),
        (("conv", "conv"), {"rounding_bits": 5}, "multi"),
        (("max pool",), {"accumulator_bits": 5}, "multi"),
        (("conv", "conv"), MIXED, "multi"),
        (("conv", "conv"), MIXED, "mono"),
    ],
    ids=["exact", "rounded", "maxima", "two widths", "two widths, one parameter set"],
)
@pytest.mark.slow
def test_as_many_images_have_wrong_results_as_simulated(names, options, strategy):
    from concrete import fhe

    module, images = nets.random_net(2, *names, size=(1, 5, 5))
    network = nets.quantize(module, images, **options)
    configuration = fhe.Configuration(parameter_selection_strategy=strategy)
    circuit = fheconv.compile(network, fheconv.CompileConfig(p_error=0.1, configuration=configuration))
    q = nets.integer_images(network, 0, 600)
    ours = noisy(
        network, q, circuit.cost.p_error, np.random.default_rng(0), one_parameter_set=strategy == "mono"
    )
    expected = network.accumulate(q)
    wrong, theirs = (
        (y != expected).reshape(len(q), -1).any(axis=1).sum()
        for y in (ours, circuit.accumulate(q, "simulate"))
    )
    assert theirs > 0
    assert within_luck(wrong, theirs, slack=0.1)


def test_a_constant_table_never_fails():
    """Nothing is looked up in it: the circuit that has only such lookups has none."""
    module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Hardtanh(2.0, 3.0), nn.Conv2d(1, 1, 1))
    nn.init.zeros_(module[0].weight)
    images = np.random.default_rng(0).uniform(0, 1, (50, 1, 4, 4))
    network = nets.quantize(module, images)
    q, _ = network.quantize_input(images)
    np.testing.assert_array_equal(noisy(network, q, 0.3, np.random.default_rng(0)), network.accumulate(q))


@pytest.mark.slow
def test_the_predicted_accuracy_of_tinycnn_is_that_of_its_simulation():
    data, runs = digits.digits(), 4
    network = fheconv.quantize(shipped(), data.train_images, fheconv.QuantConfig(rounding_bits=5))
    circuit = fheconv.compile(network, fheconv.CompileConfig(p_error=0.05))
    simulated = np.mean(
        [
            (circuit.predict(data.test_images, fhe="simulate").argmax(1) == data.test_labels.numpy()).mean()
            for _ in range(runs)
        ]
    )
    predicted = accuracies(network, data.test_images, data.test_labels, circuit.cost.p_error, draws=40)
    # The deviation of one draw is what one simulation has too; five of the mean's are hardly ever luck.
    assert abs(predicted.mean() - simulated) <= 5 * predicted.std() / math.sqrt(runs)


def test_without_failures_each_draw_has_the_accuracy_of_the_clear_integers():
    network, images = scores()
    labels = np.arange(len(images)) % 3
    clear = (network(images).argmax(axis=1) == labels).mean()
    np.testing.assert_array_equal(accuracies(network, images, labels, 0.0, draws=3), [clear] * 3)


def test_draws_differ_and_repeat_by_seed():
    network, images = scores()
    labels = network(images).argmax(axis=1)
    drawn = accuracies(network, images, labels, 0.3, draws=6, seed=1)
    assert len(set(drawn)) > 1
    np.testing.assert_array_equal(drawn, accuracies(network, images, labels, 0.3, draws=6, seed=1))


@pytest.mark.parametrize("labels", [[0], [[0]] * 12, []])
def test_labels_that_are_not_one_for_each_image_are_refused(labels):
    network, images = scores()
    with pytest.raises(InvalidArgumentError, match=r"labels have shape .* for 12 images"):
        accuracies(network, images, np.array(labels, int), 0.1)


def test_results_that_are_no_scores_are_refused():
    network, images = EXACT
    with pytest.raises(InvalidArgumentError, match="one score for each class"):
        accuracies(network, images, [0], 0.1)


@cache
def scores():
    """A network with three scores, and the images that it was calibrated on."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3, bias=False))
    images = rng.uniform(-1, 1, (12, 1, 5, 5))
    return nets.quantize(module, images, accumulator_bits=6), images


@pytest.mark.parametrize(
    ("lookups", "p_error", "words"),
    [
        (286, 0.05, "about 14 for an image"),
        (100, 0.02, "about 2.0 for an image"),
        (10, 0.05, "about 0.5 for an image"),
        (4, 0.1, "one image of 2 has one"),
        (1, 1e-5, "one image of 100,000 has one"),
        (1, 1e-300, "fewer than one image of a billion has one"),
        (1, 0.0, "fewer than one image of a billion has one"),
    ],
)
def test_failing_lookups_are_told_by_the_image(lookups, p_error, words):
    assert failing_lookups(lookups, p_error) == words


def test_costs_and_forecasts_tell_failing_lookups_not_that_every_image_is_wrong():
    network = nets.quantized(0, rounding_bits=4)
    config = fheconv.CompileConfig(p_error=0.05)
    cost, forecast = fheconv.compile(network, config).cost, network.forecast(config)
    assert cost.global_p_error > cost.p_error  # whoever wants the number has it
    assert failing_lookups(cost.lookups, cost.p_error) in str(cost)
    assert 'score(x, y, fhe="simulate")' in str(cost)
    assert failing_lookups(forecast.lookups, forecast.p_error) in str(forecast)
    for shown in (str(cost), str(forecast)):
        assert f"{cost.global_p_error:.1e}" not in shown
