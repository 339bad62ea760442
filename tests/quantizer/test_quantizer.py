import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fheconv import (
    CalibrationError,
    Conv,
    InputRangeError,
    InvalidArgumentError,
    QuantConfig,
    UnsupportedLayerError,
    quantize,
)
from tests.support.strategies import layer_problems, quant_configs


def network_of(problem):
    return quantize(problem.module, problem.images, problem.config)


def counted_bias(network):
    """The trained bias of each channel in steps: without what the zero-point adds up to."""
    (layer,) = network.layers
    assert layer.bias.shape == (layer.shape[0], 1, 1)
    return layer.bias.ravel() + network.input.zero_point * layer.convolution.weight.sum(axis=(1, 2, 3))


def exact_accumulators(network, q):
    """The oracle: torch on integers in double precision, without any zero-point in its padding.

    Σ w·(q − z) + b, so that padding is zero; the layer keeps b − z·Σ w as its bias.
    """
    kernel = network.last.convolution
    z, geometry = network.input.zero_point, kernel.geometry
    x = torch.tensor(q - z).double()
    weight = torch.tensor(kernel.weight).double()
    bias = torch.tensor(counted_bias(network)).double()
    padding = [before for before, _ in geometry.padding]
    y = torch.conv2d(x, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups)
    return y.numpy()


def nearest(quantization, x):
    steps = np.rint(np.asarray(x, np.float64) / quantization.scale + quantization.zero_point)
    return np.clip(steps, quantization.minimum, quantization.maximum).astype(np.int64)


@given(layer_problems())
def test_outputs_are_the_integers_times_their_scales(problem):
    network = network_of(problem)
    q = nearest(network.input, problem.images)
    accumulators = exact_accumulators(network, q)
    np.testing.assert_array_equal(network.integers(problem.images), accumulators)
    y = network(problem.images)
    assert y.dtype == np.float64
    np.testing.assert_array_equal(y, accumulators * network.last.scale)
    values, scale = problem.nearest_weight()
    np.testing.assert_array_equal(network.last.convolution.weight, values)
    scale = (scale * network.input.scale).reshape(-1, 1, 1)
    np.testing.assert_allclose(network.last.scale, scale, rtol=1e-14)  # sums in another order
    assert y.shape[1:] == network.output_shape


@given(layer_problems())
def test_the_bias_is_counted_to_the_nearest_step(problem):
    network = network_of(problem)
    count, step = counted_bias(network), network.last.scale.ravel()
    bias = problem.module.bias
    expected = np.zeros(len(count)) if bias is None else bias.detach().double().numpy()
    assert (np.abs(count * step - expected) <= step * (0.5 + 1e-9)).all()


def error_bound(problem, network):
    """How far from torch each channel can be: ŷ − y = Σ (ŵ − w)·x̂ + Σ w·(x̂ − x) + (b̂ − b).

    The least squared error of a weight is at most that of rounding with the scale max|w|/end, half of that
    scale a tap; of signs, at most ‖w‖². Pixels are off by half a step, a bias by half an accumulator step.
    Cauchy-Schwarz takes the first sum to ‖ŵ − w‖·‖x̂‖.
    """
    end = 2 ** (problem.config.weight_bits - 1) - 1
    weight = problem.module.weight.detach().double().numpy().reshape(network.last.shape[0], -1)
    rows = weight if problem.config.per_channel else weight.reshape(1, -1)
    norm = np.linalg.norm(rows, axis=1)
    distance = norm if end == 0 else np.sqrt(rows.shape[1]) * np.abs(rows).max(axis=1) / end / 2
    pixels = (nearest(network.input, problem.images) - network.input.zero_point) * network.input.scale
    return (
        distance * np.sqrt(weight.shape[1]) * np.abs(pixels).max()
        + np.abs(weight).sum(axis=1) * network.input.scale / 2
        + network.last.scale.ravel() / 2
    )


def distance_to_torch(problem, network):
    return np.abs(network(problem.images) - problem.torch_output(problem.images)).max(axis=(0, 2, 3))


