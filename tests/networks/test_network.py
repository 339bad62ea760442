import pickle
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fheconv
from fheconv import InputRangeError, quantize
from fheconv.networks.floats import Layer, Maximum
from fheconv.networks.quantization import Quantization
from tests.support.nets import BLOCKS, quantized, random_net
from tests.support.strategies import layer_problems


@st.composite
def quantizations(draw):
    minimum = draw(st.integers(-100, 0))
    maximum = draw(st.integers(minimum + 1, 100))
    return Quantization(
        scale=draw(st.floats(1e-6, 1e6)),
        zero_point=draw(st.integers(minimum, maximum)),
        minimum=minimum,
        maximum=maximum,
    )


@given(quantizations())
def test_every_integer_comes_back_from_the_number_it_stands_for(quantization):
    every = np.arange(quantization.minimum, quantization.maximum + 1)
    real = quantization.scale * (every - quantization.zero_point)
    np.testing.assert_array_equal(quantization.integers(real), every)
    assert 2 ** (quantization.bits - 1) <= len(every) - 1 < 2**quantization.bits


@pytest.mark.filterwarnings("ignore::fheconv.InputScaleWarning")
@given(quantization=quantizations(), share=st.floats(0, 1))
def test_no_integer_stands_for_a_nearer_number(quantization, share):
    low, high = (
        (e - quantization.zero_point) * quantization.scale
        for e in (quantization.minimum, quantization.maximum)
    )
    x = low + share * (high - low)
    q = quantization.integers(np.array(x))
    every = np.arange(quantization.minimum, quantization.maximum + 1)
    distances = np.abs(quantization.scale * (every - quantization.zero_point) - x)
    assert distances[q - quantization.minimum] <= distances.min() + 1e-9 * quantization.scale


@given(quantization=quantizations(), beyond=st.floats(0.51, 1e6), up=st.booleans())
def test_more_than_half_a_step_outside_is_refused(quantization, beyond, up):
    end = quantization.maximum + beyond if up else quantization.minimum - beyond
    x = np.zeros((2, 3))
    x[1, 2] = (end - quantization.zero_point) * quantization.scale
    with pytest.raises(InputRangeError, match=r"at \(1, 2\) is outside"):
        quantization.integers(x)


@pytest.mark.filterwarnings("ignore::fheconv.InputScaleWarning")
@pytest.mark.parametrize("kind", [np.uint8, np.int8, bool, np.float16])
def test_small_dtypes_do_not_wrap(kind):
    quantization = Quantization(scale=0.25, zero_point=3, minimum=0, maximum=1000)
    assert quantization.integers(np.ones(2, kind)).tolist() == [7, 7]
    assert quantization.integers(np.full(2, 100).astype(np.uint8)).tolist() == [403, 403]


