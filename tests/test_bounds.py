import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fheconv
from fheconv.arithmetic import ConvGeometry
from fheconv.bounds import accumulator_bounds, layer_bounds, twos_complement_bits, worst_case_inputs
from fheconv.errors import AccumulatorOverflowError, InvalidArgumentError
from tests.strategies import integer_layers


def accumulators(layer, images):
    """The oracle: torch, padded with the zero-point, exact in double precision."""
    (top, bottom), (left, right) = layer.geometry.padding
    x = torch.nn.functional.pad(
        torch.tensor(images).double(), (left, right, top, bottom), value=float(layer.input.zero_point)
    )
    y = torch.conv2d(
        x,
        torch.tensor(layer.weight).double(),
        torch.tensor(layer.bias).double(),
        layer.geometry.stride,
        0,
        layer.geometry.dilation,
        layer.geometry.groups,
    )
    return y.numpy()


def channels_of(layer):
    return layer.weight.shape[1] * layer.geometry.groups


@given(integer_layers(most_pixels=10))
def test_all_corner_images_together_reach_the_bounds_of_every_position_and_no_more(problem):
    layer, spatial = problem
    bounds = layer_bounds(layer, spatial)
    shape = (channels_of(layer), *spatial)
    ends = (layer.input.minimum, layer.input.maximum)
    corners = np.array(list(product(ends, repeat=math.prod(shape)))).reshape(-1, *shape)
    y = accumulators(layer, corners)
    # An accumulator is linear in each pixel, so that its extremes lie in the corners.
    np.testing.assert_array_equal(bounds.minimum, y.min(axis=0))
    np.testing.assert_array_equal(bounds.maximum, y.max(axis=0))
    np.testing.assert_array_equal(bounds.channel_minimum, y.min(axis=(0, 2, 3)))
    np.testing.assert_array_equal(bounds.channel_maximum, y.max(axis=(0, 2, 3)))


@given(problem=integer_layers(), seed=st.integers(0, 2**32))
def test_no_image_leaves_the_bounds(problem, seed):
    layer, spatial = problem
    bounds = layer_bounds(layer, spatial)
    images = np.random.default_rng(seed).integers(
        layer.input.minimum, layer.input.maximum + 1, (50, channels_of(layer), *spatial)
    )
    y = accumulators(layer, images)
    assert bounds.minimum.shape == bounds.maximum.shape == y.shape[1:]
    assert (bounds.minimum <= y).all()
    assert (y <= bounds.maximum).all()


@given(integer_layers())
def test_worst_case_inputs_reach_both_ends_of_every_channel(problem):
    layer, spatial = problem
    bounds = layer_bounds(layer, spatial)
    images = worst_case_inputs(layer, spatial, bounds)
    assert images.shape == (2 * len(layer.weight), channels_of(layer), *spatial)
    assert set(images.ravel()) <= {layer.input.minimum, layer.input.maximum}
    y = accumulators(layer, images)
    for c in range(len(layer.weight)):
        least, greatest = bounds.minimum_position(c), bounds.maximum_position(c)
        assert y[(2 * c, c, *least)] == bounds.channel_minimum[c] == y[2 * c, c].min()
        assert y[(2 * c + 1, c, *greatest)] == bounds.channel_maximum[c] == y[2 * c + 1, c].max()


@given(integer_layers())
def test_the_positions_named_are_the_first(problem):
    layer, spatial = problem
    bounds = layer_bounds(layer, spatial)
    for c in range(len(layer.weight)):
        least, greatest = bounds.minimum[c], bounds.maximum[c]
        assert bounds.minimum_position(c) == np.unravel_index(least.argmin(), least.shape)
        assert bounds.maximum_position(c) == np.unravel_index(greatest.argmax(), greatest.shape)


def test_a_kernel_larger_than_the_image_is_bounded_by_the_taps_that_some_position_sees():
    """A 5×5 kernel of ones on a padded 2×2 image: all nine positions see a part, none more than four taps."""
    geometry = ConvGeometry.of((5, 5), padding=2)
    bounds = accumulator_bounds(np.ones((1, 1, 5, 5), np.int64), geometry, (2, 2), (0, 3))
    assert bounds.channel_maximum.tolist() == [4 * 3]
    # On a sparse kernel that meets the image with one corner at a time, not two of them ever add up.
    corners = np.zeros((1, 1, 5, 5), np.int64)
    corners[..., ::4, ::4] = 1
    bounds = accumulator_bounds(corners, ConvGeometry.of((5, 5), padding=4), (2, 2), (0, 3))
    assert bounds.channel_maximum.tolist() == [3]


