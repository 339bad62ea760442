import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fheconv
from fheconv import Conv, QuantConfig, quantize
from tests.support.strategies import layer_problems, quant_configs


def network_of(problem):
    return quantize(problem.module, problem.images, problem.config)


def named_config(remedy):
    """The configuration that a remedy names, as a user would paste it."""
    text = re.search(r"QuantConfig\((?:[^()]|\([^()]*\))*\)", remedy)[0]
    return eval(text, {"QuantConfig": fheconv.QuantConfig})


@pytest.mark.slow
@given(problem=layer_problems(configs=quant_configs(most_bits=6)), data=st.data())
def test_following_the_remedy_makes_it_fit(problem, data):
    network = network_of(problem)
    needed = network.budget().accumulator_bits
    if needed < 2:
        return
    limit = data.draw(st.integers(1, needed - 1))
    remedy = network.budget(limit).remedy
    config = named_config(remedy)

    def bits_with(**changes):
        smaller = replace(config, **changes)
        return quantize(problem.module, problem.images, smaller).budget().accumulator_bits

    assert config == replace(problem.config, weight_bits=config.weight_bits, input_bits=config.input_bits), (
        "the remedy changes the widths and nothing else"
    )
    fewest = 2 if problem.config.input_signed else 1
    if remedy.startswith("Quantize with"):
        claimed = int(re.search(r"proved to need (\d+) bits", remedy)[1])
        assert bits_with() == claimed <= limit
        assert quantize(problem.module, problem.images, config).budget(limit).require().fits
        chosen = (config.weight_bits, config.input_bits)
        for weight_bits in range(1, problem.config.weight_bits + 1):
            for input_bits in range(fewest, problem.config.input_bits + 1):
                candidate = (weight_bits, input_bits)
                if (sum(candidate), candidate) > (sum(chosen), chosen):
                    assert bits_with(weight_bits=weight_bits, input_bits=input_bits) > limit
    else:
        least = int(re.search(r"Allow accumulator_bits=(\d+)", remedy)[1])
        every = [
            bits_with(weight_bits=w, input_bits=i)
            for w in range(1, problem.config.weight_bits + 1)
            for i in range(fewest, problem.config.input_bits + 1)
        ]
        assert least == min(every) == bits_with() > limit
        assert quantize(problem.module, problem.images, config).budget(least).fits


@pytest.mark.parametrize("filters", [[3.0, 0.0, -2.0], [5.0, 1.0, -4.0], [3.0, 2.0, -3.0]])
def test_the_remedy_knows_the_zero_point_where_no_position_sees_every_tap(filters):
    """Each of two positions misses a tap; a zero-point halfway makes the span narrower."""
    layer, images = Conv.of([[[filters]]], padding=(0, 1)), [[[[-1.0, 1.0]]]]
    config = QuantConfig(weight_bits=4, input_bits=5)
    network = quantize(layer, images, config)
    limit = network.budget().accumulator_bits - 1
    remedy = network.budget(limit).remedy
    named = named_config(remedy)
    claimed = int(re.search(r"need (\d+) bits", remedy)[1])
    assert quantize(layer, images, named).budget().accumulator_bits == claimed <= limit
    chosen = (named.weight_bits, named.input_bits)
    for widths in itertools.product(range(1, 5), range(1, 6)):
        if (sum(widths), widths) > (sum(chosen), chosen):
            more = replace(config, weight_bits=widths[0], input_bits=widths[1])
            assert not quantize(layer, images, more).budget(limit).fits


def test_where_nothing_fits_the_least_width_may_belong_to_two_bit_weights():
    """One bit has no zero: sixteen taps ±1 reach 16, where (1, 1, 0, …, 0) reaches 2."""
    weight = np.full((4, 4), 1e-3)
    weight[0, :2] = 1.0
    images = np.full((1, 4, 4), 0.5)
    remedy = quantize(weight, images, QuantConfig(weight_bits=2, input_bits=2)).budget(1).remedy
    assert "Allow accumulator_bits=2" in remedy
    assert named_config(remedy) == QuantConfig(weight_bits=2, input_bits=1)
    signs = quantize(weight, images, QuantConfig(weight_bits=1, input_bits=1)).budget(1).remedy
    assert "Allow accumulator_bits=5" in signs


def test_the_remedy_gives_bits_to_images_that_had_levels():
    layer, images = Conv.of([[[[3.0, 1.0, -2.0]]]]), np.linspace(0, 1, 8).reshape(1, 1, 2, 4)
    network = quantize(layer, images, QuantConfig(input_levels=30))
    limit = network.budget().accumulator_bits - 2
    named = named_config(network.budget(limit).remedy)
    assert named.input_levels is None
    assert quantize(layer, images, named).budget(limit).fits