@given(layer_problems(configs=quant_configs() | st.just(QuantConfig(weight_bits=8, input_bits=12))))
def test_the_distance_to_torch_is_within_what_the_rounding_can_add_up_to(problem):
    network = network_of(problem)
    bound = error_bound(problem, network)
    assert (distance_to_torch(problem, network) <= bound * (1 + 1e-5)).all()


@given(
    layer_problems(configs=st.just(QuantConfig(weight_bits=8, input_bits=12)), kinds=("positive", "mixed"))
)
def test_eight_and_twelve_bits_are_within_a_hundredth_of_what_the_layer_can_reach(problem):
    """The bound above, in terms of taps · max|w| · max|x| alone: 1/254 + (1 + ½)/4095 + the bias."""
    network = network_of(problem)
    (layer,) = network.layers
    reach = layer.taps * np.abs(problem.module.weight.detach().numpy()).max(axis=(1, 2, 3))
    span = max(problem.images.max(), 0) - min(problem.images.min(), 0)
    share = 1 / 254 + 1.5 / 4095
    assert (distance_to_torch(problem, network) <= reach * span * share + layer.scale.ravel() / 2).all()


# The zero-point.


@given(layer_problems(kinds=("mixed", "negative", "positive")))
def test_zero_has_an_integer_of_its_own_and_the_images_range_is_covered(problem):
    quantization = network_of(problem).input
    assert quantization.minimum <= quantization.zero_point <= quantization.maximum
    if problem.config.input_signed:
        assert quantization.zero_point == 0
        assert quantization.minimum == -quantization.maximum - 1
    low, high = (
        (e - quantization.zero_point) * quantization.scale
        for e in (quantization.minimum, quantization.maximum)
    )
    half = quantization.scale * (0.5 + 1e-9)
    assert low - half <= problem.images.min()
    assert problem.images.max() <= high + half
    # No narrower scale would do.
    steps = quantization.maximum - quantization.minimum
    if not problem.config.input_signed:
        reach = max(problem.images.max(), 0) - min(problem.images.min(), 0)
        assert quantization.scale == pytest.approx(reach / steps)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_images_below_zero_get_the_greatest_zero_point(bits):
    images = -np.random.default_rng(0).random((2, 1, 5, 5)) - 0.5
    quantization = quantize(np.ones((2, 2)), images, QuantConfig(input_bits=bits)).input
    assert quantization.zero_point == 2**bits - 1
    assert (quantization.minimum, quantization.maximum) == (0, 2**bits - 1)


@given(layer_problems(kinds=("mixed", "negative")))
def test_an_image_of_zeros_gives_the_bias_everywhere(problem):
    """Padding and image are the same zero, so that no border can show."""
    network = network_of(problem)
    y = network.integers(np.zeros(network.input_shape))
    np.testing.assert_array_equal(y, np.broadcast_to(counted_bias(network).reshape(-1, 1, 1), y.shape))


# Integer images.


@given(problem=layer_problems(kinds=("integers",)), kind=st.sampled_from([np.int64, np.int32, float]))
def test_integer_images_are_taken_as_they_are(problem, kind):
    network = network_of(problem)
    bits = problem.config.input_bits
    low = -(2 ** (bits - 1)) if problem.config.input_signed else 0
    quantization = network.input
    assert (quantization.scale, quantization.zero_point, quantization.integral) == (1.0, 0, True)
    assert (quantization.minimum, quantization.maximum) == (low, low + 2**bits - 1)
    q, batched = network.quantize_input(problem.images.astype(kind))
    assert batched
    np.testing.assert_array_equal(q, problem.images)


@given(seed=st.integers(0, 2**32), levels=st.integers(2, 40), signed=st.booleans())
def test_images_are_at_most_as_many_integers_as_levels_ask_for(seed, levels, signed):
    levels += signed
    config = QuantConfig(input_levels=levels, input_signed=signed)
    least, greatest = config.input_ends()
    rng = np.random.default_rng(seed)
    for images in (rng.uniform(-1, 2, (2, 1, 4, 4)), rng.integers(least, greatest + 1, (2, 1, 4, 4))):
        network = quantize(np.ones((2, 2)), images, config)
        q, _ = network.quantize_input(images)
        assert least <= q.min() <= q.max() <= greatest
        assert (network.input.minimum, network.input.maximum) == (least, greatest)
        if images.dtype.kind == "i":  # they fit, and are taken as they are
            assert network.input.integral
            np.testing.assert_array_equal(q, images)


