"""What is read off functions that round: the function itself is the oracle."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fheconv.networks.expression import Expression, X
from fheconv.networks.grids import trained_quantization

RELU = Expression("relu", (X,))


def e(name, *arguments, **options):
    return Expression(name, arguments, tuple(options.items()))


def clamp_by_where(x, low, high):
    x = e("where", e("gt", x, float(high)), float(high), x)
    return e("where", e("lt", x, float(low)), float(low), x)


WAYS = {
    "fake_quantize": lambda x, s, z, lo, hi: e("fake_quantize_per_tensor_affine", x, s, z, lo, hi),
    "decomposed": lambda x, s, z, lo, hi: e(
        "dequantize_per_tensor", e("quantize_per_tensor", x, s, z, lo, hi), s, z
    ),
    "clamp": lambda x, s, z, lo, hi: e(
        "mul", e("sub", e("clamp", e("add", e("round", e("div", x, s)), z), lo, hi), z), s
    ),
    "where": lambda x, s, z, lo, hi: e(
        "mul", s, e("add", clamp_by_where(e("round", e("add", e("div", x, s), z)), lo, hi), -z)
    ),
    "clamp first": lambda x, s, z, lo, hi: e(
        "div", e("round", e("clamp", e("mul", x, 1 / s), lo - z, hi - z)), 1 / s
    ),
    "negated": lambda x, s, z, lo, hi: e(
        "neg", e("mul", e("rsub", e("clamp", e("add", e("round", e("div", x, s)), z), lo, hi), z), s)
    ),
}


@pytest.mark.parametrize("way", WAYS)
@given(st.data())
def test_the_numbers_that_a_function_gives_are_those_of_its_quantization(way, data):
    scale = float(np.float32(data.draw(st.floats(1e-3, 1e3))))
    low = data.draw(st.integers(-128, 10))
    high = low + data.draw(st.integers(1, 255))
    zero = data.draw(st.integers(low, high - 1))  # so that more than 0 is left behind a ReLU
    relu = data.draw(st.booleans())
    function = WAYS[way](RELU if relu else X, scale, zero, low, high)
    found = trained_quantization(function)
    values = np.linspace(-300 * scale, 300 * scale, 4001)
    results = function(values)
    assert found is not None
    np.testing.assert_allclose(found.real(found.nearest(results)), results, atol=1e-5 * scale * 256)
    ends = [scale * (end - zero) for end in (low, high)]
    if not relu:
        np.testing.assert_allclose(found.real_range, ends, rtol=1e-6)
    assert found.real(np.array(found.zero_point)) == 0


@pytest.mark.parametrize(
    "function",
    [
        X, RELU, e("round", X), e("clamp", X, 0.0, 6.0), e("add", e("clamp", e("round", X), 0, 7), 0.5),
        e("fake_quantize_per_tensor_affine", X, 0.1, 0, 0, 256), e("tanh", e("clamp", e("round", X), 0, 3)),
        e("clamp", e("round", X), 0.5, 7.0), e("where", e("gt", e("round", X), 3.0), 4.0, e("round", X)),
        e("fake_quantize_per_tensor_affine", X, np.array([[0.1], [0.2]]), 0, 0, 7),
    ],
)  # fmt: skip
def test_a_function_with_other_numbers_has_none(function):
    assert trained_quantization(function) is None


def test_a_clamp_or_relu_after_rounding_leaves_fewer_numbers():
    rounded = e("fake_quantize_per_tensor_affine", X, 0.5, 4, 0, 15)
    assert trained_quantization(e("relu", rounded)).real_range == (0, 5.5)
    assert trained_quantization(e("clamp", rounded, -1.0, 2.0)).real_range == (-1, 2)


@pytest.mark.parametrize(
    "function",
    [
        e("where", e("ge", X, 0.0), 1.0, -1.0),
        e("sub", e("mul", e("gt", X, 0.0), 2.0), 1.0),
        e("sign", X),
        e("where", e("gt", X, 0.5), 0.0, 2.0),
    ],
    ids=str,
)
def test_functions_of_two_numbers_have_their_middle_too_if_it_is_0(function):
    found, values = trained_quantization(function), np.linspace(-2, 2, 41)
    np.testing.assert_array_equal(found.real(found.nearest(function(values))), function(values))
    assert found.scale == np.abs(function(values)).max()
    assert found.maximum == 2 - (function(values) >= 0).all()