def test_a_zero_point_widens_what_no_position_sees_whole():
    """Positive taps left and right, of which the one-pixel image meets one at a time."""
    weight = np.array([[[[1, 0, 1]]]])
    geometry = ConvGeometry.of((1, 3), padding=(0, 1))
    plain = accumulator_bounds(weight, geometry, (1, 1), (0, 3))
    middle = accumulator_bounds(weight, geometry, (1, 1), (0, 3), pad_value=2)
    assert (plain.channel_minimum.tolist(), plain.channel_maximum.tolist()) == ([0], [0])
    assert (middle.channel_minimum.tolist(), middle.channel_maximum.tolist()) == ([4], [4])


def test_a_pad_value_outside_the_range_lets_the_border_exceed_the_interior():
    weight = np.ones((1, 1, 3, 3), np.int64)
    bounds = accumulator_bounds(weight, ConvGeometry.of((3, 3), padding=1), (5, 5), (0, 1), pad_value=10)
    assert bounds.maximum_position(0) == (0, 0)
    assert bounds.channel_maximum.tolist() == [5 * 10 + 4]
    assert bounds.maximum[0, 2, 2] == 9


def test_other_integer_dtypes_and_lists_have_the_same_bounds():
    geometry = ConvGeometry.of((2, 2))
    values = [[[[200, 1], [0, 3]]]]
    expected = accumulator_bounds(np.array(values), geometry, (3, 3), (-2, 5), bias=np.array([7]))
    for weight in (np.array(values, np.uint8), torch.tensor(values, dtype=torch.int16), values):
        bounds = accumulator_bounds(weight, geometry, (3, 3), (-2, 5), bias=np.array([7], np.uint8))
        assert bounds.minimum.dtype == np.int64
        np.testing.assert_array_equal(bounds.minimum, expected.minimum)
        np.testing.assert_array_equal(bounds.maximum, expected.maximum)


@given(problem=integer_layers())
def test_offset_form_is_never_wider_than_twos_complement(problem):
    layer, spatial = problem
    bounds = layer_bounds(layer, spatial)
    assert bounds.offset_bits <= bounds.twos_complement_bits
    whole = np.array([int(s) for s in bounds.channel_span])
    assert (whole < 2**bounds.offset_bits).all()
    assert bounds.offset_bits == 0 or (whole >= 2 ** (bounds.offset_bits - 1)).any()


@given(st.integers(-(2**40), 2**40), st.integers(0, 2**40))
def test_the_twos_complement_width_is_the_least_that_holds_both_ends(minimum, length):
    maximum = minimum + length

    def holds(bits):
        if bits == 0:  # no bit, one value
            return minimum == maximum == 0
        low, high = (0, 2**bits - 1) if minimum >= 0 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return low <= minimum and maximum <= high

    bits = twos_complement_bits(minimum, maximum)
    assert holds(bits)
    assert bits == 0 or not holds(bits - 1)


@pytest.mark.parametrize(
    ("minimum", "maximum", "bits"),
    [
        (0, 0, 0),
        (0, 1, 1),
        (0, 127, 7),
        (0, 128, 8),
        (-1, -1, 1),
        (-1, 0, 1),
        (-1, 1, 2),
        (-128, 127, 8),
        (-129, 0, 9),
    ],
)
def test_widths_everybody_knows(minimum, maximum, bits):
    assert twos_complement_bits(minimum, maximum) == bits


def test_fourteen_taps_of_two_bits_in_seven():
    assert fheconv.max_taps(input_bits=2, weight_bits=2, accumulator_bits=7) == 14


@given(st.integers(1, 16), st.integers(1, 8), st.integers(1, 40))
def test_as_many_taps_fit_and_not_one_more(input_bits, weight_bits, accumulator_bits):
    taps = fheconv.max_taps(input_bits=input_bits, weight_bits=weight_bits, accumulator_bits=accumulator_bits)
    greatest = (2**input_bits - 1) * (2**weight_bits - 1)
    assert taps * greatest < 2**accumulator_bits <= (taps + 1) * greatest
    # The same, through the exact bounds of a filter with that many of the greatest weights.
    if 0 < taps <= 100:
        for count, fits in ((taps, True), (taps + 1, False)):
            weight = np.full((1, 1, count), 2**weight_bits - 1)
            bounds = accumulator_bounds(weight, ConvGeometry.of((count,)), (count,), (0, 2**input_bits - 1))
            assert (bounds.offset_bits <= accumulator_bits) == fits


