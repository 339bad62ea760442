"""Every function of one variable computes what torch's operator of that name does."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fheconv.networks.expression import ELEMENTWISE, FUNCTIONS, Expression, X

torch.set_num_threads(1)

# Values around the places where functions have corners, and all over.
VALUES = np.concatenate([np.linspace(-8, 8, 161), [-100.0, 100.0], np.random.default_rng(0).normal(size=200)])
TWO = {
    "add", "clamp_max", "clamp_min", "div", "eq", "floor_divide", "fmod", "ge", "gt", "le", "logical_and",
    "logical_or", "lt", "maximum", "minimum", "mul", "ne", "pow", "prelu", "remainder", "rsub", "sub",
    "and", "or",
}  # fmt: skip
QUANTIZERS = {"fake_quantize_per_tensor_affine", "quantize_per_tensor", "dequantize_per_tensor"}
OTHER = {"clamp", "threshold", "where"} | QUANTIZERS
ONE = sorted(set(ELEMENTWISE) - TWO - OTHER)
small = st.floats(-3, 3, allow_subnormal=False).map(lambda v: round(v, 3))
positive = st.floats(0.05, 3).map(lambda v: round(v, 3))


def operator(name):
    if name in ("softsign", "tanhshrink"):
        return getattr(torch.nn.functional, name)
    return getattr(torch.ops.aten, f"__{name}__" if name in ("and", "or") else name)


def compare(name, *arguments, **options):
    """The expression of these arguments, X among them, against torch's operator."""
    tensors = [torch.tensor(VALUES) if argument is X else argument for argument in arguments]
    if name in ("and", "or", "logical_and", "logical_or", "logical_not"):
        tensors = [t != 0 if isinstance(t, torch.Tensor) else bool(t) for t in tensors]
    if name in ("maximum", "minimum", "logical_and", "logical_or", "prelu", "where"):
        tensors = [torch.as_tensor(t, dtype=None if isinstance(t, bool) else torch.float64) for t in tensors]
    if name == "where":
        tensors[0] = tensors[0] != 0
    if name == "prelu":
        tensors[1] = tensors[1].reshape(1)
    expected = operator(name)(*tensors, **options).double().numpy()
    y = Expression(name, arguments, tuple(options.items()))(VALUES)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ONE)
def test_functions_without_options(name):
    compare(name, X)


@pytest.mark.parametrize("name", sorted(TWO))
@given(number=small)
def test_functions_with_a_number(name, number):
    compare(name, X, number)


@pytest.mark.parametrize("name", sorted(TWO - {"clamp_max", "clamp_min", "prelu", "rsub"}))
@given(number=small)
def test_functions_of_a_number_and_the_variable(name, number):
    if name in ("add", "sub", "mul", "div", "maximum", "minimum"):
        tensor, x = torch.tensor(number, dtype=torch.float64), torch.tensor(VALUES)
        expected = operator(name)(tensor, x).numpy()
        np.testing.assert_allclose(Expression(name, (number, X))(VALUES), expected, rtol=1e-9)


@given(low=st.none() | small, high=st.none() | small, number=small)
def test_clamp_and_threshold_and_where(low, high, number):
    if low is not None or high is not None:
        compare("clamp", X, low, high)
    compare("threshold", X, number, low or 0.0)
    y = Expression("where", (Expression("gt", (X, number)), X, low or 0.0))(VALUES)
    x = torch.tensor(VALUES)
    np.testing.assert_array_equal(y, torch.where(x > number, x, low or 0.0).numpy())


@given(alpha=small, scale=positive, second=positive)
def test_functions_with_options(alpha, scale, second):
    compare("elu", X, alpha, scale, second)
    compare("celu", X, scale)
    compare("leaky_relu", X, alpha)
    compare("softplus", X, scale, second)
    compare("hardshrink", X, scale)
    compare("softshrink", X, scale)
    compare("hardtanh", X, -scale, second)
    compare("add", X, second, alpha=alpha)
    compare("sub", X, second, alpha=alpha)
    compare("rsub", X, second, alpha=alpha)
    for approximate in ("none", "tanh"):
        compare("gelu", X, approximate=approximate)
    for rounding_mode in (None, "floor", "trunc"):
        compare("div", X, second, rounding_mode=rounding_mode)


