import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

import fheconv
from fheconv.arithmetic import filter_matrix
from fheconv.basics.errors import AccumulatorOverflowError, InvalidArgumentError
from tests.support.strategies import conv_problems


@given(conv_problems(), st.sampled_from(["dense", "csr"]))
def test_the_product_with_the_matrix_is_torchs_convolution(problem, kind):
    matrix = filter_matrix(problem.weight, problem.x.shape[1:], format=kind, **problem.options)
    expected = problem.torch_output() - problem.bias.reshape(-1, *[1] * (problem.x.ndim - 2))
    x = problem.x.reshape(len(problem.x), np.prod(problem.x.shape[1:])).astype(np.float64)
    np.testing.assert_allclose(
        x @ matrix, expected.reshape(len(x), np.prod(expected.shape[1:])), rtol=1e-4, atol=1e-4
    )
    assert matrix.dtype == problem.weight.dtype
    assert isinstance(matrix, np.ndarray if kind == "dense" else scipy.sparse.csr_array)


def test_the_worked_example():
    x = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    matrix = filter_matrix([[1, 2], [3, 4]], (3, 3))
    assert matrix.shape == (9, 4)
    assert (x.reshape(1, -1) @ matrix).tolist() == [[37, 47, 67, 77]]
    other = filter_matrix([[1, 2], [4, 5]], (3, 3))
    assert (x.reshape(1, -1) @ other).tolist() == [[46, 58, 82, 94]]


def test_flipping_the_kernel_is_the_mathematicians_convolution():
    x = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    flipped = filter_matrix([[1, 2], [4, 5]], (3, 3), flip_kernel=True)
    np.testing.assert_array_equal(flipped, filter_matrix([[5, 4], [2, 1]], (3, 3)))
    assert (x.reshape(-1) @ flipped).tolist() == [
        1 * 5 + 2 * 4 + 4 * 2 + 5 * 1,
        2 * 5 + 3 * 4 + 5 * 2 + 6 * 1,
        4 * 5 + 5 * 4 + 7 * 2 + 8 * 1,
        5 * 5 + 6 * 4 + 8 * 2 + 9 * 1,
    ]


def test_negative_weights_keep_their_sign_and_the_last_output_is_there():
    matrix = filter_matrix(np.array([[0, 0], [0, -3]], np.int8), (4, 4))
    assert matrix.dtype == np.int8
    assert matrix[15, 8] == -3
    assert np.abs(matrix).sum(axis=0).tolist() == [3] * 9


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, bool])
def test_unsigned_weights_do_not_make_a_matrix_that_wraps(dtype):
    matrix = filter_matrix(np.ones((2, 2), dtype), (3, 3))
    assert matrix.dtype == np.int64
    assert (np.full((1, 9), 200, np.uint8) @ matrix).tolist() == [[800] * 4]


def test_weights_past_int64_are_refused():
    with pytest.raises(AccumulatorOverflowError):
        filter_matrix(np.full((2, 2), 2**63, np.uint64), (3, 3))


def test_half_precision_becomes_single():
    assert filter_matrix(np.ones((2, 2), np.float16), (3, 3)).dtype == np.float32


def test_a_dense_matrix_over_the_limit_is_refused_with_its_size_and_the_hint():
    with pytest.raises(InvalidArgumentError, match=r'8160\.0 GiB.*format="csr"'):
        filter_matrix(np.ones((3, 3)), (1024, 1024))
    with pytest.raises(InvalidArgumentError, match="memory_limit"):
        filter_matrix(np.ones((3, 3)), (28, 28), memory_limit=1000)


@pytest.mark.parametrize(
    ("weight", "shape"), [(np.ones((3, 3)), (1, 5, 5)), (np.ones((1, 1, 3, 3)), (5, 5)), (np.ones(3), (5,))]
)
def test_shapes_that_do_not_go_together_are_refused(weight, shape):
    with pytest.raises(InvalidArgumentError, match="does not go with"):
        filter_matrix(weight, shape)


def test_an_unknown_format_and_non_numbers_are_refused():
    with pytest.raises(InvalidArgumentError, match="csc"):
        filter_matrix(np.ones((3, 3)), (5, 5), format="csc")
    with pytest.raises(InvalidArgumentError, match="weight"):
        filter_matrix([["a", "b"]], (5, 5))


def test_the_encrypted_product_is_the_product_with_the_matrix():
    rng = np.random.default_rng(0)
    weight, images = rng.integers(-2, 2, (2, 1, 2, 2)), rng.integers(0, 4, (2, 1, 3, 4))
    network = fheconv.quantize(weight, images, fheconv.QuantConfig(weight_bits=8, input_bits=8))
    matrix = filter_matrix(network.last.convolution.weight, (1, 3, 4))
    circuit = fheconv.compile(network)
    circuit.keygen()
    encrypted = circuit.predict(images, fhe="execute")
    integers, _ = network.quantize_input(images)
    expected = (integers - network.input.zero_point).reshape(2, -1) @ matrix
    np.testing.assert_allclose((encrypted / network.last.scale).reshape(2, -1), expected, atol=1e-9)