@pytest.mark.parametrize("name", ["input_bits", "weight_bits", "accumulator_bits"])
@pytest.mark.parametrize("bits", [0, -1, 2.0, "2", None, True])
def test_widths_that_are_no_positive_integers_are_refused(name, bits):
    widths = {"input_bits": 2, "weight_bits": 2, "accumulator_bits": 7, name: bits}
    with pytest.raises(InvalidArgumentError, match=name):
        fheconv.max_taps(**widths)


@pytest.mark.parametrize(
    ("weight", "input_range", "options", "words"),
    [
        (np.full((1, 1, 1, 1), 0.5), (0, 1), {}, "weight has dtype float64"),
        (np.ones((1, 1, 1, 1), int), (0, 1), {"bias": np.array([0.5])}, "bias has dtype"),
        (np.ones((1, 1, 1, 1), int), (3, -1), {}, r"input_range=\(3, -1\)"),
        (np.ones((1, 1, 1, 1), int), (0, 1.5), {}, "input_range"),
        (np.ones((1, 1, 1, 1), int), (0, 1), {"pad_value": 0.5}, "pad_value=0.5"),
    ],
)
def test_bounds_of_nonsense_are_refused(weight, input_range, options, words):
    with pytest.raises(InvalidArgumentError, match=words):
        accumulator_bounds(weight, ConvGeometry.of((1, 1)), (1, 1), input_range, **options)


@pytest.mark.parametrize(
    ("weight", "input_range"),
    [
        (2**32, (0, 2**31)),
        (1, (0, 2**63)),
        (1, (-1, 2**63)),  # numpy makes floats of these two
        (1, (-(2**62) - 2, 2**62)),  # both ends fit, the span does not
    ],
)
def test_bounds_past_int64_are_refused_not_wrapped(weight, input_range):
    with pytest.raises(AccumulatorOverflowError, match=r"2\*\*63") as refusal:
        accumulator_bounds(np.array([[[[weight]]]]), ConvGeometry.of((1, 1)), (1, 1), input_range)
    assert refusal.value.value >= 2**63 > refusal.value.limit


@given(st.integers(1, 61), st.integers(0, 2**32))
def test_bounds_are_exact_up_to_int64(exponent, seed):
    """Python's own integers are the oracle."""
    rng = np.random.default_rng(seed)
    half = exponent // 2
    weight = rng.integers(-(2**half), 2**half, (1, 1, 1, 2), endpoint=True)
    low, high = sorted(
        rng.integers(-(2 ** (exponent - half - 1)), 2 ** (exponent - half - 1), 2, endpoint=True).tolist()
    )
    bounds = accumulator_bounds(weight, ConvGeometry.of((1, 2)), (1, 2), (low, high))
    products = [sorted((w * low, w * high)) for w in weight.ravel().tolist()]
    assert bounds.channel_minimum.tolist() == [sum(least for least, _ in products)]
    assert bounds.channel_maximum.tolist() == [sum(greatest for _, greatest in products)]
    assert bounds.offset_bits == sum(b - a for a, b in products).bit_length()


@pytest.mark.parametrize(
    ("weight", "bias", "words"),
    [
        (np.ones((1, 1, 3, 2), int), None, "weight has shape"),
        (np.ones((1, 1, 3), int), None, "weight has shape"),
        (np.ones((0, 1, 3, 3), int), None, "out_channels"),
        (np.ones((1, 1, 3, 3), int), np.zeros(3, int), "bias has shape"),
        (np.ones((2, 1, 3, 3), int), np.zeros(1, int), "bias has shape"),
    ],
)
def test_a_weight_or_bias_that_does_not_go_with_the_geometry_is_refused(weight, bias, words):
    with pytest.raises(InvalidArgumentError, match=words):
        accumulator_bounds(weight, ConvGeometry.of((3, 3)), (5, 5), (0, 3), bias=bias)