def test_integer_images_of_more_values_than_levels_are_scaled():
    images = np.arange(16).reshape(1, 4, 4)
    network = quantize(np.ones((2, 2)), images, QuantConfig(input_levels=6))
    assert not network.input.integral
    assert network.input.scale == 3
    assert quantize(np.ones((2, 2)), images, QuantConfig(input_levels=16)).input.integral


def test_dark_integer_images_leave_the_whole_data_type_to_brighter_ones():
    dark = np.array([[[0, 1], [1, 0]]])
    network = quantize(np.ones((2, 2), np.int64), dark, QuantConfig(input_bits=4))
    assert network(np.full((1, 2, 2), 15)).item() == 60
    with pytest.raises(InputRangeError, match=r"value 16 at \(0, 1, 0\).*\[0, 15\]"):
        network(np.array([[[15, 15], [16, 15]]]))
    with pytest.raises(InputRangeError, match="value -1 at"):
        network(-dark)


def test_floats_beyond_the_calibrated_range_are_refused_with_position_and_value():
    network = quantize(np.ones((2, 2)), np.linspace(0, 1, 32).reshape(2, 1, 4, 4), QuantConfig(input_bits=4))
    batch = np.full((3, 1, 4, 4), 0.5)
    batch[2, 0, 3, 1] = 1.25
    with pytest.raises(InputRangeError, match=r"value 1\.25 at \(2, 0, 3, 1\).*\[0, 1\]"):
        network(batch)
    with pytest.raises(InputRangeError, match=r"value 1\.25 at \(0, 3, 1\)"):
        network(batch[2])
    batch[2, 0, 3, 1] = -0.5
    with pytest.raises(InputRangeError, match=r"value -0\.5 at \(2, 0, 3, 1\)"):
        network(batch)
    batch[2, 0, 3, 1] = 1.03  # within half a step, 1/30
    assert network.quantize_input(batch)[0][2, 0, 3, 1] == 15


def test_true_is_one_and_refused_like_one():
    network = quantize(np.ones((2, 2)), np.full((1, 2, 2), 0.25))
    with pytest.raises(InputRangeError, match=r"value 1 at \(0, 0, 0\)"):
        network(np.ones((1, 2, 2), bool))


def test_fractions_in_an_integral_network_are_refused():
    network = quantize(np.ones((2, 2)), np.array([[[0, 3], [1, 2]]]))
    assert network(np.full((1, 2, 2), 3.0)).shape == (1, 1, 1)
    with pytest.raises(InputRangeError, match=r"2\.5 at \(0, 0, 1\) has a fraction"):
        network(np.array([[[1, 2.5], [1, 1]]]))


def test_integer_images_that_do_not_fit_are_scaled_like_floats():
    images = np.array([[[0, 100], [255, 7]]], np.uint8)
    network = quantize(np.ones((2, 2)), images, QuantConfig(input_bits=4))
    assert not network.input.integral
    assert network.input == quantize(np.ones((2, 2)), images.astype(float), QuantConfig(input_bits=4)).input
    assert quantize(np.ones((2, 2)), images, QuantConfig(input_bits=8)).input.integral
    assert not quantize(np.ones((2, 2)), -images.astype(int), QuantConfig(input_bits=8)).input.integral


@pytest.mark.parametrize("signed", [False, True])
def test_an_input_range_takes_the_place_of_the_calibrated_one(signed):
    images = np.full((1, 1, 3, 3), 0.25)
    config = QuantConfig(input_bits=8, input_range=(0.0, 2.0), input_signed=signed)
    network = quantize(np.ones((2, 2)), images, config)
    assert network.input.scale == 2.0 / network.input.maximum
    assert network.quantize_input(np.full((1, 3, 3), 2.0))[0].max() == network.input.maximum
    with pytest.raises(InputRangeError, match=r"value 2\.5 "):
        network(np.full((1, 3, 3), 2.5))


def test_an_input_range_narrows_an_integral_network_and_always_holds_zero():
    images = np.array([[[2, 3], [3, 2]]])
    network = quantize(np.ones((2, 2)), images, QuantConfig(input_range=(2, 5)))
    assert network.input.integral
    assert (network.input.minimum, network.input.maximum) == (0, 5)
    with pytest.raises(InputRangeError, match="value 6"):
        network(np.full((1, 2, 2), 6))


