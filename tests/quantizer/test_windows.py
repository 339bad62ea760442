"""Windows of lookups, the gains that fill them, and what is computed outside."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fheconv
from fheconv.networks.bounds import FREE_BITS, layer_bounds
from fheconv.networks.expression import Expression
from fheconv.networks.integers import QuantizedLayer, blank_image
from fheconv.networks.quantization import Quantization
from fheconv.quantizer.tables import lookup
from fheconv.quantizer.windows import LOOKUP_LIMIT, Window, filling_gains, quiet_gains, room, width
from tests.support.nets import integer_images, quantize, quantized, random_net

SEEDS = range(8)
ROUNDED = {"overflow": "defined", "rounding_bits": 4, "weight_bits": 4, "activation_bits": 4}


@given(st.integers(0, 2**16 + 50), st.one_of(st.none(), st.integers(1, 8)))
def test_the_width_is_the_least_that_holds_the_span(span, rounding_bits):
    holds = [bits for bits in range(1, 17) if span <= room(bits, rounding_bits)]
    if holds:
        assert width("layer", span, rounding_bits) == holds[0]
        assert room(holds[0], None) == 2 ** holds[0] - 1
    else:
        with pytest.raises(fheconv.AccumulatorOverflowError, match=f"{LOOKUP_LIMIT} bits") as refused:
            width("layer", span, rounding_bits)
        assert (refused.value.layer, refused.value.value) == ("layer", span)
        assert refused.value.limit == room(16, rounding_bits) < span


@pytest.mark.parametrize("bits", [1, {"conv": 1}])
def test_rounding_to_one_bit_leaves_nothing_and_is_refused(bits):
    assert all(room(bits, 1) < 0 for bits in range(2, 17))
    with pytest.raises(fheconv.InvalidArgumentError, match="from 2 to 8"):
        fheconv.QuantConfig(rounding_bits=bits)


@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=5),
    st.one_of(st.none(), st.integers(2, 6)),
    st.booleans(),
)
def test_a_gain_is_the_greatest_that_keeps_a_span_in_the_room_and_a_step_in_a_column(spans, kept, proved):
    span = np.array(spans)
    bits = width("layer", int(span.max()), kept, proved=proved)
    gain, most = filling_gains(span, bits, kept, proved=proved), room(bits, kept, proved=proved)
    assert (gain >= 1).all()
    assert (span * gain <= most).all()
    column = 2 ** max(bits - kept, 0) if kept else 1
    assert ((span * (gain + 1) > most) | (gain == column)).all()


def looked_up(network):
    """The layers with lookups, each with the number of the tensor that it makes."""
    return [
        (number, layer)
        for number, layer in enumerate(network.layers, 1)
        if isinstance(layer, QuantizedLayer) and layer.lookup is not None
    ]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("overflow", ["proved", "defined"])
@pytest.mark.sampled(3)
def test_gains_multiply_accumulators_and_no_real_number(seed, overflow):
    """Of two networks, one with more room in its windows: only its accumulators are multiplied."""
    module, images = random_net(seed)
    options = {"overflow": overflow, "method": "gptq", "weight_bits": 3, "margin": 100.0}
    exact = quantize(module, images, **options)
    rounded = quantize(module, images, **options, rounding_bits=8, activation_bits=4)
    q = integer_images(exact, seed, 5)
    for (number, one), (_, other) in zip(looked_up(exact)[:1], looked_up(rounded)[:1], strict=True):
        assert (one.gain == 1).all()
        assert (other.gain >= 1).all()
        tensors = exact.tensors(q)[:number]
        np.testing.assert_array_equal(one.accumulate(tensors) * other.gain, other.accumulate(tensors))
        np.testing.assert_array_equal(one.scale, other.scale)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", SEEDS)
def test_rounded_windows_hold_what_calibration_reaches_and_the_blank_image(seed):
    network = quantized(seed, **ROUNDED)
    _, images = random_net(seed)
    blank = blank_image(network.input, network.input_shape)
    for q in (network.input.integers(images), blank):
        tensors = network.tensors(q)
        for _, layer in looked_up(network):
            table = layer.lookup
            ends = (1,) * (len(layer.shape) - 1)
            offset = layer.accumulate(tensors) - table.minimum.reshape(-1, *ends)
            inside = (offset >= 0) & (offset + 2**table.dropped_bits // 2 < 2**table.bits)
            # A window that is a little too narrow for the weights loses its top.
            assert inside.all() if q is blank else inside.mean() > 0.98
            assert not table.proved


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 5, 7])
def test_activations_stay_in_their_range_for_every_image(seed):
    """So the accumulators of the layers that read them, and maxima of them, keep their proofs."""
    network = quantized(seed, **ROUNDED)
    q = integer_images(network, seed, 30)
    tensors = network.tensors(q)
    turned = 0
    for number, layer in looked_up(network):
        output = layer.lookup.output
        assert output.minimum == 0 == output.maximum % 2
        assert tensors[number].min() >= output.minimum
        assert tensors[number].max() <= output.maximum
        offset = layer.accumulate(tensors) - layer.lookup.minimum.reshape(-1, *[1] * (len(layer.shape) - 1))
        turned += int(((offset < 0) | (offset >= 2**layer.lookup.bits)).sum())
    assert turned  # or the images were too tame to show anything
    last, bounds = tensors[-1], layer_bounds(network.last, network.shapes)
    assert (last >= bounds.minimum).all()
    assert (last <= bounds.maximum).all()


@pytest.mark.parametrize("rounding_bits", [None, 5])
def test_a_value_a_little_outside_its_window_still_gets_the_right_activation(rounding_bits):
    """The least activation turns into the greatest above the window, the greatest into the least below."""
    layer = nn.Conv2d(1, 1, 1)
    nn.init.constant_(layer.weight, 1.0)
    nn.init.constant_(layer.bias, 0.0)
    module = nn.Sequential(layer, nn.Hardtanh(-0.5, 0.5), nn.Conv2d(1, 1, 1, bias=False))
    images = np.linspace(-0.75, 0.75, 64).reshape(-1, 1, 1, 1)
    options = {"input_bits": 8, "input_range": (-2, 2), "activation_bits": 4, "margin": 0.0}
    network = quantize(
        module, images, overflow="defined", rounding_bits=rounding_bits, weight_bits=1, **options
    )
    lookup = network.layers[0].lookup
    assert not lookup.proved
    x = np.linspace(-0.95, 0.95, 39).reshape(-1, 1, 1, 1)  # the window ends near ±0.75
    tensors = network.tensors(network.input.integers(x))
    real = (tensors[1] - lookup.output.zero_point) * lookup.output.scale
    np.testing.assert_allclose(real, np.clip(x, -0.5, 0.5), atol=0.1)


def test_rounding_to_a_few_bits_loses_less_in_windows_where_values_are():
    """A trained filter reaches a small part of what the worst image gives."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 8, 5), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 4)
    ).double()
    rng = np.random.default_rng(0)
    images, others = rng.uniform(size=(2, 60, 1, 8, 8))
    expected = module(torch.tensor(others)).detach().numpy()

    def error(**options):
        network = quantize(module, images, rounding_bits=4, **options)
        return np.square(network(np.clip(others, images.min(), images.max())) - expected).mean()

    assert error(overflow="defined") < error() / 2


