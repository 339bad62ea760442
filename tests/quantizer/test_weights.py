from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fheconv
from fheconv.networks.bounds import layer_bounds
from fheconv.networks.floats import Layer, Maximum, Network
from fheconv.networks.quantization import Quantization
from fheconv.quantizer.rounding.accumulator import round_accumulator
from fheconv.quantizer.rounding.mse import round_mse
from fheconv.quantizer.rows import Rows
from fheconv.quantizer.weights import FittedWeights, round_nearest
from fheconv.quantizer.windows import Budget
from tests.support.nets import integer_images, quantize, quantized, random_net

SEEDS = range(6)


def linear_layers(network, images):
    """Each layer with what its weights are rounded for: its inputs, the tensors in floats and in integers."""
    floats = network.source.tensors(images)
    tensors = network.tensors(network.input.integers(images))
    for layer, own in zip(network.source.layers, network.layers, strict=True):
        if isinstance(layer, Layer):
            yield layer, own.inputs, network.shapes, floats, tensors


@pytest.fixture(scope="module", params=SEEDS)
def layers(request):
    """All layers of a random network of 8 bits."""
    network = quantized(request.param, weight_bits=8, activation_bits=4)
    return list(linear_layers(network, random_net(request.param)[1]))


@given(
    st.integers(0, 2**32), st.integers(1, 8), st.booleans(), st.sampled_from([1, 2]), st.integers(1, 3),
    st.integers(-4, 4),
)  # fmt: skip
def test_a_single_convolution_gets_the_nearest_weights(seed, bits, per_channel, groups, channels, power):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(2 * groups, channels, 2, 3)) * 10.0**power
    weight[rng.random(weight.shape) < 0.2] = 0
    conv = fheconv.Conv.of(weight, groups=groups, padding=1)
    network = Network.of(conv, (channels * groups, 4, 4))
    image = Quantization(scale=0.3, zero_point=2, minimum=0, maximum=15)
    (layer,) = network.layers
    rounded = round_nearest(layer, [image], network.shapes, bits, round_mse, per_channel=per_channel)
    expected = round_mse(weight if per_channel else weight[None], bits)
    (term,) = rounded.terms
    (kernel,) = term.steps
    np.testing.assert_array_equal(kernel.weight, expected.values.reshape(weight.shape))
    assert rounded.range == expected.range
    steps = np.broadcast_to((expected.scale * 0.3).reshape(-1, 1, 1), layer.shape)
    np.testing.assert_allclose(rounded.step, steps, rtol=1e-12)


@pytest.mark.sampled(5)
def test_what_meets_in_an_accumulator_counts_in_one_unit(layers):
    """Through the filter matrices: the integers times the step are nearly the float weights, of every value
    of a layer, whatever terms, poolings and selections lie between."""
    for layer, inputs, shapes, _, _ in layers:
        rounded = round_nearest(layer, inputs, shapes, 8, round_mse, per_channel=True)
        meant: dict = {}
        got: dict = {}
        for term, own, quantization in zip(layer.terms, rounded.terms, inputs, strict=True):
            exact = term.matrix(shapes[term.source]).toarray() * term.factor * quantization.scale
            meant[term.source] = meant.get(term.source, 0) + exact
            integers = own.matrix(shapes[term.source]).toarray() * rounded.step.ravel()
            got[term.source] = got.get(term.source, 0) + integers
        for source in meant:
            greatest = np.abs(np.concatenate(list(meant.values()))).max(axis=0)
            assert (np.abs(meant[source] - got[source]) <= 0.03 * greatest).all()


def test_exact_weights_stay_and_all_integers_are_of_their_type(layers):
    for bits in (1, 2, 3):
        for layer, inputs, shapes, floats, tensors in layers:
            for rounded in (
                round_nearest(layer, inputs, shapes, bits, round_mse, per_channel=True),
                FittedWeights(layer, inputs, shapes, floats, tensors).rounded(bits, round_accumulator, None),
            ):
                greatest = max(2 ** (bits - 1) - 1, 1)
                assert rounded.range == (-greatest, greatest)
                assert np.isfinite(rounded.step).all()
                assert rounded.step.shape == layer.shape
                for term, own in zip(layer.terms, rounded.terms, strict=True):
                    assert (own.source, own.factor, len(own.steps)) == (term.source, 1, len(term.steps))
                    (at,) = term.inexact()
                    assert np.abs(own.steps[at].weight).max() <= greatest
                    assert own.steps[at].weight.dtype == np.int64
                    others = [place for place in range(len(term.steps)) if place != at]
                    assert all(own.steps[place] is term.steps[place] for place in others)


@pytest.mark.sampled(5)
def test_every_row_keeps_to_the_budget(layers):
    for layer, inputs, shapes, floats, tensors in layers:
        rows = Rows(layer, inputs, shapes)
        least = min(rows.ranges(rows.inputs(row)).min() for row in rows.rows)
        for budget in (least, 2 * least + 1, 15 * least):
            rounded = FittedWeights(layer, inputs, shapes, floats, tensors).rounded(
                4, round_accumulator, Budget(int(budget))
            )
            # Each value of the layer by itself, by the filter matrix.
            needed = np.zeros(layer.shape, np.int64)
            for term, quantization in zip(rounded.terms, inputs, strict=True):
                sums = abs(term.matrix(shapes[term.source])).sum(axis=0)
                needed += np.asarray(sums).reshape(layer.shape) * (
                    quantization.maximum - quantization.minimum
                )
            assert needed.max() <= budget
            assert budget < 4 * least or needed.max() > 0