# Shapes and containers.


@given(layer_problems())
def test_a_single_image_is_the_batch_without_its_first_axis(problem):
    network = network_of(problem)
    np.testing.assert_array_equal(network(problem.images[0]), network(problem.images)[0])
    np.testing.assert_array_equal(network.integers(problem.images[0]), network.integers(problem.images)[0])


@given(layer_problems())
def test_an_empty_batch_gives_an_empty_batch(problem):
    network = network_of(problem)
    y = network(problem.images[:0])
    assert y.shape == (0, *network.output_shape)


@given(problem=layer_problems(), extra=st.integers(1, 2), axis=st.integers(0, 2))
def test_images_of_another_shape_are_refused(problem, extra, axis):
    network = network_of(problem)
    shape = list(network.input_shape)
    shape[axis] += extra
    for wrong in (shape, [1, *shape], [1, 1, *network.input_shape], network.input_shape[1:]):
        with pytest.raises(InputRangeError, match="have shape"):
            network(np.zeros(wrong))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_where_it_stands(value):
    network = quantize(np.ones((2, 2)), np.random.default_rng(0).random((1, 1, 3, 3)))
    image = np.zeros((1, 3, 3))
    image[0, 2, 1] = value
    with pytest.raises(InputRangeError, match=rf"\(0, 2, 1\) is {value}"):
        network(image)


@pytest.mark.parametrize("image", ["cat", None, [[1, 2], [3]], np.zeros((1, 3, 3), complex), {"x": 1}])
def test_what_is_no_image_is_refused(image):
    network = quantize(np.ones((2, 2)), np.random.default_rng(0).random((1, 1, 3, 3)))
    with pytest.raises(InputRangeError, match="The image"):
        network(image)


@pytest.mark.parametrize(
    "convert",
    [
        np.asarray,
        np.ndarray.tolist,
        torch.tensor,
        lambda x: torch.tensor(x, requires_grad=True),
        lambda x: torch.tensor(x).half(),
        lambda x: torch.tensor(x).bfloat16(),
        lambda x: x.astype(np.float16),
        lambda x: x[..., ::-1].copy()[..., ::-1],
        np.asfortranarray,
    ],
)
def test_every_container_of_the_same_numbers_is_the_same(convert):
    rng = np.random.default_rng(0)
    # Eighths: exact in all these types.
    weight, images = rng.integers(-8, 9, (2, 3, 2, 2)) / 8, rng.integers(-8, 9, (2, 3, 4, 4)) / 8
    expected = quantize(weight, images)
    network = quantize(convert(weight), convert(images))
    np.testing.assert_array_equal(network.last.convolution.weight, expected.last.convolution.weight)
    assert network.input == expected.input
    np.testing.assert_array_equal(network(convert(images)), expected(images))
    np.testing.assert_array_equal(network(convert(images[0])), expected(images[0]))


@given(layer_problems())
def test_a_module_an_array_with_options_and_its_double_are_one_layer(problem):
    m = problem.module
    options = {"stride": m.stride, "padding": m.padding, "dilation": m.dilation, "groups": m.groups}
    layer = Conv.of(m.weight, m.bias, **options)
    expected = network_of(problem)(problem.images)
    np.testing.assert_array_equal(quantize(layer, problem.images, problem.config)(problem.images), expected)
    m.double()
    np.testing.assert_array_equal(network_of(problem)(problem.images), expected)


# Filters without variety.


@given(st.integers(1, 8), st.floats(-9, 9).filter(lambda w: abs(w) > 1e-3))
def test_a_constant_filter_keeps_its_value(bits, value):
    images = np.arange(16).reshape(1, 4, 4)
    network = quantize(np.full((2, 2), value), images, QuantConfig(weight_bits=bits))
    expected = sum(images[:, i : i + 3, j : j + 3] for i in (0, 1) for j in (0, 1)) * value
    np.testing.assert_allclose(network(images), expected, rtol=1e-12)


