import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fheconv
from fheconv import AccumulatorOverflowError, Conv, InvalidArgumentError, QuantConfig, quantize
from fheconv.bounds import layer_bounds
from tests.strategies import layer_problems, quant_configs


def network_of(problem):
    return quantize(problem.module, problem.images, problem.config)


def named_config(remedy):
    """The configuration that a remedy names, as a user would paste it."""
    text = re.search(r"QuantConfig\((?:[^()]|\([^()]*\))*\)", remedy)[0]
    return eval(text, {"QuantConfig": fheconv.QuantConfig})


@given(layer_problems())
def test_the_report_says_what_the_bounds_prove(problem):
    network = network_of(problem)
    bounds = layer_bounds(network.last, network.shapes)
    report = network.budget()
    (layer,) = report.layers
    assert report.accumulator_bits == layer.offset_bits == bounds.offset_bits
    assert layer.twos_complement_bits == bounds.twos_complement_bits
    assert layer.taps == problem.module.weight[0].numel()
    assert (layer.weight_bits, layer.input_bits) == (problem.config.weight_bits, problem.config.input_bits)
    for c, channel in enumerate(layer.channels):
        assert channel.channel == c
        assert (channel.minimum, channel.maximum) == (bounds.channel_minimum[c], bounds.channel_maximum[c])
        assert bounds.maximum[(c, *channel.position)] == channel.maximum
        assert channel.span < 2**channel.offset_bits <= 2**layer.offset_bits
    assert layer.worst.span == max(channel.span for channel in layer.channels)


@given(layer_problems())
def test_what_calibration_saw_lies_inside_what_was_proved(problem):
    network = network_of(problem)
    (layer,) = network.budget().layers
    y = network.integers(problem.images)
    for c, channel in enumerate(layer.channels):
        assert channel.observed == (y[:, c].min(), y[:, c].max())
        assert channel.minimum <= channel.observed[0] <= channel.observed[1] <= channel.maximum
    assert layer.observed_bits <= layer.offset_bits <= layer.data_type_bits


@given(problem=layer_problems(), limit=st.integers(1, 20))
def test_a_network_fits_or_the_refusal_says_where_why_and_what_next(problem, limit):
    network = network_of(problem)
    report = network.budget(limit)
    (layer,) = report.layers
    assert report.fits == (layer.worst.span <= 2**limit - 1)
    if report.fits:
        assert report.require() is report
        assert report.remedy is None
        return
    with pytest.raises(AccumulatorOverflowError) as refusal:
        report.require()
    error = refusal.value
    assert (error.layer, error.channel) == ("conv", layer.worst.channel)
    assert (error.value, error.limit) == (layer.worst.span, 2**limit - 1)
    assert error.remedy == report.remedy
    for words in (f"channel {layer.worst.channel}", f"{error.value} steps", str(error.limit), error.remedy):
        assert words in str(error)


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


def test_the_remedy_gives_bits_to_images_that_had_levels():
    layer, images = Conv.of([[[[3.0, 1.0, -2.0]]]]), np.linspace(0, 1, 8).reshape(1, 1, 2, 4)
    network = quantize(layer, images, QuantConfig(input_levels=30))
    limit = network.budget().accumulator_bits - 2
    named = named_config(network.budget(limit).remedy)
    assert named.input_levels is None
    assert quantize(layer, images, named).budget(limit).fits


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


@given(problem=layer_problems(), limit=st.none() | st.integers(1, 20))
def test_the_plain_data_is_json_and_agrees_with_the_report(problem, limit):
    report = network_of(problem).budget(limit)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["fits"] == report.fits
    assert data["limit"] == limit
    assert data["accumulator_bits"] == report.accumulator_bits
    assert data["remedy"] == report.remedy
    (layer,) = data["layers"]
    assert [c["maximum"] - c["minimum"] for c in layer["channels"]] == [
        c.span for c in report.layers[0].channels
    ]


@given(problem=layer_problems(), limit=st.none() | st.integers(1, 20))
def test_the_printed_report_names_the_worst_channel_and_the_remedy(problem, limit):
    report = network_of(problem).budget(limit)
    worst = report.layers[0].worst
    lines = str(report).splitlines()
    (marked,) = (line for line in lines if "← worst" in line)
    assert f" {worst.channel} ← worst" in marked
    assert f"{worst.minimum}..{worst.maximum}" in marked
    if report.remedy:
        assert report.remedy in " ".join(" ".join(lines).split())
    html = report._repr_html_()
    assert html.startswith("<pre")
    assert html.endswith("</pre>")
    assert f"{worst.minimum}..{worst.maximum}" in html
    assert ("color" in html) == (not report.fits or "color" in network_of(problem).budget()._repr_html_())


@pytest.mark.parametrize("name", ["features[bold]", "a[/b]", "<script>"])
def test_a_layers_name_is_shown_as_it_is(name):
    report = quantize(Conv.of(np.ones((2, 2)), name=name), np.ones((1, 3, 3))).budget(1)
    assert name in str(report)
    assert "<script>" not in report._repr_html_()


@pytest.mark.parametrize("limit", [0, -1, 2.5, "7", True])
def test_a_limit_that_is_no_width_is_refused(limit):
    network = quantize(np.ones((2, 2)), np.ones((1, 3, 3)))
    with pytest.raises(InvalidArgumentError, match="accumulator_bits"):
        network.budget(limit)


def test_without_a_limit_everything_fits():
    report = quantize(np.ones((9, 9)), np.full((1, 9, 9), 0.5)).budget()
    assert report.fits
    assert report.require() is report
    assert (report.limit, report.remedy) == (None, None)


def test_a_limit_from_numpy_is_json_too():
    network = quantize(np.ones((2, 2)), np.ones((1, 3, 3)))
    assert json.loads(json.dumps(network.budget(np.int64(3)).to_dict()))["limit"] == 3
