"""The last layer in planes: the same integers, from narrower accumulators."""

import re
import warnings
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fheconv
from fheconv.lowering.interface import recombined
from fheconv.lowering.lower import lower
from fheconv.lowering.planes import LOOKUPS_A_RESULT, MOST_PLANES, in_planes
from fheconv.networks.bounds import layer_bounds, norm_bits, without_bias
from fheconv.networks.floats import Maximum
from tests.support.nets import integer_images, quantize, random_net, real_images
from tests.support.strategies import integer_layers, integer_sums

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # concrete-python 2.11 imports the deprecated pkg_resources
    from concrete import fhe

SEEDS = range(16)  # each block of tests.support.nets but two, and heads of one step to four


def network(seed, last_bits=8, **options):
    """A small network whose inner accumulators are narrow, with weights of `last_bits` in the last layer."""
    module, images = random_net(seed, depth=1, size=(1, 5, 5))
    plain = quantize(module, images)
    inner = [layer.name for layer in plain.layers[:-1] if not isinstance(layer, Maximum)]
    weight_bits = {**dict.fromkeys(inner, 4), plain.last.name: last_bits}
    widths = dict.fromkeys(inner, 5)
    return quantize(
        module,
        images,
        weight_bits=weight_bits,
        activation_bits=3,
        input_bits=3,
        accumulator_bits=widths,
        **options,
    )


@st.composite
def layers(draw):
    """A layer of one convolution, or of several terms and steps, and the shapes of the tensors it reads."""
    if draw(st.booleans()):
        layer, shape = draw(integer_layers())
        return layer, (shape,)
    return draw(integer_sums())


@given(layers(), st.floats(0, 12), st.integers(0, 2**32))
def test_planes_add_up_to_the_clear_integers_and_keep_to_their_bounds(problem, free, seed):
    layer, shapes = problem
    with mock.patch("fheconv.lowering.planes.FREE_BITS", free):
        planes = in_planes(layer, shapes, lookup_bits=1)
    rng = np.random.default_rng(seed)
    quantizations = dict(zip(layer.sources, layer.inputs, strict=True))
    tensors = [
        rng.integers(q.minimum, q.maximum + 1, (20, *shape))
        if (q := quantizations.get(source))
        else np.zeros((20, *shape), np.int64)
        for source, shape in enumerate(shapes)
    ]
    # Half of them at the ends of their ranges.
    for source, q in quantizations.items():
        ends = rng.choice([q.minimum, q.maximum], tensors[source][:10].shape)
        tensors[source][:10] = ends
    parts = planes.layer.accumulate(tensors)
    whole = without_bias(layer)
    np.testing.assert_array_equal(recombined(parts, planes.factors), whole.accumulate(tensors))
    assert parts.shape[1] == layer.shape[0] * len(planes.factors)
    assert (parts >= planes.bounds.minimum).all()
    assert (parts <= planes.bounds.maximum).all()
    assert planes.accumulator_bits == layer_bounds(whole, shapes).offset_bits
    assert len(planes.factors) <= MOST_PLANES


@given(layers())
def test_beside_no_lookups_and_beside_wide_ones_a_layer_stays_as_it_is(problem):
    layer, shapes = problem
    whole = layer_bounds(without_bias(layer), shapes)
    for lookup_bits in (0, 30):  # none, or wider than any of these accumulators with its noise
        planes = in_planes(layer, shapes, lookup_bits)
        assert planes.factors.tolist() == [1]
        np.testing.assert_array_equal(planes.bounds.minimum, whole.minimum)


def test_as_few_planes_as_do():
    """The same weights, with more and more that is free."""
    quantized = network(4)
    counts, widths = [], []
    for free in range(4, 30, 2):
        with mock.patch("fheconv.lowering.planes.FREE_BITS", free):
            planes = in_planes(quantized.last, quantized.shapes, lookup_bits=1)
        counts.append(len(planes.factors))
        widths.append(planes.bounds.offset_bits)
    assert counts[0] > 8
    assert counts[-1] == 1
    assert counts == sorted(counts, reverse=True)
    assert widths == sorted(widths)


