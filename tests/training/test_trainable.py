"""A quantized network as a torch module: what it computes, what its weights are rounded to, its gradients."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fheconv
from fheconv.networks.bounds import layer_bounds
from fheconv.networks.floats import Layer, Maximum
from fheconv.networks.quantization import Quantization
from fheconv.training.modules import image_steps
from fheconv.training.trainable import BALL
from tests.support.layers import KINDS, random_network, unlike_calibration
from tests.support.nets import BLOCKS, integer_images, quantize, quantized, random_net, real_images
from tests.support.same import same_network

SIZE = (1, 5, 6)
WIDTHS = ({"accumulator_bits": 8}, {"weight_bits": 1}, {"weight_bits": 8, "activation_levels": 50})
EPSILON = float(np.finfo(np.float32).eps)
seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("options", [*WIDTHS, {"rounding_bits": 4}], ids=str)
@pytest.mark.sampled(3)
def test_without_training_it_gives_back_the_same_integers(block, options):
    network = quantized(7, block, size=SIZE, **options)
    images = random_net(7, block, size=SIZE)[1]
    same_network(network, network.to_torch().quantized(images))


@pytest.mark.sampled(7)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("options", WIDTHS, ids=str)
def test_each_layer_computes_what_the_integer_layer_does(block, options):
    """Where it does not, float32 cannot tell on which side of a rounding boundary a value lies.

    Its errors: the scale, the product with it, the bias and the sum are each rounded once.
    """
    network = quantized(7, block, size=SIZE, **options)
    module = network.to_torch().eval()
    tensors = network.tensors(integer_images(network, 0, 20))
    zeros = [q.zero_point for q in network.quantizations]
    blank = [np.full((1, *shape), zero) for shape, zero in zip(network.shapes[:-1], zeros, strict=True)]
    given_to = [torch.tensor(t - z, dtype=torch.float32) for t, z in zip(tensors[:-1], zeros, strict=True)]
    for number, (layer, source) in enumerate(zip(network.layers, network.source.layers, strict=True)):
        got = module.layers[number](given_to).detach().double().numpy()
        if isinstance(source, Maximum):
            np.testing.assert_array_equal(got + zeros[number + 1], tensors[number + 1])
            continue
        product = layer.scale * (layer.accumulate(tensors) - layer.accumulate(blank))
        real = product + layer.real_bias
        error = 2 * EPSILON * (np.abs(product) + np.abs(layer.real_bias))
        if layer.lookup is None:  # the integers' bias is rounded to steps
            exact = layer.scale * tensors[number + 1]
            assert (np.abs(got - exact) <= 0.5 * np.abs(layer.scale) * (1 + 1e-9) + error).all()
            assert (np.abs(got - real) <= error).all()
            continue
        output = layer.lookup.output
        ends = [output.nearest(source.activation(real + way * error)) for way in (-1, 0, 1)]
        got = got + output.zero_point
        assert (got >= np.min(ends, axis=0)).all()
        assert (got <= np.max(ends, axis=0)).all()
        assert ((got == tensors[number + 1]) | (np.min(ends, axis=0) != np.max(ends, axis=0))).all()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("options", WIDTHS, ids=str)
def test_in_double_precision_the_whole_network_agrees(block, options):
    network = quantized(7, block, size=SIZE, **options)
    integers = integer_images(network, 1, 20)
    images = torch.tensor(real_images(network, integers))
    got = network.to_torch().eval().double()(images).detach().numpy()
    off = np.abs(got - network.accumulate(integers) * network.last.scale)
    # Only the last bias is rounded to steps.
    assert (off <= 0.5 * np.abs(network.last.scale) * (1 + 1e-6)).all()


@settings(max_examples=30)
@given(seed=seeds, kind=st.sampled_from(KINDS))
def test_single_convolutions_of_any_kind(seed, kind):
    """Over one to three axes, transposed, in every padding mode, signed and unsigned, of any width."""
    network, images, _ = random_network(seed, kind)
    module = network.to_torch().eval()
    same_network(network, module.quantized(images))
    images = unlike_calibration(network, seed, 3)
    got = module.double()(torch.tensor(images)).detach().numpy()
    off = np.abs(got - network.integers(images) * network.last.scale)
    assert (off <= 0.5 * np.abs(network.last.scale) * (1 + 1e-6)).all()


def random_rows(seed, latents=None):
    """A layer of one random convolution, as a torch module with latent weights far and wide, and its range.

    Its filters are pruned in places and share inputs in groups.
    """
    rng = np.random.default_rng(seed)
    groups, bits = int(rng.choice([1, 2])), int(rng.integers(4, 9))
    weight = rng.normal(size=(2 * groups, int(rng.integers(1, 4)), *rng.integers(1, 4, 2)))
    weight[:, rng.random(weight.shape[1]) < 0.2] = 0
    conv = fheconv.Conv.of(weight, groups=groups, padding=1)
    config = fheconv.QuantConfig(
        accumulator_bits=bits, input_levels=int(rng.integers(2, 2**bits)), weight_bits=int(rng.integers(1, 6))
    )
    network = fheconv.quantize(conv, rng.uniform(0, 1, (2, weight.shape[1] * groups, 4, 4)), config)
    module = network.to_torch().double()
    (layer,) = module.layers
    with torch.no_grad():
        sizes = rng.exponential(float(rng.choice([0.3, 2, 20])), weight.shape) * rng.choice(
            [-1, 1], weight.shape
        )
        layer.weights[0].copy_(torch.tensor(np.rint(sizes) if latents == "integers" else sizes))
    return network, module, layer


def greedy(latent, prices, least, greatest, budget):
    """The oracle of one row: one unit more where the latent weight exceeds it the most for its price."""
    taken = [0] * len(latent)
    while True:
        gains = []
        for tap, (value, price) in enumerate(zip(latent, prices, strict=True)):
            size = abs(min(max(value, least), greatest))
            if size >= taken[tap] + 0.5 and taken[tap] + 1 <= max(-least, greatest):
                gains.append(((size - (taken[tap] + 0.5)) / price, -tap))
        if not gains:
            break
        tap = -max(gains)[1]
        if sum(map(math.prod, zip(taken, prices, strict=True))) + prices[tap] > budget:
            break
        taken[tap] += 1
    return [units if value >= 0 else -units for units, value in zip(taken, latent, strict=True)]


@given(seeds)
def test_latent_weights_are_rounded_within_budget_and_data_type(seed):
    network, _, layer = random_rows(seed)
    (weight,), (latent,) = layer.integers(), layer.weights
    least, greatest = layer.layer.weight_range
    assert least <= weight.min() <= weight.max() <= greatest
    budget, price = 2**network.config.accumulator_bits - 1, network.input.maximum - network.input.minimum
    alive = torch.tensor(network.source.layers[0].terms[0].steps[0].weight != 0).any(dim=0).flatten()
    for values, wanted in zip(weight.flatten(1), latent.detach().flatten(1), strict=True):
        assert values.abs().sum() * price <= budget
        expected = greedy(wanted[alive].tolist(), [price] * int(alive.sum()), least, greatest, budget)
        np.testing.assert_array_equal(values[alive], expected)
        assert not values[~alive].any()


@given(seeds)
def test_integers_within_the_budget_stay(seed):
    network, _, layer = random_rows(seed, latents="integers")
    least, greatest = layer.layer.weight_range
    price = network.input.maximum - network.input.minimum
    with torch.no_grad():
        (latent,) = layer.weights
        latent.clamp_(least, greatest)
        latent.mul_((layer.alive > 0).reshape(latent.shape))
        while (over := latent.abs().flatten(1).sum(1) * price > layer.budget).any():
            latent[over] -= latent[over].sign()
        before = latent.clone()
        np.testing.assert_array_equal(layer.integers()[0], before)
        layer.draw_in()
    np.testing.assert_array_equal(latent.detach(), before)


@given(seed=seeds, block=st.sampled_from(list(BLOCKS)))
def test_any_latent_weights_keep_the_proof(seed, block):
    """Of whole networks: the exact bounds of what they are rounded to, not the sums of prices."""
    network = quantized(7, block, size=SIZE, accumulator_bits=8)
    module = network.to_torch()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for layer in module.layers:
            for weight in getattr(layer, "weights", ()):
                weight.copy_(torch.tensor(rng.normal(size=weight.shape) * rng.choice([0.3, 2, 9])))
    rebuilt = module.quantized(random_net(7, block, size=SIZE)[1][:2])
    for layer in rebuilt.layers:
        if not isinstance(layer, Maximum):
            bounds = layer_bounds(replace(layer, bias=np.zeros_like(layer.bias)), rebuilt.shapes)
            assert bounds.channel_span.max() < 2**8
            assert layer.lookup is None or (layer.lookup.proved and layer.lookup.bits <= 8)


@given(seed=seeds, block=st.sampled_from(list(BLOCKS)))
def test_rows_of_several_terms_are_rounded_by_the_same_rule(seed, block):
    """Terms that meet in an accumulator share a budget; a unit of each has its own price."""
    module = quantized(7, block, size=SIZE, accumulator_bits=8).to_torch().double()
    rng = np.random.default_rng(seed)
    for layer in module.layers:
        if not hasattr(layer, "weights"):
            continue
        with torch.no_grad():
            for weight in layer.weights:
                weight.copy_(torch.tensor(rng.normal(size=weight.shape) * 3))
        latent, integers = (
            np.append(np.concatenate([part.detach().numpy().ravel() for part in parts]), 0)[
                layer.index.numpy()
            ]
            for parts in (layer.weights, layer.integers())
        )
        for row, values, prices, alive in zip(latent, integers, layer.prices, layer.alive, strict=True):
            expected = greedy((row * alive.numpy()).tolist(), prices.tolist(), -7, 7, layer.budget)
            np.testing.assert_array_equal(values, expected)


@given(seeds)
def test_drawing_in_is_the_projection_on_the_ball(seed):
    """x is the point of a convex set nearest to v if and only if (v − x)·(z − x) ≤ 0 for all z of the set.

    For the weighted L1 ball Σ p|z| ≤ r the greatest (v − x)·z is that of a corner, r · max |v − x| / p.
    """
    _, module, layer = random_rows(seed)
    least, greatest = layer.layer.weight_range
    rng = np.random.default_rng(seed)
    layer.prices.copy_(torch.tensor(rng.integers(1, 9, layer.prices.shape)))
    (latent,) = layer.weights
    alive = layer.alive.numpy()
    v = np.clip(latent.detach().numpy().reshape(alive.shape) * alive, least - 0.5, greatest + 0.5)
    module.draw_in()
    x, prices = latent.detach().numpy().reshape(alive.shape), layer.prices.numpy()
    assert not x[alive == 0].any()
    radius, used = BALL * layer.budget, (prices * np.abs(x)).sum(axis=1)
    assert (used <= radius * (1 + 1e-9)).all()
    corner = radius * (np.abs(v - x) / prices).max(axis=1)
    assert (corner - ((v - x) * x).sum(axis=1) <= 1e-9 * (1 + radius * np.abs(v).max())).all()
    inside = (prices * np.abs(v)).sum(axis=1) <= radius
    np.testing.assert_array_equal(x[inside], v[inside])


def test_unlimited_accumulators_do_not_grow():
    """Nothing was asked for, but every further bit would make all lookups dearer."""
    network = quantized(7, "conv", size=SIZE, weight_bits=6)
    module = network.to_torch()
    with torch.no_grad():
        for layer in module.layers:
            for weight in layer.weights:
                weight.mul_(100)
    rebuilt = module.quantized(random_net(7, "conv", size=SIZE)[1])
    pairs = zip(rebuilt.budget().layers, network.budget().layers, strict=True)
    assert all(after.accumulator_bits <= before.accumulator_bits for after, before in pairs)


@pytest.mark.parametrize("values", [[[3, -8, 7]], [[15, 0, 9]]])
def test_integer_weights_keep_to_the_end_of_their_data_type(values):
    """−8 to 7 and 0 to 15: the ends differ."""
    network = fheconv.quantize(np.array(values), np.full((1, 3, 3), 3), fheconv.QuantConfig())
    module = network.to_torch()
    least, greatest = network.last.weight_range
    for sign in (1, -1):
        with torch.no_grad():
            module.layers[0].weights[0].fill_(sign * 99.0)
        module.draw_in()
        (weight,) = module.layers[0].integers()
        assert least <= weight.min() <= weight.max() <= greatest


FINE = {"weight_bits": 8, "activation_bits": 8, "input_bits": 6, "method": "mse", "overflow": "defined"}


def slope(network, number, changed, images, weigh):
    """By how much a weighed sum of the float results grows as a layer is changed, by differences."""
    sums = []
    for way in (1e-4, -1e-4):
        layers = (*network.layers[:number], changed(way), *network.layers[number + 1 :])
        sums.append(float((replace(network, layers=layers).tensors(images)[-1] * weigh).sum()))
    return (sums[0] - sums[1]) / 2e-4


def with_bias(layer, direction):
    """The layer with a bias so far in a direction (C,)."""
    by_channel = direction.reshape(-1, *[1] * (len(layer.shape) - 1))
    return lambda way: replace(layer, bias=layer.bias + way * by_channel)


def with_weights(layer, shares):
    """The layer with each weight of its terms greater by its share, times so far."""

    def changed(way):
        terms = []
        for term, share in zip(layer.terms, shares, strict=True):
            (at,) = term.inexact()
            steps, kernel = [*term.steps], term.steps[at]
            steps[at] = replace(kernel, weight=kernel.weight * (1 + way * share))
            terms.append(replace(term, steps=tuple(steps)))
        return replace(layer, terms=tuple(terms))

    return changed


@pytest.mark.sampled(3)
@pytest.mark.parametrize("block", BLOCKS)
def test_gradients_are_nearly_those_of_the_float_network(block):
    """Of fine roundings, against differences of the float network, whose tensors are scaled alike."""
    network = quantized(7, block, size=SIZE, **FINE)
    source, rng = network.source, np.random.default_rng(0)
    images = real_images(network, network.input.integers(random_net(7, block, size=SIZE)[1]))
    weigh = rng.normal(size=(1, *network.accumulator_shape))
    module = network.to_torch().eval().double()
    (module(torch.tensor(images)) * torch.tensor(weigh)).sum().backward()
    for number, (layer, trained) in enumerate(zip(source.layers, module.layers, strict=True)):
        if not isinstance(layer, Layer):
            continue
        by_bias = (trained.shift.grad / trained.unit).flatten().numpy()
        got, meant = [], []
        for _ in range(8):
            direction = rng.normal(size=layer.shape[0])
            got.append(by_bias @ direction)
            meant.append(slope(source, number, with_bias(layer, direction), images, weigh))
            # As a share of the weights themselves, whatever their unit.
            shares = [rng.normal(size=weight.shape) for weight in trained.weights]
            got.append(
                sum(
                    float((weight.grad * weight.detach() * torch.tensor(share)).sum())
                    for weight, share in zip(trained.weights, shares, strict=True)
                )
            )
            meant.append(slope(source, number, with_weights(layer, shares), images, weigh))
        assert np.corrcoef(got, meant)[0, 1] > 0.9
        assert 0.5 < np.dot(got, meant) / np.dot(meant, meant) < 2
        # A greater step is as much as greater weights.
        together = sum(float((weight.grad * weight.detach()).sum()) for weight in trained.weights)
        assert float(trained.growth.grad.sum()) == pytest.approx(together, rel=1e-6)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh()], ids=str)
@pytest.mark.parametrize("shift", [-1e6, 1e6])
def test_what_is_clipped_has_no_gradient(activation, shift):
    """Beyond both ends of the integers of an activation."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 2, 2), activation, nn.Conv2d(2, 1, 2))
    trained = quantize(module, np.random.default_rng(0).uniform(size=(9, 1, 4, 4))).to_torch()
    with torch.no_grad():
        trained.layers[0].shift.fill_(shift)
    trained(torch.rand(3, 1, 4, 4)).sum().backward()
    assert not any(parameter.grad.any() for parameter in trained.layers[0].parameters())
    assert trained.layers[1].shift.grad.any()


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_half_steps_of_images_are_rounded_as_the_circuit_rounds_them(zero):
    quantization = Quantization(scale=0.25, zero_point=zero, minimum=0, maximum=15, slack=0.0)
    images = 0.25 * (np.arange(0.5, 12) - zero)
    steps = image_steps(torch.tensor(images, dtype=torch.float32), quantization).numpy()
    np.testing.assert_array_equal(steps + zero, quantization.integers(images))
    np.testing.assert_array_equal(steps, torch.tensor(images / 0.25).round().numpy())
