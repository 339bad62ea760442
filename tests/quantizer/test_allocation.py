from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import fheconv
from fheconv import QuantConfig
from fheconv.capture.model import capture
from fheconv.networks.quantization import CalibratedInput
from fheconv.quantizer.allocation import LEVELS, SHARE, TOLERANCE, WEIGHT_BITS, Trial, allocate
from tests.support import nets

AUTO = {"activation_bits": "auto", "input_bits": "auto"}
FIRST, SECOND, LAST = "0", "2", "5"


@cache
def problem(seed, images=25):
    """A network of two lookups, captured, and images of one shape each to calibrate it on."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Conv2d(3, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    )
    with torch.no_grad():
        for layer in (module[0], module[2], module[5]):
            layer.weight.copy_(torch.tensor(rng.normal(size=layer.weight.shape)))
            layer.bias.zero_()
    batch = rng.uniform(size=(images, 1, 4, 4)) * (rng.uniform(size=(images, 1, 4, 4)) < 0.5)
    calibrated = CalibratedInput(
        minimum=float(batch.min()), maximum=float(batch.max()), integral=False, images=images
    )
    return module.double().eval(), capture(module.double(), (1, 4, 4)), batch, calibrated


@cache
def allocation(seed, **options):
    """What is chosen of all levels."""
    _, network, batch, calibrated = problem(seed)
    return allocate(network, batch, calibrated, QuantConfig(**AUTO, **options))


def narrowed(seed, width):
    """What is chosen where no lookup reads more than `width` bits."""
    _, network, batch, calibrated = problem(seed)
    config = QuantConfig(**AUTO, accumulator_bits={FIRST: width, SECOND: width})
    return allocate(network, batch, calibrated, config)


def trial(seed):
    _, network, batch, calibrated = problem(seed)
    return Trial(network, batch, calibrated)


def quantize(seed, **options):
    module, _, batch, _ = problem(seed)
    return nets.quantize(module, batch, **options)


def test_every_fifth_image_is_held_out_where_there_are_twenty():
    _, network, images, calibrated = problem(0)
    many, few = Trial(network, images[:20], calibrated), Trial(network, images[:19], calibrated)
    np.testing.assert_array_equal(many.held_out, images[4:20:5])
    np.testing.assert_array_equal(many.images, np.delete(images[:20], np.s_[4::5], axis=0))
    np.testing.assert_array_equal(few.held_out, images[:19])
    np.testing.assert_array_equal(few.images, images[:19])


def test_the_error_is_that_of_the_outputs_on_the_held_out_images():
    module, _, images, _ = problem(0)
    config = QuantConfig(accumulator_bits=6, input_range=(images.min(), images.max()))
    network = fheconv.quantize(module, np.delete(images, np.s_[4::5], axis=0), config)
    expected = nets.torch_output(module, images[4::5])
    off = network(images[4::5]) - expected
    assert trial(0).error(config) == pytest.approx((off**2).mean() / expected.var(axis=0).mean(), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "rounding_bits"), [(0, None), (1, 4)])
def test_more_bits_never_give_a_greater_error(seed, rounding_bits):
    widths = (1, 2, 4, 5)
    found = [allocation(seed, accumulator_bits=bits, rounding_bits=rounding_bits) for bits in widths]
    errors = [one.error for one in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]
    assert all(one.config.accumulator_bits <= bits for bits, one in zip(widths, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_no_single_rung_would_have_been_better(seed):
    found = allocation(seed, accumulator_bits=5)
    assert trial(seed).error(found.config) == found.error
    levels = {"input_levels": found.config.input_levels, **found.config.activation_levels}
    for name, own in levels.items():
        rung = LEVELS.index(own)
        for other in LEVELS[max(rung - 1, 0) : rung] + LEVELS[rung + 1 : rung + 2]:
            changed = {**levels, name: other}
            config = QuantConfig(
                accumulator_bits=found.config.accumulator_bits,
                input_levels=changed.pop("input_levels"),
                activation_levels=changed,
            )
            try:
                error = trial(seed).error(config)
            except fheconv.AccumulatorOverflowError:
                continue
            assert error >= found.error * (1 - SHARE)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("bits", [4, 5])
def test_chosen_numbers_are_no_worse_than_half_of_the_width_for_all(seed, bits):
    usual = QuantConfig(accumulator_bits=bits, input_levels=2 ** (bits // 2))
    assert allocation(seed, accumulator_bits=bits).error <= trial(seed).error(usual)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_the_network_has_the_numbers_that_were_chosen_and_keeps_to_its_widths(seed):
    network = quantize(seed, accumulator_bits=5, weight_bits="auto", **AUTO)
    config = network.config
    assert not config.is_auto
    assert eval(str(config)) == config
    assert network.budget(5).fits
    assert network.budget().proved
    assert set(config.activation_levels) == {FIRST, SECOND}
    assert set(config.weight_bits) == {FIRST, SECOND, LAST}
    assert {*config.activation_levels.values(), config.input_levels} <= {*LEVELS}
    assert {*config.weight_bits.values()} <= {*WEIGHT_BITS}
    again = fheconv.quantize(*problem(seed)[::2], config)
    np.testing.assert_array_equal(again.integers(problem(seed)[2]), network.integers(problem(seed)[2]))


def test_numbers_that_are_given_stay():
    network = quantize(
        0,
        accumulator_bits={FIRST: 6, SECOND: 5},
        weight_bits={FIRST: "auto", SECOND: 3},
        activation_bits={FIRST: 2, SECOND: "auto"},
        input_levels=5,
        input_bits="auto",
    )
    config = network.config
    assert set(config.weight_bits) == {FIRST, SECOND}
    assert config.weight_bits[SECOND] == 3
    assert config.activation_bits == {FIRST: 2}
    assert set(config.activation_levels) == {SECOND}
    assert config.input_levels == 5
    first, second = network.layers[0].lookup, network.layers[1].lookup
    assert first.bits <= config.accumulator_bits[FIRST] <= 6
    assert second.bits <= config.accumulator_bits[SECOND] <= 5
    assert first.output.maximum == 3


def test_levels_that_are_given_take_the_place_of_auto():
    config = quantize(0, accumulator_bits=5, activation_bits="auto", activation_levels=3).config
    assert (config.activation_bits, config.activation_levels) == (None, 3)


@pytest.mark.slow
def test_auto_accumulators_are_the_narrowest_within_the_tolerance():
    found = allocation(0, accumulator_bits="auto")
    widths = found.config.accumulator_bits
    assert set(widths) == {FIRST, SECOND}  # those of the last layer enter no lookup
    (width,) = set(widths.values())
    assert found.error <= TOLERANCE < narrowed(0, width - 1).error


@pytest.mark.slow
def test_without_a_tolerable_width_the_one_of_least_error_is_taken():
    """One level for each activation but 0 is never good enough."""
    _, network, images, calibrated = problem(0)
    errors = []
    for bits in ("auto", {FIRST: 8, SECOND: 8}):
        config = QuantConfig(accumulator_bits=bits, activation_levels=2, input_bits="auto")
        errors.append(allocate(network, images, calibrated, config).error)
    assert errors[0] == errors[1] > TOLERANCE


@pytest.mark.slow
def test_rounding_limits_what_is_auto():
    """To 4 bits more than what rounding leaves."""
    found = allocation(0, rounding_bits=2)
    _, network, images, calibrated = problem(0)
    config = QuantConfig(**AUTO, rounding_bits=2, accumulator_bits={FIRST: 6, SECOND: 6})
    assert found == allocate(network, images, calibrated, config)


def test_what_no_numbers_can_keep_to_is_refused():
    _, network, images, calibrated = problem(0)
    config = QuantConfig(accumulator_bits=3, activation_bits="auto", input_bits=4)
    with pytest.raises(fheconv.AccumulatorOverflowError, match=r"Layer '0'.*a single weight of 1"):
        allocate(network, images, calibrated, config)


def test_without_a_lookup_there_is_nothing_to_balance():
    config = QuantConfig(accumulator_bits="auto", input_bits="auto")
    with pytest.raises(fheconv.InvalidArgumentError, match=r"No accumulator .* enters a lookup"):
        fheconv.quantize(np.ones((2, 2)), np.random.default_rng(0).random((2, 1, 4, 4)), config)


def test_a_single_convolution_balances_its_images_against_its_weights():
    rng = np.random.default_rng(0)
    weight, images = rng.normal(size=(2, 1, 3, 3)), rng.uniform(-1, 1, (25, 1, 5, 5))
    errors = []
    for bits in (4, 8):
        config = QuantConfig(accumulator_bits=bits, input_bits="auto", input_signed=True)
        network = fheconv.quantize(weight, images, config)
        assert network.budget(bits).fits
        assert network.config.input_levels >= 3
        errors.append(np.square(network(images) - network.source(images)).mean())
    assert errors[1] < errors[0]


def test_it_is_silent_where_there_is_no_terminal(capsys):
    quantize(0, accumulator_bits=3, **AUTO)
    assert capsys.readouterr() == ("", "")
