"""Every convolution torch has, over the whole space of options: torch is the oracle."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fheconv
from fheconv.capture.model import single_convolution
from fheconv.networks.bounds import layer_bounds
from tests.support.layers import KINDS, random_module, random_network, unlike_calibration

SEEDS = st.integers(0, 2**31)
# Every option is drawn per axis from these many seeds; what runs encrypted takes a second each.
COMPILED, ENCRYPTED = range(1000, 1036), range(2000, 2006)


def integer_module(seed, kind):
    """A layer with integer weights and its output on integer images, exactly, by torch in double."""
    module, shape = random_module(seed, kind)
    rng = np.random.default_rng(seed)
    module.weight.data = torch.tensor(rng.integers(-7, 8, module.weight.shape), dtype=torch.float64)
    if module.bias is not None:
        module.bias.data = torch.tensor(rng.integers(-99, 99, module.bias.shape), dtype=torch.float64)
    images = rng.integers(0, 16, (2, *shape))
    return module, images, module(torch.tensor(images, dtype=torch.float64)).detach().numpy()


def options_of(module):
    transposed = "Transpose" in type(module).__name__
    options = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups")}
    if transposed:
        return {**options, "transposed": True, "output_padding": module.output_padding}
    return {**options, "padding_mode": module.padding_mode}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS)
def test_integers_are_torchs(kind, seed):
    module, images, expected = integer_module(seed, kind)
    weight = module.weight.detach().numpy().astype(np.int64)
    bias = None if module.bias is None else module.bias.detach().numpy()
    source = fheconv.Conv.of(weight, bias, **options_of(module))
    network = fheconv.quantize(source, images, fheconv.QuantConfig(weight_bits=4, input_bits=4))
    np.testing.assert_array_equal(network.integers(images), expected)
    np.testing.assert_array_equal(network(images), expected)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS)
def test_the_product_with_the_filter_matrix_is_torchs(kind, seed):
    module, images, expected = integer_module(seed, kind)
    weight = module.weight.detach().numpy()
    matrix = fheconv.filter_matrix(weight, images.shape[1:], format="csr", **options_of(module))
    y = (images.reshape(len(images), -1) @ matrix).reshape(expected.shape)
    if module.bias is not None:
        y = y + module.bias.detach().numpy().reshape(-1, *[1] * (y.ndim - 2))
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("kind", KINDS[3:])
@given(seed=SEEDS)
def test_the_matrix_of_a_transposed_convolution_is_the_transpose(kind, seed):
    module, images, expected = integer_module(seed, kind)
    weight = module.weight.detach().numpy()
    options = options_of(module)
    matrix = fheconv.filter_matrix(weight, images.shape[1:], format="csr", **options)
    del options["transposed"], options["output_padding"]
    direct = fheconv.filter_matrix(weight, expected.shape[1:], format="csr", **options)
    sizes = fheconv.conv_output_shape((1, *expected.shape[1:]), weight.shape, **options)
    if sizes[2:] == images.shape[2:]:  # output_padding may leave room for one more
        assert (matrix != direct.T).nnz == 0


def test_int8_weights_that_padding_adds_up_do_not_wrap():
    weight = np.full((1, 1, 5), 100, np.int8)
    matrix = fheconv.filter_matrix(weight, (1, 2), padding=2, padding_mode="replicate")
    assert matrix.dtype == np.int64
    assert matrix.max() == 300
    small = fheconv.filter_matrix(weight // 10, (1, 2), padding=2, padding_mode="replicate")
    assert small.dtype == np.int8


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS)
def test_bounds_are_those_of_the_matrix(kind, seed):
    """The matrix has one weight a pixel, repeated or not: its columns bound the accumulators exactly."""
    network, _, _ = random_network(seed, kind)
    layer = network.last
    zero = np.zeros((1, *network.input_shape), np.int64)
    basis = np.eye(zero.size, dtype=np.int64).reshape(-1, *network.input_shape)
    constant = layer.accumulate([zero])
    matrix = (layer.accumulate([basis]) - constant).reshape(zero.size, -1)
    ends = np.stack([matrix * network.input.minimum, matrix * network.input.maximum])
    bounds = layer_bounds(layer, network.shapes)
    np.testing.assert_array_equal(bounds.minimum[None], ends.min(0).sum(0).reshape(constant.shape) + constant)
    np.testing.assert_array_equal(bounds.maximum[None], ends.max(0).sum(0).reshape(constant.shape) + constant)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS)
def test_floats_come_close_to_torchs_with_many_bits(kind, seed):
    module, shape = random_module(seed, kind)
    module = module.double()
    images = np.random.default_rng(seed).uniform(-1, 1, (2, *shape))
    network = fheconv.quantize(module, images, fheconv.QuantConfig(weight_bits=8, input_bits=16))
    expected = module(torch.tensor(images)).detach().numpy()
    layer, integers = network.last, network.last.convolution.weight
    # The weights themselves are off by |w − s·q|, each input is half a step off, the bias half a step.
    weight = single_convolution(module).weight
    scale = layer.scale.reshape(-1, *[1] * (weight.ndim - 1)) / network.input.scale
    off = np.abs(weight - integers * scale).reshape(len(weight), -1).sum(axis=1)
    steps = np.abs(integers * scale).reshape(len(weight), -1).sum(axis=1) * 0.5 * network.input.scale
    bound = off + steps + 0.5 * layer.scale.ravel() + 1e-9
    assert (np.abs(network(images) - expected) <= bound.reshape(-1, *[1] * (expected.ndim - 2))).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", COMPILED)
@pytest.mark.sampled(11)
def test_concrete_assigns_at_least_the_proved_width(kind, seed):
    network, _, _ = random_network(seed, kind)
    cost = fheconv.compile(network).cost
    assert cost.assigned_bits >= cost.accumulator_bits
    assert cost.accumulator_bits == network.budget().accumulator_bits
    assert cost.lookups == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["auto", "conv", "matrix"])
@pytest.mark.parametrize("seed", ENCRYPTED)
@pytest.mark.sampled(5)
def test_encrypted_results_are_the_clear_integers(kind, engine, seed):
    network, _, _ = random_network(seed, kind)
    try:
        circuit = fheconv.compile(network, fheconv.CompileConfig(engine=engine))
    except fheconv.InvalidArgumentError:  # it reads nothing but padding
        assert network.budget().accumulator_bits == 0
        return
    circuit.keygen()
    assert circuit.verify(unlike_calibration(network, seed)).ok


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_shifts_and_two_passes_run_encrypted(axes):
    rng = np.random.default_rng(axes)
    weight = rng.integers(-3, 4, (2, 2, *[3] * axes))
    weight[rng.random(weight.shape) < 0.6] = 0
    images = rng.integers(0, 4, (1, 2, *[5] * axes))
    config = fheconv.QuantConfig(weight_bits=3, input_bits=2)
    network = fheconv.quantize(fheconv.Conv.of(weight, padding=1), images, config)
    circuit = fheconv.compile(network, fheconv.CompileConfig(engine="shifts"))
    circuit.keygen()
    assert circuit.verify(images).ok


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_two_passes_run_encrypted(padding_mode):
    filters = np.stack([np.outer(a, b) for a, b in itertools.permutations([[1, 2, 1], [-1, 0, 1]], 2)])[
        :, None
    ]
    images = np.random.default_rng(0).uniform(-1, 1, (2, 2, 9, 8))
    source = fheconv.Conv.of(filters, padding=1, groups=2, padding_mode=padding_mode)
    network = fheconv.quantize(source, images, fheconv.QuantConfig(weight_bits=3, input_bits=4))
    circuit = fheconv.compile(network, fheconv.CompileConfig(engine="separable"))
    circuit.keygen()
    assert circuit.verify(images).ok
    assert circuit.verify(unlike_calibration(network, 0)).ok