@given(layers(), st.integers(0, 10**4))
def test_results_are_far_fewer_than_many_lookups(problem, lookups):
    layer, shapes = problem
    with mock.patch("fheconv.lowering.planes.FREE_BITS", 0):  # as many planes as may be
        few, many = (in_planes(layer, shapes, 1, count) for count in (0, lookups))
    results = len(many.factors) * np.prod(layer.shape)
    assert len(many.factors) <= MOST_PLANES or results * LOOKUPS_A_RESULT <= lookups
    prices = [one.bounds.offset_bits + norm_bits(one.layer, shapes).max() for one in (few, many)]
    assert prices[1] <= prices[0]


@pytest.mark.sampled(9)
@pytest.mark.parametrize("engine", ["conv", "matrix", "shifts", "auto"])
@pytest.mark.parametrize("seed", SEEDS)
def test_networks_in_planes_compute_their_integers(seed, engine):
    quantized = network(seed)
    lowered = lower(quantized, engine)
    last = lowered.layers[-1]
    assert last.planes > 1
    assert last.plane_bits == lowered.bits < last.bits
    q = integer_images(quantized, seed, 20)
    results = lowered.function(lowered.interface.prepare(q))
    assert results.min() >= 0
    assert int(results.max()).bit_length() <= last.plane_bits
    np.testing.assert_array_equal(lowered.interface.accumulators(results, len(q)), quantized.accumulate(q))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", [3, 6, 7, 12])
def test_concrete_gives_values_no_more_than_the_proved_widths(seed):
    lowered = lower(network(seed))
    compiler = fhe.Compiler(lowered.function, {"x": "encrypted"})
    circuit = compiler.compile([x[None] for x in lowered.inputset()], fhe.Configuration(p_error=0.01))
    widths = [int(bits) for bits in re.findall(r"eint<(\d+)>", circuit.mlir)]
    assert max(widths) <= max(layer.plane_bits for layer in lowered.layers)


# In a network whose lookups take fewer bits than a plane, the planes are the widest values, and wide results
# cost more. Seed 6 is one.
@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 3, 4])
def test_wide_results_cost_no_more_than_narrow_ones(seed):
    p_error = fheconv.CompileConfig(p_error=0.01)
    wide, narrow = (fheconv.compile(network(seed, bits), p_error).cost for bits in (8, 2))
    assert wide.layers[-1].planes > narrow.layers[-1].planes
    assert wide.layers[-1].bits > narrow.layers[-1].bits + 3
    assert wide.complexity <= narrow.complexity
    assert wide.lookups <= narrow.lookups
    with mock.patch("fheconv.lowering.lower.in_planes", side_effect=lambda *a: in_planes(*a[:2], 0)):
        whole = lower(network(seed))
    assert whole.layers[-1].planes == 1
    assert whole.lookups == lower(network(seed)).lookups
    assert "planes of" in str(wide)


@pytest.mark.slow
def test_an_encrypted_network_in_planes_gives_its_integers():
    quantized = network(13)
    circuit = fheconv.compile(quantized)
    assert circuit.cost.layers[-1].planes > 1
    assert circuit.cost.assigned_bits == circuit.cost.layers[-1].plane_bits
    circuit.keygen()
    x = real_images(quantized, integer_images(quantized, 0, 1)[1:])
    expected = quantized.integers(x)
    assert len(np.unique(expected)) > 5
    np.testing.assert_array_equal(
        circuit.decrypt(circuit.run(circuit.encrypt(x)), dequantize=False), expected
    )
    assert circuit.verify(x[:1]).ok
    for way in ("disable", "simulate"):
        np.testing.assert_array_equal(circuit.predict(x, fhe=way), quantized(x))


def test_the_budget_says_that_a_layer_runs_in_planes():
    quantized = network(4)
    report = quantized.budget()
    last, lowered = report.layers[-1], lower(quantized).layers[-1]
    assert (last.planes, last.plane_bits) == (lowered.planes, lowered.plane_bits)
    assert last.accumulator_bits == lowered.bits > last.plane_bits
    assert f"in {last.planes} planes of {last.plane_bits} bits" in " ".join(str(report).split())
    assert all(layer.planes == 1 for layer in report.layers[:-1])
    with pytest.raises(fheconv.AccumulatorOverflowError):
        quantized.budget(last.plane_bits).require()