@given(layer_problems())
def test_the_accumulator_is_the_sum_that_it_is_said_to_be(problem):
    """Σ weight·q + bias at one position, in Python's own integers, and its real value in fractions."""
    network = quantize(problem.module, problem.images, problem.config)
    (layer,) = network.layers
    z, weight, geometry = network.input.zero_point, layer.convolution.weight, layer.convolution.geometry
    q, _ = network.quantize_input(problem.images)
    y, real = network.integers(problem.images), network(problem.images)
    n, k, *position = (s - 1 for s in y.shape)
    filters, per_group = len(weight) // geometry.groups, weight.shape[1]
    total = int(np.broadcast_to(layer.bias, layer.shape)[(k, *position)])
    for c, *tap in np.ndindex(weight.shape[1:]):
        at = [
            o * s + t * d - before
            for o, s, t, d, (before, _) in zip(
                position, geometry.stride, tap, geometry.dilation, geometry.padding, strict=True
            )
        ]
        inside = all(0 <= a < size for a, size in zip(at, q.shape[2:], strict=True))
        pixel = int(q[(n, k // filters * per_group + c, *at)]) if inside else z
        total += int(weight[(k, c, *tap)]) * pixel
    assert y[(n, k, *position)] == total
    _, scale = problem.nearest_weight()
    exact = total * Fraction(scale[k]) * Fraction(network.input.scale)
    assert real[(n, k, *position)] == pytest.approx(float(exact), rel=1e-14)


@pytest.mark.filterwarnings("ignore::fheconv.InputScaleWarning")  # of an image that happens to be dark
@given(layer_problems())
def test_images_do_not_influence_each_other(problem):
    network = quantize(problem.module, problem.images, problem.config)
    together = network.integers(problem.images)
    for number, image in enumerate(problem.images):
        np.testing.assert_array_equal(network.integers(image), together[number])


@given(layer_problems())
def test_a_network_survives_the_way_between_processes(problem):
    network = quantize(problem.module, problem.images, problem.config)
    other = pickle.loads(pickle.dumps(network))
    np.testing.assert_array_equal(other(problem.images), network(problem.images))
    assert other.budget(3).to_dict() == network.budget(3).to_dict()


def test_the_callers_arrays_are_left_alone():
    rng = np.random.default_rng(0)
    weight, images = rng.standard_normal((2, 1, 2, 2)), rng.random((3, 1, 4, 4))
    copies = weight.copy(), images.copy()
    quantize(weight, images)(images)
    np.testing.assert_array_equal(weight, copies[0])
    np.testing.assert_array_equal(images, copies[1])


def test_what_happens_to_the_module_afterwards_does_not_change_the_network():
    module = torch.nn.Conv2d(1, 1, 3)
    images = np.random.default_rng(0).random((2, 1, 5, 5))
    network = fheconv.quantize(module, images, fheconv.QuantConfig(weight_bits=6, input_bits=6))
    before = network.budget(4).remedy
    with torch.no_grad():
        module.weight.mul_(torch.tensor([[[[0.0, 1, 0], [0, 5, 0], [0, 0, 0]]]]))
    assert network.budget(4).remedy == before
    with pytest.raises(ValueError, match="read-only"):
        network.last.convolution.weight[:] = 0


@given(seed=st.integers(0, 2**32), block=st.sampled_from(list(BLOCKS)))
def test_a_network_makes_up_for_a_tensor_that_was_divided(seed, block):
    """Layer by layer: whoever reads the divided tensor, or maxima of it, delivers what it did before."""
    network = quantized(7, block, size=(1, 5, 6)).source
    rng = np.random.default_rng(seed)
    number = int(rng.integers(0, len(network.layers)))
    factors = rng.uniform(0.5, 2, network.shapes[number][0])
    rescaled = network.rescaled(number, factors)
    if rescaled is None:  # read without weights: added up, or mixed before any
        return
    changed, concerned = rescaled
    tensors = network.tensors(random_net(7, block, size=(1, 5, 6))[1])
    divided = [tensor / concerned.get(at, 1.0) for at, tensor in enumerate(tensors)]
    np.testing.assert_array_equal(
        concerned[number], np.broadcast_to(factors[:, None, None], network.shapes[number])
    )
    for at, (before, after) in enumerate(zip(network.layers, changed.layers, strict=True), 1):
        if at != number:
            np.testing.assert_allclose(after.output(divided), divided[at], rtol=1e-9, atol=1e-12)
        if isinstance(before, Maximum):
            assert at in concerned or before.source not in concerned
        elif not concerned.keys() & set(before.sources):
            assert all(a is b for a, b in zip(before.terms, after.terms, strict=True))


def test_what_a_sum_or_a_maximum_mixes_is_not_rescaled():
    added = quantized(7, "residual of activations", size=(1, 5, 6)).source
    plain = next(layer for layer in added.layers if isinstance(layer, Layer) and len(layer.terms) > 1)
    # One factor for a channel is possible even there: its weights of 1 become others.
    assert all(added.rescaled(source, np.array([2.0])) is not None for source in plain.sources)
    mixed = Maximum(name="max", source=1, index=np.array([[[[0]]], [[[1]]]]))
    conv = fheconv.Conv.of(np.ones((2, 1, 1, 1)))
    network = fheconv.quantize(conv, np.ones((1, 1, 1, 1))).source
    network = replace(network, layers=(*network.layers, mixed))
    assert network.rescaled(1, np.array([1.0, 2.0])) is None
    assert network.rescaled(1, np.array([2.0, 2.0])) is not None