@given(
    bias=st.floats(-1e6, 1e6, width=32).filter(lambda b: abs(b) > 1e-30),
    bits=st.integers(1, 8),
    seed=st.integers(0, 2**32),
)
def test_a_filter_of_zeros_gives_exactly_its_bias(bias, bits, seed):
    module = torch.nn.Conv2d(1, 2, 2, padding=1)
    with torch.no_grad():
        module.weight[0] = 0
        module.bias[0] = bias
    images = np.random.default_rng(seed).uniform(-1, 1, (1, 3, 3))
    y = quantize(module, images, QuantConfig(weight_bits=bits))(images)[0]
    assert set(y.astype(np.float32).ravel()) == {np.float32(bias)}
    np.testing.assert_allclose(y, bias, rtol=3e-16)


def test_a_filter_of_zeros_without_a_bias_gives_zeros():
    images = np.random.default_rng(0).random((2, 1, 3, 3))
    assert not quantize(np.zeros((2, 1, 2, 2)), images)(images).any()


@pytest.mark.parametrize("value", [0.3, -0.3, 7, 1e-20, 1e20])
@pytest.mark.parametrize("bits", [1, 4, 16])
def test_one_pixel_is_enough_for_calibration(value, bits):
    network = quantize([[2.0]], [[[value]]], QuantConfig(weight_bits=1, input_bits=bits))
    np.testing.assert_allclose(network([[[value]]]), 2 * value, rtol=1e-6)


# Refusals.


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((0, 1, 3, 3)), "empty"),
        (np.full((1, 3, 3), np.nan), "NaN or infinity"),
        (np.full((1, 3, 3), np.inf), "NaN or infinity"),
        (np.zeros((1, 3, 3)), "not all zero"),
        (np.full((1, 3, 3), 5e-324), "No input scale"),
        (np.array([[[-1.7e308, 1.7e308], [0.0, 0.0]]]), "No input scale"),
    ],
)
def test_images_that_show_no_scale_are_refused(images, words):
    with pytest.raises(CalibrationError, match=words):
        quantize(np.ones((2, 2)), images)


def test_images_of_integer_zeros_are_integers_like_others():
    assert quantize(np.ones((2, 2)), np.zeros((1, 3, 3), int)).input.maximum == 15


@pytest.mark.parametrize("image", [1.5, -0.5])
@pytest.mark.parametrize("kind", [float, int])
def test_calibration_outside_the_input_range_is_refused(image, kind):
    images = np.full((1, 3, 3), 2 * image).astype(kind)
    with pytest.raises(CalibrationError, match=r"outside input_range=\(0.0, 1.0\)"):
        quantize(np.ones((2, 2)), images, QuantConfig(input_range=(0, 1)))


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_layers_that_are_not_finite_are_refused(name, value):
    module = torch.nn.Conv2d(1, 1, 2)
    with torch.no_grad():
        getattr(module, name).view(-1)[0] = value
    with pytest.raises(CalibrationError, match=f"The {name} of layer 'conv'"):
        quantize(module, np.ones((1, 3, 3)))


@pytest.mark.parametrize(
    ("weight", "bias", "images", "words"),
    [
        (1e-30, 1.0, 1.0, "vanishingly small"),
        (1e-305, 0.0, 1e-5, "float64 does not hold"),
        (1e300, 0.0, 1e20, "float64 does not hold"),
        (0.0, 1e300, 1e-20, "float64 does not hold|too many"),
    ],
)
def test_steps_that_cannot_be_counted_are_refused_with_the_channel(weight, bias, images, words):
    layer = Conv.of(np.stack([np.ones((1, 2, 2)), np.full((1, 2, 2), weight)]), [0.0, bias])
    if weight == 0.0:
        layer = Conv.of(np.ones((2, 1, 2, 2)), [0.0, bias])
    with pytest.raises(CalibrationError, match=rf"(?i)channel 1.*({words})"):
        quantize(layer, np.full((1, 3, 3), images))


@pytest.mark.parametrize(
    "module",
    [torch.nn.LSTM(4, 2), torch.nn.MultiheadAttention(4, 2), torch.nn.Bilinear(4, 4, 2)],
    ids=lambda module: type(module).__name__,
)
def test_modules_that_cannot_be_compiled_are_refused_by_name(module):
    with pytest.raises(UnsupportedLayerError, match=rf"(?i)\b{type(module).__name__}\b"):
        quantize(module, np.ones((1, 4, 4)))