@pytest.mark.parametrize("method", ["gptq", "accumulator"])
def test_a_width_that_is_too_narrow_for_what_is_reached_is_refused(method):
    module, images = random_net(3)
    with pytest.raises(fheconv.AccumulatorOverflowError, match="are allowed") as refused:
        quantize(module, images, accumulator_bits=3, rounding_bits=2, activation_bits=6, input_bits=8,
                 overflow="defined", method=method)  # fmt: skip
    assert refused.value.limit == 7
    bits = refused.value.settings["accumulator_bits"]
    options = {"rounding_bits": 2, "activation_bits": 6, "input_bits": 8, "overflow": "defined"}
    name = refused.value.layer
    network = quantize(module, images, accumulator_bits={name: bits}, method=method, **options)
    assert {layer.name: layer for layer in network.layers}[name].lookup.bits == bits <= LOOKUP_LIMIT


def test_reports_tell_of_windows_that_images_can_leave_and_can_demand_proofs():
    network = quantized(0, **ROUNDED)
    report = network.budget()
    assert not report.proved
    assert "hold what calibration reaches" in str(report)
    with pytest.raises(fheconv.AccumulatorOverflowError, match='overflow="proved"') as refused:
        report.require(proved=True)
    assert refused.value.layer in [layer.name for layer in report.layers]
    assert report.require() is report
    proved = quantized(0, accumulator_bits=9).budget()
    assert proved.require(proved=True) is proved
    for layer, own in zip(network.layers, report.layers, strict=True):
        if (table := getattr(layer, "lookup", None)) is not None:
            for channel in own.channels:
                start, end = channel.window
                assert end - start == 2**table.bits - 1
                assert channel.gain == np.broadcast_to(layer.gain, layer.shape)[channel.channel].flat[0]
                assert channel.minimum <= channel.observed[0] <= channel.observed[1] <= channel.maximum