@given(st.lists(st.sampled_from(["relu", "sigmoid", "square", "neg", "tanh", "abs"]), min_size=1, max_size=4))
def test_functions_compose(names):
    whole, y = X, VALUES
    for name in names:
        whole = Expression(name, (X,)).of(whole)
        y = FUNCTIONS[name](y)
    np.testing.assert_array_equal(whole(VALUES), y)
    assert str(whole).startswith(names[-1] + "(")
    assert str(whole).count("x") == 1 + "".join(names).count("x")


def test_the_inner_function_takes_every_place_of_the_variable():
    swish = Expression("mul", (X, Expression("sigmoid", (X,))))
    inner = Expression("add", (X, 3.0), (("alpha", 2),))
    np.testing.assert_allclose(swish.of(inner)(VALUES), (VALUES + 6) / (1 + np.exp(-VALUES - 6)), rtol=1e-12)
    assert swish.of(X)(VALUES) is not None
    assert X.of(inner) is inner
    assert str(swish.of(inner)) == "mul(add(x, 3, alpha=2), sigmoid(add(x, 3, alpha=2)))"


def test_formulas_read_well():
    assert str(X) == "x"
    assert str(Expression("clamp", (X, None, 1.5))) == "clamp(x, None, 1.5)"
    assert str(Expression("mul", (X, np.ones((4, 1, 1))))) == "mul(x, …)"
    assert str(Expression("gelu", (X,), (("approximate", "tanh"),))) == "gelu(x, approximate=tanh)"
    assert str(Expression("relu", (Expression("mul", (X, 1 / 3)),))) == "relu(mul(x, 0.333333))"


def test_arrays_hold_one_number_a_channel():
    slopes = np.array([0.1, 0.2]).reshape(2, 1, 1)
    x = np.random.default_rng(0).normal(size=(3, 2, 4, 4))
    expected = torch.nn.functional.prelu(torch.tensor(x), torch.tensor([0.1, 0.2], dtype=torch.float64))
    np.testing.assert_allclose(Expression("prelu", (X, slopes))(x), expected.numpy())


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_what_the_client_computes(name):
    x = np.random.default_rng(0).normal(size=(3, 4, 5))
    for axis in (1, 2):
        expected = getattr(torch, name)(torch.tensor(x), axis)
        np.testing.assert_allclose(Expression(name, (X,), (("axis", axis),))(x), expected, rtol=1e-12)


def test_argmax():
    x = np.random.default_rng(0).normal(size=(3, 4, 5))
    y = Expression("argmax", (X,), (("axis", 1), ("keepdims", True)))(x)
    np.testing.assert_array_equal(y, torch.tensor(x).argmax(1, keepdim=True))
    assert y.dtype == np.float64


def test_values_outside_a_functions_domain_are_not_finite_and_warn_of_nothing():
    assert not np.isfinite(Expression("log", (X,))(np.array([-1.0, 0.0]))).any()
    assert np.isinf(Expression("div", (1.0, X))(np.zeros(1))).all()


@given(scale=positive, zero_point=st.integers(-3, 12), low=st.integers(-4, 0), levels=st.integers(4, 16))
def test_fake_quantization(scale, zero_point, low, levels):
    """Against torch in float32, with numbers that float32 holds exactly, half steps among them."""
    scale = float(np.float32(2.0 ** round(np.log2(scale))))
    values = np.round(VALUES * 64) / 64
    zero_point = min(max(zero_point, low), low + levels)
    expected = torch.fake_quantize_per_tensor_affine(
        torch.tensor(values, dtype=torch.float32), scale, zero_point, low, low + levels
    )
    arguments = (X, scale, zero_point, low, low + levels)
    y = Expression("fake_quantize_per_tensor_affine", arguments)(values)
    np.testing.assert_array_equal(y, expected.double().numpy())
    quantized = Expression("quantize_per_tensor", arguments)
    real = Expression("dequantize_per_tensor", (quantized, scale, zero_point))
    np.testing.assert_array_equal(real(values), y)
    assert (low <= quantized(values)).all()
    assert (quantized(values) <= low + levels).all()
