"""What a client knows of a circuit, as an object and as plain data."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fheconv
from fheconv.circuits.files.interface import interface_from_dict, interface_to_dict
from fheconv.lowering.lower import lower
from tests.support.nets import quantized


def made_again(interface):
    return interface_from_dict(json.loads(json.dumps(interface_to_dict(interface))))


@settings(max_examples=25)
@given(st.integers(0, 400))
@pytest.mark.slow
def test_written_and_read_it_does_the_same(seed):
    network = quantized(seed)
    lowered = lower(network)
    again = made_again(lowered.interface)
    rng = np.random.default_rng(seed)
    least, most = network.input.minimum, network.input.maximum
    q = rng.integers(least, most + 1, (3, *network.input_shape))
    prepared = again.prepare(q)
    np.testing.assert_array_equal(prepared, lowered.interface.prepare(q))
    accumulators = again.accumulators(lowered.function(prepared), len(q))
    np.testing.assert_array_equal(accumulators, network.accumulate(q))
    np.testing.assert_array_equal(again.dequantize(accumulators), network.dequantize(accumulators))
    assert again.output_shape == network.output_shape
    x = (q - network.input.zero_point) * network.input.scale
    np.testing.assert_array_equal(again.quantize_input(x)[0], network.quantize_input(x)[0])


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "last",
    [
        nn.Softmax(dim=1),
        nn.LogSoftmax(dim=-1),
        nn.Sequential(nn.ReLU(), nn.Unflatten(1, (2, 2))),
        nn.Hardtanh(-0.2, 0.7),
        nn.PReLU(4),
        nn.GELU("tanh"),
    ],
    ids=str,
)
def test_what_the_client_computes_in_clear_is_written_too(last):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4), last).eval()
    images = torch.rand(20, 1, 4, 4)
    network = fheconv.quantize(model, images, fheconv.QuantConfig(accumulator_bits=6))
    interface = made_again(lower(network).interface)
    accumulators = network.integers(images)
    np.testing.assert_array_equal(interface.dequantize(accumulators), network(images))


def plain():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4), nn.Softmax(dim=1))
    network = fheconv.quantize(model.eval(), torch.rand(20, 1, 4, 4))
    return interface_to_dict(lower(network).interface)


PLAIN = plain()


def nested(depth):
    expression = {"operator": "x", "arguments": [], "options": {}}
    for _ in range(depth):
        expression = {"operator": "relu", "arguments": [expression], "options": {}}
    return {"activation": expression, "view": None, "last": None}


def large(shape):
    constant = {"shape": shape, "values": [1.0] * int(np.prod(shape))}
    expression = {"operator": "add", "arguments": [{**nested(0)["activation"]}, constant], "options": {}}
    return {"activation": expression, "view": None, "last": None}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("input", {**PLAIN["input"], "scale": 0}),
        ("input", {**PLAIN["input"], "scale": float("nan")}),
        ("input", {**PLAIN["input"], "minimum": 99999}),
        ("input", {**PLAIN["input"], "minimum": 0.5}),
        ("input", {**PLAIN["input"], "more": 1}),
        ("input", None),
        ("input_shape", [1, 4, -4]),
        ("input_shape", [2**20, 2**20, 2**20]),
        ("input_shape", [1, 4, True]),
        ("input_shape", "abc"),
        ("inputs", {"shape": [2], "values": [0, 16]}),
        ("inputs", {"shape": [2], "values": [-1, 3]}),
        ("inputs", {"shape": [2], "values": [3, 3]}),
        ("inputs", {"shape": [2, 1], "values": [1, 3]}),
        ("inputs", {"shape": [3], "values": [1, 3]}),
        ("inputs", {"shape": [1], "values": [1.0]}),
        ("inputs", {"shape": [1], "values": [10**30]}),
        ("outputs", {"shape": [1], "values": [10**6]}),
        ("start", {"shape": [0], "values": []}),
        ("factors", {"shape": [], "values": [1]}),
        ("factors", {"shape": [0], "values": []}),
        ("bias", {"shape": [7, 1, 1], "values": [0] * 7}),
        ("scale", {"shape": [1, 1, 1], "values": [float("inf")]}),
        ("scale", {"shape": [1, 1, 1], "values": ["1"]}),
        ("scale", 3),
        ("finish", {"activation": {"operator": "eval", "arguments": [], "options": {}}}),
        ("finish", {**nested(0), "activation": {"operator": "softmax", "arguments": [], "options": {}}}),
        ("finish", {**nested(0), "view": {"shape": [2], "values": [0, 99]}}),
        ("finish", {**nested(0), "view": {"shape": [0], "values": []}}),
        ("finish", large([4, 1, 1000])),
        ("finish", {**nested(0), "activation": {"operator": "x", "arguments": [], "options": []}}),
        ("finish", []),
        ("lanes", None),
        ("lanes", {"count": 1, "bits": 8}),
        ("lanes", {"count": 65, "bits": 1}),
        ("lanes", {"count": True, "bits": 8}),
        ("lanes", {"count": 2, "bits": 0}),
        ("lanes", {"count": 2, "bits": 8.0}),
        ("lanes", {"count": 16, "bits": 4}),
        ("lanes", {"count": 2, "bits": 8, "more": 1}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_data_that_no_circuit_has_is_refused(name, value):
    with pytest.raises(fheconv.ArtifactError, match="interface is altered"):
        interface_from_dict({**PLAIN, name: value})


def test_expressions_nested_too_deep_are_refused():
    with pytest.raises(fheconv.ArtifactError, match="interface is altered"):
        interface_from_dict({**PLAIN, "finish": nested(5000)})


@pytest.mark.parametrize("data", [None, [], "x", {}, {**PLAIN, "more": 1}], ids=lambda value: str(value)[:10])
def test_what_is_no_interface_is_refused(data):
    with pytest.raises(fheconv.ArtifactError, match="interface is altered"):
        interface_from_dict(data)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(st.data())
def test_nothing_else_than_a_refusal_comes_of_altered_data(data):
    """Whatever value is put wherever in it: it is refused, or it is an interface that computes."""
    altered = copy.deepcopy(PLAIN)
    place, key = altered, data.draw(st.sampled_from(sorted(altered)))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(values)
    try:
        interface = interface_from_dict(altered)
    except fheconv.ArtifactError:
        return
    interface.prepare(np.zeros((1, *interface.input_shape), np.int64))
    interface.dequantize(interface.accumulators(np.zeros((1, len(interface.outputs)), np.int64), 1))