@pytest.mark.parametrize("seed", SEEDS)
def test_what_leaves_windows_is_counted(seed):
    network = quantized(seed, **ROUNDED)
    _, images = random_net(seed)
    names = [layer.name for _, layer in looked_up(network)]
    assert sorted(network.outside(images)) == sorted(names)
    assert all(share < 0.02 for share in network.outside(images).values())
    assert quantized(seed).outside(images) == {}


def test_one_of_four_values_inside_is_counted():
    module = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), nn.Conv2d(1, 1, 1))
    nn.init.constant_(module[0].weight, 1.0)
    images = np.linspace(0, 0.2, 8).reshape(-1, 1, 1, 1)
    network = quantize(module, images, input_range=(0, 1), input_bits=8, overflow="defined", margin=0.0)
    (share,) = network.outside(np.array([0.1, 0.5, 0.9, 1.0]).reshape(-1, 1, 1, 1)).values()
    assert share == 0.75


@pytest.mark.parametrize("gain", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("start", [0, 1, 5, 7, -13])
def test_an_entry_is_the_activation_at_the_mean_of_the_accumulators_that_read_it(gain, start):
    """With a gain, accumulators are multiples of it, and few of them read one entry."""
    identity = Expression("x", ())
    output = Quantization(scale=2.0**-20, zero_point=0, minimum=-(2**40), maximum=2**40)
    window = Window(
        minimum=np.array([start * gain + 3]),
        span=np.array([60]),
        bits=7,
        rounding_bits=4,
        proved=True,
        gain=np.array([gain]),
    )
    table = lookup("layer", identity, output, window, step=np.ones((1, 1)), bias=np.zeros((1, 1)))
    accumulators = np.arange(-300, 300) * gain
    offset = accumulators - table.minimum[0]
    columns = (offset + 4) >> 3
    seen = 0
    for column in range(16):
        own = accumulators[columns == column]
        if len(own):
            assert table.tables[0, column] * output.scale == pytest.approx(own.mean(), abs=1e-5)
            seen += 1
    assert seen >= 12


@given(st.lists(st.floats(0, 12), min_size=1, max_size=5), st.integers(2, 8))
def test_a_quiet_gain_is_the_greatest_whose_noise_is_free(norms, kept):
    norm_bits = np.array(norms)
    gain = quiet_gains(norm_bits, kept)
    assert (gain >= 1).all()
    assert ((kept + norm_bits + np.log2(gain) <= FREE_BITS + 1e-9) | (gain == 1)).all()
    assert (kept + norm_bits + np.log2(gain + 1) > FREE_BITS - 1e-9).all()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_gains_keep_the_noise_of_sums_free(seed, pool):
    """Windows of 13 bits would allow greater gains."""
    torch.manual_seed(seed)
    between = nn.MaxPool2d(2) if pool else nn.Identity()
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), between, nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    images = np.random.default_rng(seed).uniform(0, 1, (20, 1, 10, 10))
    options = {"overflow": "defined", "method": "gptq", "weight_bits": 3, "accumulator_bits": {"3": 13}}
    network = quantize(module.double().eval(), images, **options, rounding_bits=5, activation_bits=3)
    layer = next(layer for _, layer in looked_up(network) if layer.name == "3")
    gain = layer.gain.ravel()
    assert layer.lookup.bits <= 13
    squares = torch.tensor(layer.convolution.weight).double().square().sum((1, 2, 3)).numpy()
    # A value of a lookup has the noise of one. The maxima of columns add one, and those of rows another.
    bits = 5 + np.log2(squares * (3 if pool else 1)) / 2
    assert ((bits <= FREE_BITS) | (gain == 1)).all()


def test_windows_beside_maxima_are_so_narrow_that_the_maxima_stay_cheap():
    """Maxima share the width of the windows of the layer that reads them, and their noise grows with it."""
    torch.manual_seed(2)  # whose linear layer would rather have 10 bits
    layers = nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(576, 8), nn.ReLU()
    module, images = nn.Sequential(*layers, nn.Linear(8, 4)), torch.rand(100, 1, 14, 14)
    options = {"overflow": "defined", "rounding_bits": 5, "weight_bits": 6}
    narrow = fheconv.quantize(module, images, fheconv.QuantConfig(**options))
    wide = fheconv.quantize(module, images, fheconv.QuantConfig(**options, accumulator_bits={"4": 10}))
    costs = [network.forecast(fheconv.CompileConfig(p_error=0.05)) for network in (narrow, wide)]
    bits = [{layer.name: layer.bits for layer in cost.layers} for cost in costs]
    assert [one["2.1"] for one in bits] == [one["4"] for one in bits]
    assert bits[0]["4"] < bits[1]["4"]
    assert costs[0].complexity < costs[1].complexity
