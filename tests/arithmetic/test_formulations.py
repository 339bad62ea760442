import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fheconv
from fheconv.arithmetic import conv, conv_gradients, conv_transpose
from fheconv.basics.errors import AccumulatorOverflowError, InvalidArgumentError
from tests.support.strategies import conv_problems

METHODS = [None, "torch", "loops", "shifts", "im2col", "tensordot", "matrix"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@given(problem=conv_problems())
def test_every_formulation_is_torchs_convolution(method, layout, problem):
    x, weight = problem.x, problem.weight
    if layout == "NHWC":
        x, weight = np.moveaxis(x, 1, -1), np.moveaxis(weight, (0, 1), (-1, -2))
    y = conv(x, weight, problem.bias, method=method, layout=layout, **problem.options)
    if layout == "NHWC":
        y = np.moveaxis(y, -1, 1)
    expected = problem.torch_output()
    if problem.x.dtype.kind == "i":
        assert y.dtype == np.int64
        np.testing.assert_array_equal(y, expected)
    else:
        assert y.dtype == problem.x.dtype
        np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_flipping_the_kernel(method):
    rng = np.random.default_rng(0)
    x, weight = rng.integers(-9, 9, (1, 2, 6, 5)), rng.integers(-9, 9, (3, 2, 3, 2))
    turned = weight[:, :, ::-1, ::-1]
    np.testing.assert_array_equal(
        conv(x, weight, flip_kernel=True, method=method), conv(x, turned, method=method)
    )


@pytest.mark.parametrize("method", METHODS)
@given(exponent=st.integers(5, 58), seed=st.integers(0, 2**32))
def test_integers_are_exact_through_every_dtype(method, exponent, seed):
    """Products around 2²⁴, 2⁵³ and up to 2⁶²: Python's own integers are the oracle."""
    rng = np.random.default_rng(seed)
    left = exponent // 2
    x = rng.integers(-(2**left), 2**left, (1, 2, 3, 3))
    weight = rng.integers(-(2 ** (exponent - left)), 2 ** (exponent - left), (1, 2, 2, 2))
    y = conv(x, weight, method=method)
    for i, j in np.ndindex(2, 2):
        window = x[0, :, i : i + 2, j : j + 2].ravel().tolist()
        assert y[0, 0, i, j] == sum(a * b for a, b in zip(window, weight.ravel().tolist(), strict=True))


def test_integers_past_int64_are_refused_not_wrapped():
    with pytest.raises(AccumulatorOverflowError, match="2\\*\\*63"):
        conv(np.full((1, 1, 2, 2), 2**40), np.full((1, 1, 2, 2), 2**30))


@given(problem=conv_problems(dtypes=["float64", "int64"]))
def test_gradients_are_autograds(problem):
    x, weight, bias = (
        torch.tensor(a, dtype=torch.float64, requires_grad=True)
        for a in (problem.x, problem.weight, problem.bias)
    )
    function = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}[x.ndim]
    y = function(x, weight, bias, **problem.options)
    grad = torch.randint(-9, 9, y.shape, dtype=torch.int64)
    y.backward(grad.double())
    ours = conv_gradients(grad, problem.x, problem.weight, **problem.options)
    for mine, theirs in zip(ours, (x.grad, weight.grad, bias.grad), strict=True):
        if problem.x.dtype.kind == "i":
            np.testing.assert_array_equal(mine, theirs)
        else:
            np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-9)


@given(problem=conv_problems(), data=st.data())
def test_transposed_convolution_is_torchs(problem, data):
    options, d = problem.options, problem.x.ndim - 2
    extra = [
        data.draw(st.integers(0, max(s, e) - 1))
        for s, e in zip(options["stride"], options["dilation"], strict=True)
    ]
    sizes = [data.draw(st.integers(2, 5)) for _ in range(d)]
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 9, (2, len(problem.weight), *sizes))
    channels = problem.weight.shape[1] * options["groups"]
    bias = rng.integers(-9, 9, channels)
    function = [torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d][d - 1]
    arguments = (torch.tensor(a, dtype=torch.float64) for a in (x, problem.weight, bias))
    try:
        expected = function(
            *arguments,
            options["stride"],
            options["padding"],
            extra,
            options["groups"],
            options["dilation"],
        )
    except RuntimeError:  # torch: the output would be empty
        with pytest.raises(InvalidArgumentError, match="reaches over"):
            conv_transpose(x, problem.weight, bias, output_padding=extra, **options)
        return
    y = conv_transpose(x, problem.weight, bias, output_padding=extra, **options)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (((1, 5, 5), (1, 1, 3, 3)), {}, "same number of axes"),
        (((1, 2, 5, 5), (1, 1, 3, 3)), {}, "2 channels"),
        (((1, 1, 5, 5), (1, 1, 3, 3)), {"method": "fft"}, "fft"),
        (((1, 1, 5, 5), (1, 1, 3, 3)), {"layout": "HWCN"}, "HWCN"),
        (((1, 1, 5, 5), (1, 1, 3, 3)), {"bias": np.zeros(2)}, "bias has shape"),
        (((1, 1, 5, 5), (1, 1, 6, 3)), {}, "reaches over 6"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, options, words):
    with pytest.raises(InvalidArgumentError, match=words):
        conv(*(np.zeros(shape) for shape in arguments), **options)


