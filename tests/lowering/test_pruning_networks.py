"""What of whole networks is computed, and that it is enough."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import fheconv
from fheconv.lowering.lower import lower
from fheconv.networks.demand import demand
from fheconv.networks.floats import Maximum
from tests.support.nets import BLOCKS, integer_images, quantize, quantized
from train_tinycnn_digits import shipped

SEEDS = range(6)
ENGINES = ("conv", "matrix", "shifts", "auto")


@pytest.fixture(scope="module")
def tiny():
    """TinyCNN in integers, of nothing but random images: what is computed does not depend on them."""
    images = np.random.default_rng(0).uniform(0, 16, (4, 1, 8, 8))
    return fheconv.quantize(shipped(), images, fheconv.QuantConfig(weight_bits=3, input_range=(0, 16)))


def test_tinycnn_takes_296_lookups_of_49_pixels(tiny):
    """Its strides leave out the last row and column of pixels, and of what follows: 384 lookups would be
    taken otherwise."""
    masks = demand(tiny)
    assert [mask.shape for mask in masks] == [(1, 8, 8), (8, 6, 6), (16, 2, 2), (32, 1, 1), (10,)]
    assert [int(mask.sum()) for mask in masks] == [49, 200, 64, 32, 10]
    assert not masks[0][:, 7].any()
    assert not masks[0][:, :, 7].any()
    lowered = lower(tiny)
    assert lowered.lookups == tiny.budget().lookups == 296
    assert [layer.lookups for layer in lowered.layers] == [200, 64, 32, 0]
    assert len(lowered.interface.inputs) == 49
    q = np.random.default_rng(1).integers(0, 16, (20, 1, 8, 8))
    results = lowered.function(lowered.interface.prepare(q))
    np.testing.assert_array_equal(lowered.interface.accumulators(results, len(q)), tiny.accumulate(q))


def computed(network, tensors, number):
    """The last accumulators, when the tensors up to `number` are these."""
    tensors = list(tensors[: number + 1])
    for layer in network.layers[number:]:
        tensors.append(layer.output(tensors))
    return tensors[-1]


def ranges(network):
    """The least and the greatest integer of each tensor but the last."""
    return [(quantization.minimum, quantization.maximum) for quantization in network.quantizations]


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_not_demanded_makes_no_difference(seed):
    network = quantized(seed, accumulator_bits=9, activation_bits=3)
    masks = demand(network)
    rng = np.random.default_rng(seed)
    q = integer_images(network, seed, 8)
    tensors = network.tensors(q)
    for number, (mask, (low, high)) in enumerate(zip(masks[:-1], ranges(network), strict=True)):
        other = rng.integers(low, high + 1, (len(q), *mask.shape))
        changed = [*tensors]
        changed[number] = np.where(mask, tensors[number], other)
        # Later layers may read earlier tensors too, so each is changed by itself.
        np.testing.assert_array_equal(computed(network, changed, number), tensors[-1])
    assert masks[-1].all()


def test_strides_leave_something_out():
    """Or the laws here would hold of masks that are all True."""
    masks = [demand(quantized(seed, accumulator_bits=9, activation_bits=3)) for seed in SEEDS]
    assert sum(not mask.all() for each in masks for mask in each) >= 3


@pytest.mark.parametrize("seed", SEEDS)
def test_everything_demanded_is_read_by_some_weight(seed):
    """By the filter matrices: what is in a mask has a trained weight on its way to something in a mask."""
    network = quantized(seed, accumulator_bits=9, activation_bits=3)
    masks = demand(network)
    read = [np.zeros(mask.size, bool) for mask in masks]
    for number, layer in enumerate(network.source.layers, 1):
        wanted = masks[number].ravel()
        if isinstance(layer, Maximum):
            read[layer.source][layer.index.reshape(len(layer.index), -1)[:, wanted].ravel()] = True
            continue
        for term in layer.terms:
            # Absolute weights, because they do not cancel out where several steps meet.
            steps = [
                replace(step, weight=np.abs(step.weight)) if hasattr(step, "weight") else step
                for step in term.steps
            ]
            matrix = replace(term, steps=tuple(steps)).matrix(network.shapes[term.source]).toarray()
            read[term.source] |= (matrix[:, wanted] != 0).any(axis=1)
    for mask, is_read in zip(masks[:-1], read[:-1], strict=True):
        np.testing.assert_array_equal(mask.ravel(), is_read)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.sampled(5)
def test_every_engine_computes_the_network(seed, engine):
    for options in ({"accumulator_bits": 9, "activation_bits": 3}, {"rounding_bits": 4}):
        network = quantized(seed, **options)
        check_engine(network, engine, seed)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.sampled(7)
def test_every_engine_computes_every_block(block, engine):
    check_engine(quantized(5, block, accumulator_bits=9, activation_bits=3), engine, 5)


def check_engine(network, engine, seed):
    # A term without weights is dropped. A layer that has no other terms leaves an engine nothing to do.
    dead = [
        layer
        for layer in network.layers
        if hasattr(layer, "terms")
        and not any(all(step.weight.any() for step in kernels(term)) for term in layer.terms)
    ]
    if dead and engine in ("conv", "shifts"):
        with pytest.raises(fheconv.InvalidArgumentError, match="has no weights"):
            lower(network, engine)
        return
    lowered = lower(network, engine)
    q = integer_images(network, seed, 20)
    results = lowered.function(lowered.interface.prepare(q))
    assert results.min() >= 0
    assert int(results.max()).bit_length() <= lowered.bits
    np.testing.assert_array_equal(lowered.interface.accumulators(results, len(q)), network.accumulate(q))
    assert lowered.lookups == network.budget().lookups
    used = {part for layer in lowered.layers for part in layer.engine.split(" + ")}
    assert engine == "auto" or used <= {engine, "conv", "maximum"}


def kernels(term):
    return [step for step in term.steps if hasattr(step, "weight")]


def test_no_more_is_looked_up_than_what_is_read():
    """A crop of what a wide convolution computes, and one channel of it."""

    class Crop(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.last(torch.relu(self.first(x))[:, 1:2, 2:4, 3:5])

    torch.manual_seed(0)
    network = quantize(Crop().eval(), np.random.default_rng(0).uniform(0, 1, (3, 1, 8, 8)))
    lowered = lower(network)
    assert lowered.lookups == 4
    assert len(lowered.interface.inputs) == 16
    assert lower(network, "conv").layers[0].multiply_adds == 4 * 9
    check_engine(network, "auto", 0)


def test_what_several_layers_read_is_demanded_by_each():
    """A branch that crops, and one that reads every other value: their union is looked up."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(1, 1, 1)
            self.left, self.right = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1, stride=2)

        def forward(self, x):
            y = torch.relu(self.first(x))
            return self.left(y[:, :, :2, :2]) + self.right(y)[:, :, :2, :2]

    torch.manual_seed(0)
    network = quantize(Branches().eval(), np.random.default_rng(0).uniform(0, 1, (3, 1, 6, 6)))
    expected = np.zeros((1, 6, 6), bool)
    expected[:, :2, :2] = True
    expected[:, 0:3:2, 0:3:2] = True
    np.testing.assert_array_equal(demand(network)[-2], expected)
    check_engine(network, "auto", 0)