@settings(max_examples=15)  # each is exported by torch
@given(layer_problems())
def test_a_model_of_one_layer_is_that_layer(problem):
    expected = network_of(problem)
    model = quantize(torch.nn.Sequential(problem.module).double(), problem.images, problem.config)
    assert model.input == expected.input
    np.testing.assert_array_equal(model.last.convolution.weight, expected.last.convolution.weight)
    np.testing.assert_array_equal(model.integers(problem.images), expected.integers(problem.images))
    np.testing.assert_array_equal(model(problem.images), expected(problem.images))


@pytest.mark.slow
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), bits=st.integers(1, 8))
def test_a_linear_layer_is_the_convolution_of_one_tap_over_no_axes(seed, bits):
    rng = np.random.default_rng(seed)
    module = torch.nn.Linear(5, 3).double()
    weight, bias = rng.standard_normal((3, 5)), rng.standard_normal(3)
    module.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    images, config = rng.random((4, 5)), QuantConfig(weight_bits=bits)
    expected = quantize(Conv.of(weight[:, :, None], bias), images[:, :, None], config)
    network = quantize(module, images, config)
    np.testing.assert_array_equal(network.last.convolution.weight, expected.last.convolution.weight[..., 0])
    np.testing.assert_array_equal(network.integers(images), expected.integers(images[:, :, None])[..., 0])
    np.testing.assert_array_equal(network(images), expected(images[:, :, None])[..., 0])


@pytest.mark.parametrize(
    ("module", "images"),
    [
        (torch.nn.Conv2d(2, 1, 3), np.ones((1, 1, 4, 4))),
        (torch.nn.Conv2d(1, 1, 3), np.ones((4, 4))),
        (torch.nn.Conv2d(1, 1, 3), np.ones((1, 1, 1, 4, 4))),
        (torch.nn.Conv2d(1, 1, 3), np.ones((1, 1, 2, 2))),
        (torch.nn.Conv2d(1, 1, 3), "images"),
        ("weight", np.ones((1, 1, 4, 4))),
        (np.ones(3), np.ones((1, 1, 4, 4))),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(module, images):
    with pytest.raises(InvalidArgumentError):
        quantize(module, images)


def test_masked_arrays_and_configs_of_another_kind_are_refused():
    masked = np.ma.masked_greater(np.ones((1, 4, 4)), 2)
    with pytest.raises(InvalidArgumentError, match="masked"):
        quantize(np.ones((2, 2)), masked)
    for config in ("cfg", {}, []):
        with pytest.raises(InvalidArgumentError, match="QuantConfig"):
            quantize(np.ones((2, 2)), np.ones((1, 4, 4)), config)


def test_widths_and_ranges_may_be_numpys():
    config = QuantConfig(weight_bits=np.int64(3), input_bits=np.int64(4), input_range=np.array([0.0, 2.0]))
    assert config == QuantConfig(weight_bits=3, input_bits=4, input_range=(0.0, 2.0))
    assert quantize(np.ones((2, 2)), np.ones((1, 4, 4)), config).budget(3).remedy
    for ends in (("0", "1"), (0, 1, 2), 3, (0, None)):
        with pytest.raises(InvalidArgumentError, match="input_range"):
            QuantConfig(input_range=ends)


def test_bits_of_a_layer_that_there_is_not_are_refused_and_those_of_others_are_the_default():
    weight, images = np.array([[1.0, 7.0], [-3.0, 2.0]]), np.random.default_rng(0).random((1, 4, 4))
    with pytest.raises(InvalidArgumentError, match=r"weight_bits names 'fc'; the layers .* are 'conv'"):
        quantize(weight, images, QuantConfig(weight_bits={"fc": 2}))
    narrow, named = (quantize(weight, images, QuantConfig(weight_bits=b)) for b in (2, {"conv": 2}))
    np.testing.assert_array_equal(named.integers(images), narrow.integers(images))
    default, empty = (quantize(weight, images, config) for config in (None, QuantConfig(weight_bits={})))
    np.testing.assert_array_equal(empty.integers(images), default.integers(images))