def test_a_gradient_of_the_wrong_shape_and_a_weight_of_other_channels_are_refused():
    with pytest.raises(InvalidArgumentError, match="grad_output"):
        conv_gradients(np.zeros((1, 1, 2, 2)), np.zeros((1, 1, 5, 5)), np.zeros((1, 1, 3, 3)))
    with pytest.raises(InvalidArgumentError, match="in_channels"):
        conv_transpose(np.zeros((1, 2, 5, 5)), np.zeros((1, 1, 3, 3)))
    with pytest.raises(InvalidArgumentError, match="output_padding=2"):
        conv_transpose(np.zeros((1, 1, 5, 5)), np.zeros((1, 1, 3, 3)), stride=2, output_padding=2)


@pytest.mark.parametrize("groups", [1, 2])
def test_an_empty_batch_has_empty_results_and_gradients_of_zero(groups):
    x, weight = np.zeros((0, 2, 5, 4)), np.ones((4, 2 // groups, 3, 2))
    for method in METHODS:
        assert conv(x, weight, method=method, groups=groups).shape == (0, 4, 3, 3)
    grad_x, grad_weight, grad_bias = conv_gradients(np.zeros((0, 4, 3, 3)), x, weight, groups=groups)
    assert grad_x.shape == x.shape
    np.testing.assert_array_equal(grad_weight, np.zeros_like(weight))
    np.testing.assert_array_equal(grad_bias, np.zeros(4))
    assert conv_transpose(np.zeros((0, 4, 3, 3)), weight, groups=groups).shape == (0, 2, 5, 4)


@pytest.mark.parametrize("axes", [1, 2, 3])
@given(seed=st.integers(0, 2**31))
def test_unequal_paddings_of_a_transposed_convolution_cut_torchs_result(axes, seed):
    """torch cuts both ends alike, so its uncut result is cut here."""
    rng = np.random.default_rng(seed)
    stride, dilation = rng.integers(1, 4, axes), rng.integers(1, 3, axes)
    extra = [int(rng.integers(0, max(s, d))) for s, d in zip(stride, dilation, strict=True)]
    cuts = rng.integers(0, 3, (axes, 2)).tolist()
    x, weight = rng.integers(-9, 9, (2, 4, *[4] * axes)), rng.integers(-9, 9, (4, 3, *[3] * axes))
    options = {"stride": stride.tolist(), "dilation": dilation.tolist(), "output_padding": extra, "groups": 2}
    function = [torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d][axes - 1]
    uncut = function(torch.tensor(x), torch.tensor(weight), **options).numpy()
    inside = tuple(slice(low, size - high) for (low, high), size in zip(cuts, uncut.shape[2:], strict=True))
    expected = uncut[:, :, *inside]
    np.testing.assert_array_equal(conv_transpose(x, weight, padding=cuts, **options), expected)
    matrix = fheconv.filter_matrix(weight, x.shape[1:], padding=cuts, transposed=True, **options)
    np.testing.assert_array_equal((x.reshape(2, -1) @ matrix).reshape(expected.shape), expected)


def test_options_that_a_transposed_or_direct_convolution_lacks_are_refused():
    weight = np.ones((1, 1, 2, 2))
    for options, words in (
        ({"transposed": True, "padding": "same"}, "not transposed"),
        ({"transposed": True, "padding_mode": "reflect"}, '"zeros" only'),
        ({"output_padding": 1}, "transposed convolutions only"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            fheconv.Conv.of(weight, **options)
        with pytest.raises(InvalidArgumentError, match=words):
            fheconv.filter_matrix(weight, (1, 4, 4), **options)


def test_half_precision_is_summed_in_single():
    x, weight = np.full((1, 1, 3, 3), 100, np.int8), np.full((1, 1, 3, 3), 100, np.int8)
    assert conv(x, weight, np.zeros(1, np.float16)).item() == 90000
    half = x.astype(np.float16) / 8
    for method in METHODS:
        assert conv(half, half, method=method).dtype == np.float16
    assert conv_transpose(half, half).shape == (1, 1, 5, 5)


def test_a_bias_gradient_past_int64_is_refused_not_wrapped():
    with pytest.raises(AccumulatorOverflowError):
        conv_gradients(np.full((1, 1, 2, 2), 2**62), np.zeros((1, 1, 2, 2), int), np.zeros((1, 1, 1, 1), int))
