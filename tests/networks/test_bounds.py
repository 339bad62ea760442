import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fheconv
from fheconv.arithmetic import ConvGeometry
from fheconv.basics.errors import AccumulatorOverflowError, InvalidArgumentError
from fheconv.networks.bounds import accumulator_bounds, layer_bounds, twos_complement_bits, worst_case_inputs
from fheconv.networks.linear import Kernel, Select, Term
from fheconv.networks.quantization import Quantization
from tests.support.strategies import integer_layer, integer_layers, integer_sums


def all_layers(**options):
    """Integer layers of one convolution or of several terms, and the shapes of the tensors they read."""
    return integer_layers(**options).map(lambda p: (p[0], (p[1],))) | integer_sums(**options)


def accumulators(layer, tensors):
    """The oracle: torch, padded with the zero-point before the first convolution, exact in double."""
    total = torch.tensor(np.broadcast_to(layer.bias, layer.shape)).double()
    for term, quantization in zip(layer.terms, layer.inputs, strict=True):
        x, zero = torch.tensor(tensors[term.source]).double(), float(quantization.zero_point)
        for step in term.steps:
            if isinstance(step, Select):
                outside = torch.full((len(x), 1), zero, dtype=torch.float64)  # the last one, number -1
                x = torch.cat([x.reshape(len(x), -1), outside], dim=1)[:, torch.tensor(step.index)]
                continue
            geometry = step.geometry
            (top, bottom), (left, right) = geometry.padding
            x = torch.nn.functional.pad(x, (left, right, top, bottom), value=zero)
            weight = torch.tensor(step.weight).double()
            x = torch.conv2d(x, weight, None, geometry.stride, 0, geometry.dilation, geometry.groups)
            zero = 0.0
        total = total + x
    return total.numpy()


def corners(layer, shapes):
    """Every choice of the least and the greatest value for each value that the layer may read."""
    ranges = dict(zip(layer.sources, layer.inputs, strict=True))
    used = sorted(ranges)
    ends = [(ranges[s].minimum, ranges[s].maximum) for s in used for _ in range(math.prod(shapes[s]))]
    flat = np.array(list(product(*ends))).reshape(-1, len(ends))
    parts = np.split(flat, np.cumsum([math.prod(shapes[s]) for s in used])[:-1], axis=1)
    tensors = {s: part.reshape(-1, *shapes[s]) for s, part in zip(used, parts, strict=True)}
    return [tensors.get(s) for s in range(len(shapes))]


@given(all_layers(most_pixels=10))
def test_all_corner_images_together_reach_the_bounds_of_every_position_and_no_more(problem):
    layer, shapes = problem
    bounds = layer_bounds(layer, shapes)
    y = accumulators(layer, corners(layer, shapes))
    # An accumulator is linear in each pixel, so that its extremes lie in the corners.
    np.testing.assert_array_equal(bounds.minimum, y.min(axis=0))
    np.testing.assert_array_equal(bounds.maximum, y.max(axis=0))
    np.testing.assert_array_equal(bounds.channel_minimum, y.min(axis=(0, 2, 3)))
    np.testing.assert_array_equal(bounds.channel_maximum, y.max(axis=(0, 2, 3)))


@given(problem=all_layers(), seed=st.integers(0, 2**32))
def test_no_image_leaves_the_bounds(problem, seed):
    layer, shapes = problem
    bounds = layer_bounds(layer, shapes)
    rng = np.random.default_rng(seed)
    ranges = dict(zip(layer.sources, layer.inputs, strict=True))
    tensors = [
        rng.integers(ranges[s].minimum, ranges[s].maximum + 1, (50, *shape)) if s in ranges else None
        for s, shape in enumerate(shapes)
    ]
    y = accumulators(layer, tensors)
    assert bounds.minimum.shape == bounds.maximum.shape == y.shape[1:]
    assert (bounds.minimum <= y).all()
    assert (y <= bounds.maximum).all()
    np.testing.assert_array_equal(layer.accumulate(tensors), y)


@given(integer_sums())
def test_the_signs_of_each_column_say_what_reaches_the_bounds_of_its_accumulator(problem):
    """Terms that read one tensor are one column: what one adds the other may take away."""
    layer, shapes = problem
    bounds = layer_bounds(layer, shapes)
    columns = dict.fromkeys(layer.sources, 0)
    for term in layer.terms:
        columns[term.source] = columns[term.source] + term.matrix(shapes[term.source]).toarray()
    ranges = dict(zip(layer.sources, layer.inputs, strict=True))
    for bound, sign in ((bounds.minimum, -1), (bounds.maximum, 1)):
        tensors = [None] * len(shapes)
        for s, matrix in columns.items():
            values = np.where(sign * matrix.T > 0, ranges[s].maximum, ranges[s].minimum)
            tensors[s] = values.reshape(-1, *shapes[s])
        # Image number i is made for accumulator i.
        y = accumulators(layer, tensors).reshape(bound.size, bound.size)
        np.testing.assert_array_equal(y.diagonal(), bound.ravel())


