import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fheconv
from fheconv import AccumulatorOverflowError, Conv, InvalidArgumentError, quantize
from fheconv.networks.bounds import layer_bounds, worst_case_inputs
from tests.support.strategies import layer_problems


def network_of(problem):
    return quantize(problem.module, problem.images, problem.config)


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


class Gated(nn.Module):
    def forward(self, x):
        return 2 * (x * torch.sigmoid(x) / 3 - 1)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.SiLU(), "silu"),
        (nn.Hardtanh(), "hardtanh"),
        (Gated(), "sigmoid, mul"),
        (nn.Sequential(nn.ReLU(), nn.Tanh()), "relu, tanh"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_lookup_bears_the_name_of_the_activation(module, name):
    """Channels are divided by their scale, which is no operation of the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), module, nn.Flatten(), nn.Linear(32, 3), module, nn.Linear(3, 1))
    images = np.random.default_rng(0).uniform(0, 1, (40, 1, 6, 6))
    kinds = [layer.kind for layer in quantize(model.eval(), images).budget().layers]
    assert kinds == [f"conv 3×3, {name}", f"linear, {name}", "linear"]


def test_encrypted_images_reach_the_ends_that_were_proved():
    weight = np.array([[[[1.0, -2.0], [3.0, 0.5]]], [[[-1.0, -1.0], [0.0, 2.0]]]])
    config = fheconv.QuantConfig(weight_bits=3, input_bits=2)
    network = quantize(weight, np.linspace(0, 1, 9).reshape(1, 1, 3, 3), config)
    (layer,) = network.budget().layers
    worst = worst_case_inputs(network.last, network.input_shape, layer_bounds(network.last, network.shapes))
    images = (worst.reshape(-1, *network.input_shape) - network.input.zero_point) * network.input.scale
    circuit = fheconv.compile(network)
    circuit.keygen()
    encrypted = circuit.predict(images, fhe="execute") / network.last.scale
    for c, channel in enumerate(layer.channels):
        reached = encrypted[:, c].min(), encrypted[:, c].max()
        np.testing.assert_allclose(reached, (channel.minimum, channel.maximum), atol=1e-6)