def test_too_small_a_budget_is_refused_with_one_that_works(layers):
    for layer, inputs, shapes, floats, tensors in layers:
        with pytest.raises(fheconv.AccumulatorOverflowError, match="a single weight of 1") as refused:
            FittedWeights(layer, inputs, shapes, floats, tensors).rounded(4, round_accumulator, Budget(0))
        error = refused.value
        assert (error.layer, error.limit) == (layer.name, 0)
        with pytest.raises(fheconv.AccumulatorOverflowError):
            FittedWeights(layer, inputs, shapes, floats, tensors).rounded(
                4, round_accumulator, Budget(error.value - 1)
            )
        rounded = FittedWeights(layer, inputs, shapes, floats, tensors).rounded(
            4, round_accumulator, Budget(error.value)
        )
        if len({part.range for part in Rows(layer, inputs, shapes).parts}) == 1:
            some = any(own.steps[own.inexact()[0]].weight.any() for own in rounded.terms)
            assert some or not any(term.steps[term.inexact()[0]].weight.any() for term in layer.terms)


@given(
    st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 6),
    st.integers(1, 8),
)  # fmt: skip
def test_convolutions_keep_to_a_width_or_are_refused_with_the_least_that_works(
    seed, filters, channels, size, input_bits, bits
):
    """Also with channels of zeros, and with filters of a single tap."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(filters, channels, size, size)) * rng.integers(0, 2, (filters, 1, 1, 1))
    images = rng.uniform(0, 1, (4, channels, 4, 4))
    config = fheconv.QuantConfig(accumulator_bits=bits, input_bits=input_bits)
    if bits < input_bits:
        with pytest.raises(fheconv.AccumulatorOverflowError, match="a single weight of 1") as refused:
            fheconv.quantize(weight, images, config)
        assert (refused.value.value, refused.value.limit) == (2**input_bits - 1, 2**bits - 1)
        assert refused.value.remedy == f"accumulator_bits={input_bits}"
        config = replace(config, accumulator_bits=input_bits)
    network = fheconv.quantize(weight, images, config)
    assert network.budget(config.accumulator_bits).fits
    integers = network.last.convolution.weight
    np.testing.assert_array_equal(integers.any(axis=(1, 2, 3)), weight.any(axis=(1, 2, 3)))


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Conv2d(1, 4, 2, stride=2), nn.PixelShuffle(2)),
        nn.Sequential(nn.Conv2d(1, 4, 2, stride=2), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(1, 1, 2)),
        nn.Sequential(
            nn.Flatten(), nn.Linear(36, 18), nn.Unflatten(1, (2, 3, 3)), nn.ReLU(), nn.Conv2d(2, 1, 2)
        ),
    ],
    ids=["shuffled results", "shuffled before an activation", "unflattened before an activation"],
)
def test_channels_of_several_filters_keep_to_the_width_that_was_asked_for(module):
    torch.manual_seed(0)
    for layer in module:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    images = np.random.default_rng(0).uniform(-1, 1, (12, 1, 6, 6))
    for bits in (4, 6, 8):
        network = quantize(module, images, accumulator_bits=bits, input_bits=3)
        assert network.budget(bits).fits


def quantized_or_refused(module, images, config):
    try:
        return quantize(
            module, images, **{field.name: getattr(config, field.name) for field in fields(config)}
        )
    except fheconv.AccumulatorOverflowError as error:
        return error


@pytest.mark.parametrize("seed", range(18))
@pytest.mark.sampled(4)
def test_networks_keep_to_the_width_that_was_asked_for(seed):
    """Or are refused with advice that works, for the layer that it names: a later one may need still more."""
    module, images = random_net(seed)
    bits, rounding_bits = 4 + seed % 6, [None, None, 3][seed % 3 - seed // 6]
    config = fheconv.QuantConfig(
        accumulator_bits=bits, rounding_bits=rounding_bits, input_bits=min(bits, 4 + seed % 2)
    )
    network, refused = quantized_or_refused(module, images, config), []
    while not isinstance(network, fheconv.QuantizedNetwork):
        assert network.layer not in refused
        refused.append(network.layer)
        config = replace(config, **network.settings)
        network = quantized_or_refused(module, images, config)
    bits = config.accumulator_bits
    report = network.budget(bits)
    assert report.fits
    assert report.proved
    assert report.require() is report
    q = integer_images(network, seed, 20)
    tensors = network.tensors(q)
    for layer, budget in zip(network.layers, report.layers, strict=True):
        assert budget.accumulator_bits <= bits
        if isinstance(layer, Maximum):
            continue
        bounds = layer_bounds(layer, network.shapes)
        assert bounds.offset_bits <= bits
        accumulators = layer.accumulate(tensors)
        assert (accumulators >= bounds.minimum).all()
        assert (accumulators <= bounds.maximum).all()
        if layer.lookup is not None:
            assert layer.lookup.bits <= bits
            assert (layer.lookup.bits - layer.lookup.dropped_bits) <= (rounding_bits or bits)
