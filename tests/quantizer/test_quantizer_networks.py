import pickle

import numpy as np
import pytest
import torch
from torch import nn

import fheconv
from fheconv.networks.bounds import layer_bounds
from fheconv.networks.floats import Layer, Maximum
from tests.support.nets import (
    BLOCKS,
    integer_images,
    quantize,
    quantized,
    random_net,
    real_images,
    torch_output,
)

SEEDS = range(5)
NET = ("conv", "residual")  # with these blocks, seed 3 is a net of 4 layers


def evaluate(network, q):
    """The last accumulators of integer images, slowly: by filter matrices, tables looked up one by one."""
    tensors = [q.reshape(len(q), -1)]
    for layer in network.layers:
        if isinstance(layer, Maximum):
            x = tensors[layer.source]
            columns = layer.index.reshape(len(layer.index), -1)
            tensors.append(np.array([[max(row[c] for c in column) for column in columns.T] for row in x]))
            continue
        sums = np.broadcast_to(layer.bias, layer.shape).ravel()
        for term, quantization in zip(layer.terms, layer.inputs, strict=True):
            shape = network.shapes[term.source]
            zero = quantization.zero_point
            padding = term.apply(np.zeros((1, *shape), np.int64), zero).ravel()
            sums = sums + tensors[term.source] @ term.matrix(shape).toarray() + padding
        if layer.lookup is not None:
            table = layer.lookup
            which = np.broadcast_to(table.which, layer.shape).ravel()
            start = np.repeat(table.minimum, sums.shape[1] // len(table.minimum))
            for row in sums:
                for place, value in enumerate(row):
                    column = int(value - start[place])
                    if table.dropped_bits:
                        column = int(np.floor(column / 2**table.dropped_bits + 0.5))
                    row[place] = table.tables[which[place], column]
        tensors.append(sums)
    return tensors[-1].reshape(len(q), *network.accumulator_shape)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("options", [{}, {"accumulator_bits": 9}, {"rounding_bits": 3}], ids=str)
@pytest.mark.sampled(2)
def test_the_integer_network_equals_a_slow_evaluation(seed, options):
    network = quantized(seed, **options)
    q = integer_images(network, seed, 4)
    np.testing.assert_array_equal(network.accumulate(q), evaluate(network, q))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.sampled(3)
def test_many_bits_come_near_to_torch(block):
    module, images = random_net(7, block, size=(1, 5, 6))
    network = quantized(
        7, block, size=(1, 5, 6), weight_bits=7, activation_bits=6, input_bits=7, accumulator_bits=16
    )
    expected = torch_output(module, images)
    np.testing.assert_allclose(network.source(images), expected, atol=1e-9)
    got = network(images)
    assert got.shape == expected.shape
    error = np.abs(got - expected).max() / np.ptp(expected)
    assert error < 0.05
    coarse = quantized(7, block, size=(1, 5, 6), weight_bits=2, activation_bits=2, input_bits=3)
    assert error < 0.5 * np.abs(coarse(images) - expected).max() / np.ptp(expected)


def test_bits_are_given_layer_by_layer():
    module, images = random_net(3, *NET)
    names = [layer.name for layer in quantized(3, *NET).source.layers]
    first, last = names[0], names[-1]
    network = quantize(
        module,
        images,
        weight_bits={first: 2, last: 8},
        activation_bits={first: 3},
        accumulator_bits={first: 7},
        rounding_bits={names[1]: 3},
    )
    layers = {layer.name: layer for layer in network.layers}
    assert layers[first].weight_range == (-1, 1)
    assert layers[last].weight_range == (-127, 127)
    assert layers[names[1]].weight_range == (-7, 7)
    assert layers[first].lookup.output.maximum == 7
    assert layers[first].lookup.bits <= 7
    assert layers[first].lookup.dropped_bits == 0
    assert layers[names[1]].lookup.bits - layers[names[1]].lookup.dropped_bits == 3


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("levels", [2, 3, 5, 11])
@pytest.mark.sampled(7)
def test_no_table_holds_more_integers_than_levels_ask_for(seed, levels):
    network = quantized(seed, activation_levels=levels, input_levels=levels, accumulator_bits=8)
    assert network.budget(8).fits
    assert network.budget().proved
    assert network.input.maximum - network.input.minimum == levels - 1
    tables = [layer.lookup for layer in network.layers if getattr(layer, "lookup", None) is not None]
    # Fewer where tensors are added up, which get one scale.
    assert all(0 <= table.tables.min() <= table.tables.max() < levels for table in tables)
    assert all(table.output.maximum < levels for table in tables)
    q = integer_images(network, seed, 4)
    np.testing.assert_array_equal(network.accumulate(q), evaluate(network, q))


@pytest.mark.parametrize("seed", SEEDS)
def test_levels_that_are_powers_of_two_are_bits(seed):
    one = quantized(seed, activation_levels=8, input_levels=32, accumulator_bits=8)
    other = quantized(seed, activation_bits=3, input_bits=5, accumulator_bits=8)
    q = integer_images(one, seed, 3)
    np.testing.assert_array_equal(one.accumulate(q), other.accumulate(q))


def test_levels_are_given_layer_by_layer():
    module, images = random_net(3, *NET)
    first, second, *_ = [layer.name for layer in quantized(3, *NET).source.layers]
    network = quantize(module, images, activation_bits=3, activation_levels={first: 5})
    layers = {layer.name: layer for layer in network.layers}
    assert layers[first].lookup.output.maximum == 4
    assert layers[second].lookup.output.maximum == 7


@pytest.mark.parametrize(
    "name", ["weight_bits", "activation_bits", "activation_levels", "accumulator_bits", "rounding_bits"]
)
def test_bits_of_a_layer_that_there_is_not_are_refused(name):
    module, images = random_net(3, *NET)
    with pytest.raises(fheconv.InvalidArgumentError, match=f"{name} names 'stem'; the layers .*'0.0'"):
        quantize(module, images, **{name: {"stem": 4}})


@pytest.mark.parametrize("method", ["auto", "accumulator"])
@pytest.mark.parametrize("bits", [5, 7, 12])
def test_one_width_for_all(bits, method):
    network = quantized(3, *NET, accumulator_bits=bits, method=method)
    assert network.budget(bits).fits
    default = min(4, bits // 2)
    assert all(2 ** (default - 1) <= q.maximum < 2**default for q in network.quantizations[1:])


@pytest.mark.filterwarnings("ignore::fheconv.InputScaleWarning")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rounding_bits", [None, 4])
@pytest.mark.sampled(3)
def test_images_unlike_calibration_stay_in_the_proved_bounds(seed, rounding_bits):
    """Calibrated on almost black images, with an input range that white ones keep to."""
    module, images = random_net(seed)
    dark = np.abs(images) * 0.05
    config = fheconv.QuantConfig(
        accumulator_bits=12, activation_bits=3, input_range=(-1, 1), rounding_bits=rounding_bits
    )
    network = fheconv.quantize(module, dark, config)
    q = integer_images(network, seed, 30)
    tensors = network.tensors(q)
    outside = 0
    for number, (layer, seen) in enumerate(zip(network.layers, network.observed, strict=True)):
        if seen is None:
            continue
        bounds = layer_bounds(layer, network.shapes)
        accumulators = layer.accumulate(tensors)
        assert (accumulators >= bounds.minimum).all()
        assert (accumulators <= bounds.maximum).all()
        outside += (accumulators > seen[1].reshape(-1, *[1] * (accumulators.ndim - 2))).sum()
        if layer.lookup is not None:
            assert layer.lookup.proved
            assert (tensors[number + 1] >= 0).all()
            assert (tensors[number + 1] <= layer.lookup.output.maximum).all()
    assert outside  # or these images would prove nothing
    np.testing.assert_array_equal(network.accumulate(q[:4]), evaluate(network, q[:4]))
    np.testing.assert_array_equal(network.integers(real_images(network, q)), tensors[-1])


@pytest.mark.parametrize("options", [{}, {"accumulator_bits": 6}, {"rounding_bits": 4}], ids=str)
@pytest.mark.parametrize("value", [0.5, -2.0, 1e-4])
@pytest.mark.sampled(2)
def test_constant_images_calibrate(value, options):
    """All that is known of each tensor is one value: still nothing warns, and that value comes out."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, padding_mode="replicate"),
        nn.ReLU(),
        nn.Conv2d(2, 2, 2),
        nn.Tanh(),
        nn.Conv2d(2, 1, 2),
    ).double()
    images = np.full((3, 1, 4, 4), value)
    network = quantize(module, images, **options)
    expected = torch_output(module, images)
    assert np.abs(network(images) - expected).max() < 0.3
    q = integer_images(network, 0, 5)
    np.testing.assert_array_equal(network.accumulate(q), evaluate(network, q))


def test_black_images_have_no_scale():
    module, images = random_net(3, *NET)
    with pytest.raises(fheconv.CalibrationError, match="input_range"):
        fheconv.quantize(module, np.zeros_like(images))
    network = quantize(module, np.zeros_like(images), input_range=(0, 1))
    assert np.isfinite(network(np.zeros_like(images))).all()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", SEEDS)
def test_one_image_is_enough_to_calibrate(seed):
    module, images = random_net(seed)
    network = quantize(module, images[:1], weight_bits=6, activation_bits=6)
    expected = torch_output(module, images[:1])
    assert np.abs(network(images[:1]) - expected).max() <= 0.25 * max(np.abs(expected).max(), 1)
    q = integer_images(network, seed, 2)
    np.testing.assert_array_equal(network.accumulate(q), evaluate(network, q))


class Softmax(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, x):
        return torch.softmax(x, self.dim)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "ending",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(32, 3), Softmax(1)),
        nn.Sequential(nn.Flatten(), nn.Linear(32, 3), nn.LogSoftmax(dim=-1)),
        nn.Sequential(nn.Conv2d(2, 2, 2), nn.ReLU()),
        nn.Sequential(nn.Conv2d(2, 2, 2), nn.Flatten()),
        nn.Sequential(nn.Conv2d(2, 2, 2), nn.SiLU(), nn.Flatten(2)),
        nn.Sequential(nn.Conv2d(2, 4, 2, stride=2), nn.PixelShuffle(2)),
        nn.Sequential(nn.Conv2d(2, 2, 2), Softmax(1)),
        nn.Sequential(nn.Conv2d(2, 2, 2), nn.ReLU(), nn.Flatten(), Softmax(1)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3), nn.Sigmoid()),
    ],
    ids=lambda module: " ".join(type(part).__name__ for part in module),
)
def test_what_ends_a_model_is_finished_in_clear_in_torchs_shape(ending):
    torch.manual_seed(1)
    module = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), ending).double().eval()
    images = np.random.default_rng(0).uniform(0, 1, (10, 1, 4, 4))
    config = fheconv.QuantConfig(weight_bits=8, activation_bits=6, input_bits=6)
    network = fheconv.quantize(module, images, config)
    assert network.last.lookup is None
    looked_up = [layer.shape for layer in network.layers[:-1]]
    assert looked_up == [(2, 4, 4)]
    expected = torch_output(module, images)
    assert network(images).shape == expected.shape
    assert network(images[0]).shape == expected.shape[1:] == network.output_shape
    assert np.abs(network(images) - expected).max() < 0.1 * max(np.ptp(expected), 0.1)
    accumulators = network.integers(images)
    np.testing.assert_array_equal(network.dequantize(accumulators), network(images))
    assert accumulators.dtype == np.int64


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", SEEDS)
def test_windows_where_values_are_are_narrower_and_say_so(seed):
    module, images = random_net(seed)
    proved = quantize(module, images, weight_bits=6)
    defined = quantize(module, images, weight_bits=6, overflow="defined")
    layers = defined.budget().layers
    assert all(layer.accumulator_bits <= layer.offset_bits for layer in layers)
    assert all(layer.proved for layer in layers if layer.table_entries == 0)
    assert any(not layer.proved for layer in layers)
    assert defined.budget().proved is False
    assert proved.budget().proved is True
    for layer in layers:  # an exchangeable image more, and two ends of each channel's range
        assert layer.risk == (0 if layer.proved else min(2 * layer.shape[0] / (len(images) + 1), 1))
    # Each channel's window holds what calibration reaches, and a margin.
    for layer, seen in zip(defined.layers, defined.observed, strict=True):
        table = getattr(layer, "lookup", None)
        if table is not None:
            assert (seen[0] >= table.minimum).all()
            assert (seen[1] < table.minimum + 2**table.bits).all()


def test_the_former_name_of_defined_windows_still_works():
    assert fheconv.QuantConfig(overflow="calibrated") == fheconv.QuantConfig(overflow="defined")


def test_a_wider_margin_allows_for_more():
    module, images = random_net(3, *NET)
    networks = [
        quantize(module, images, weight_bits=8, overflow="defined", margin=margin) for margin in (0, 1, 100)
    ]
    widths = [network.budget().accumulator_bits for network in networks]
    assert widths == sorted(widths)
    assert widths[-1] == quantized(3, *NET, weight_bits=8).budget().accumulator_bits


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", SEEDS)
def test_networks_survive_pickling(seed):
    network = quantized(seed, rounding_bits=4)
    copy = pickle.loads(pickle.dumps(network))
    q = integer_images(network, seed, 3)
    np.testing.assert_array_equal(copy.accumulate(q), network.accumulate(q))
    np.testing.assert_array_equal(copy(real_images(network, q)), network(real_images(network, q)))
    assert copy.budget().to_dict() == network.budget().to_dict()
    assert copy.config == network.config
    assert (copy.input, copy.calibrated) == (network.input, network.calibrated)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_model_and_images_give_the_same_integers(seed):
    module, images = random_net(seed)
    one, other = (quantize(module, images, accumulator_bits=9) for _ in "ab")
    q = integer_images(one, seed, 3)
    np.testing.assert_array_equal(one.accumulate(q), other.accumulate(q))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", SEEDS)
def test_layers_are_fitted_to_what_the_layers_before_them_deliver(seed):
    """Means of what every linear layer sums up are torch's: the bias makes up for the rest.

    This takes more than ten images that are independent; with fewer, the bias also heeds what is in range.
    """
    module, few = random_net(seed)
    images = np.random.default_rng(seed).uniform(few.min(), few.max(), (60, *few.shape[1:]))
    network = quantize(module, images, accumulator_bits=10)
    assert network.evidence[0] > 10
    floats = network.source.tensors(images)
    tensors = network.tensors(network.input.integers(images))
    layer, own = network.source.layers[-1], network.layers[-1]
    assert isinstance(layer, Layer)
    real = (own.accumulate(tensors) * own.scale).mean(axis=(0, *range(2, 1 + len(layer.shape))))
    meant = layer.sums(floats).mean(axis=(0, *range(2, 1 + len(layer.shape))))
    steps = np.broadcast_to(own.scale, layer.shape).reshape(len(real), -1).max(axis=1)
    assert (np.abs(real - meant) <= 0.5 * np.abs(steps) + 1e-9).all()


def test_filters_that_a_pooling_adds_up_share_a_scale():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(1, 4, 3, padding=1)
    conv.weight.data *= torch.tensor([0.1, 1.0, 3.0, 10.0]).reshape(-1, 1, 1, 1)
    module = torch.nn.Sequential(
        conv, torch.nn.PixelShuffle(2), torch.nn.AvgPool2d(3, 2), torch.nn.Hardtanh(-9, 9)
    )
    images = torch.rand(20, 1, 5, 5)
    network = fheconv.quantize(module, images, fheconv.QuantConfig(weight_bits=8, input_bits=8))
    expected = module(images).detach().numpy()
    assert np.abs(network(images) - expected).max() < 0.02 * np.ptp(expected)
    network = fheconv.quantize(module, images, fheconv.QuantConfig(accumulator_bits=9, input_bits=3))
    assert network.budget(9).fits