@given(problem=integer_sums(), seed=st.integers(0, 2**32))
def test_bounds_do_not_depend_on_the_order_of_the_terms_nor_on_how_they_are_written(problem, seed):
    layer, shapes = problem
    bounds = layer_bounds(layer, shapes)
    order = np.random.default_rng(seed).permutation(len(layer.terms))
    turned = replace(
        layer,
        terms=tuple(layer.terms[i] for i in order),
        inputs=tuple(layer.inputs[i] for i in order),
    )
    # An identity before and after leaves a term as it is.
    longer = replace(
        layer,
        terms=tuple(
            replace(term, steps=(identity(shapes[term.source]), *term.steps, identity(layer.shape)))
            for term in layer.terms
        ),
    )
    for other in (turned, longer):
        again = layer_bounds(other, shapes)
        np.testing.assert_array_equal(again.minimum, bounds.minimum)
        np.testing.assert_array_equal(again.maximum, bounds.maximum)


def identity(shape):
    return Select(index=np.arange(math.prod(shape)).reshape(shape))


def test_what_two_terms_add_and_take_away_of_one_tensor_is_not_counted_twice():
    """x + x spans 6 and x − x nothing, x + y and x − y span 6 whatever they read: 0 to 3 each."""
    kernel = Kernel(weight=np.ones((1, 1, 1, 1), np.int64), geometry=ConvGeometry.of((1, 1)))
    minus = replace(kernel, weight=-kernel.weight)
    quantization = Quantization(scale=1.0, zero_point=0, minimum=0, maximum=3)

    def span(first, second, source):
        terms = (Term(source=0, steps=(first,)), Term(source=source, steps=(second,)))
        layer = integer_layer(terms, [quantization] * 2, [(1, 1, 1)] * 2, np.random.default_rng(0))
        bounds = layer_bounds(replace(layer, bias=np.zeros((1, 1, 1), np.int64)), [(1, 1, 1)] * 2)
        return bounds.channel_minimum.item(), bounds.channel_maximum.item()

    assert span(kernel, kernel, 0) == (0, 6)
    assert span(kernel, minus, 0) == (0, 0)
    assert span(kernel, kernel, 1) == (0, 6)
    assert span(kernel, minus, 1) == (-3, 3)


@given(integer_layers())
def test_worst_case_inputs_reach_both_ends_of_every_channel(problem):
    layer, shape = problem
    (quantization,) = layer.inputs
    bounds = layer_bounds(layer, [shape])
    images = worst_case_inputs(layer, shape, bounds)
    assert images.shape == (2 * layer.shape[0], *shape)
    assert set(images.ravel()) <= {quantization.minimum, quantization.maximum}
    y = accumulators(layer, [images])
    for c in range(layer.shape[0]):
        least, greatest = bounds.minimum_position(c), bounds.maximum_position(c)
        assert y[(2 * c, c, *least)] == bounds.channel_minimum[c]
        assert y[(2 * c + 1, c, *greatest)] == bounds.channel_maximum[c]
        assert bounds.channel_minimum[c] == y[2 * c, c].min()
        assert bounds.channel_maximum[c] == y[2 * c + 1, c].max()


def test_worst_case_inputs_are_those_of_a_single_convolution():
    kernel = Kernel(weight=np.ones((1, 1, 1, 1), np.int64), geometry=ConvGeometry.of((1, 1)))
    quantization = Quantization(scale=1.0, zero_point=0, minimum=0, maximum=3)
    layer = integer_layer(
        [Term(source=0, steps=(kernel,))] * 2, [quantization] * 2, [(1, 2, 2)], np.random.default_rng(0)
    )
    with pytest.raises(InvalidArgumentError, match="Layer 'conv' is not one convolution"):
        worst_case_inputs(layer, (1, 2, 2), layer_bounds(layer, [(1, 2, 2)]))


@given(all_layers())
def test_the_positions_named_are_the_first(problem):
    layer, shapes = problem
    bounds = layer_bounds(layer, shapes)
    for c in range(layer.shape[0]):
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


@given(problem=all_layers())
def test_offset_form_is_never_wider_than_twos_complement(problem):
    layer, shapes = problem
    bounds = layer_bounds(layer, shapes)
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
