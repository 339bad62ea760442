"""Convolutions in a row, and sparse matrices, as steps that compute the same."""

import numpy as np
import pytest
import scipy.sparse
from hypothesis import assume, given
from hypothesis import strategies as st

from fheconv.arithmetic import ConvGeometry
from fheconv.basics.errors import InvalidArgumentError
from fheconv.networks.composition import MOST_ENTRIES, composed
from fheconv.networks.linear import Kernel, Term, is_pooling
from fheconv.networks.matrices import chains, matrix_of

seeds = st.integers(0, 2**32)


def geometry(rng, axes, groups):
    kernel = rng.integers(1, 4, axes).tolist()
    if rng.random() < 0.3:
        stride, padding = rng.integers(1, 4, axes).tolist(), rng.integers(0, 2, axes).tolist()
        return ConvGeometry.of_transposed(kernel, stride=stride, padding=padding, groups=groups)
    return ConvGeometry.of(
        kernel,
        stride=rng.integers(1, 3, axes).tolist(),
        padding=rng.integers(0, 3, (axes, 2)).tolist(),
        dilation=rng.integers(1, 3, axes).tolist(),
        groups=groups,
        padding_mode=str(rng.choice(["zeros", "zeros", "reflect", "replicate", "circular"])),
    )


def convolutions(rng):
    """Two or three convolutions in a row, and the shape of what they read."""
    axes = int(rng.integers(0, 4))
    shape = before = (int(rng.choice([2, 4])), *rng.integers(1, 7, axes).tolist())
    steps = []
    for _ in range(int(rng.integers(2, 4))):
        groups = int(rng.choice([1, 2]))
        own = geometry(rng, axes, groups)
        weight = rng.normal(size=(int(rng.choice([2, 4])), before[0] // groups, *own.kernel))
        steps.append(Kernel(weight=weight, geometry=own))
        try:
            before = steps[-1].output_shape(before)
        except InvalidArgumentError:
            assume(False)
    return Term(source=0, steps=tuple(steps), factor=2.0), shape, before


@given(seeds)
def test_convolutions_in_a_row_are_a_sum_of_convolutions(seed):
    rng = np.random.default_rng(seed)
    term, shape, _ = convolutions(rng)
    made = composed(term, shape)
    x = rng.normal(size=(2, *shape))
    y = 2 * term.apply(x)
    if made is not None:
        assert all(len(one.inexact()) == 1 for one in made)
        np.testing.assert_allclose(sum((one.factor * one.apply(x) for one in made), 0 * y), y, atol=1e-9)


@given(seeds)
def test_a_matrix_as_steps(seed):
    rng = np.random.default_rng(seed)
    term, shape, output = convolutions(rng)
    x = rng.normal(size=(2, *shape))
    matrix = matrix_of([term], shape)
    np.testing.assert_allclose(x.reshape(2, -1) @ matrix, 2 * term.apply(x).reshape(2, -1), atol=1e-9)
    made = chains(matrix, shape, output)
    y = sum((f * Term(source=0, steps=s).apply(x) for s, f in made), np.zeros((2, *output)))
    np.testing.assert_allclose(y, 2 * term.apply(x), atol=1e-9)


@given(seeds)
def test_any_matrix_as_steps(seed):
    rng = np.random.default_rng(seed)
    shape, output = (tuple(rng.integers(1, 5, int(rng.integers(0, 3))).tolist()) for _ in range(2))
    size = int(np.prod(shape)), int(np.prod(output))
    entries = rng.choice([0.0, 0.5, 1.0, -2.0, 1e-13, 3e-13], size) * (rng.random(size) < rng.random())
    x = rng.normal(size=(2, *shape))
    y = np.zeros((2, *output))
    for steps, factor in chains(scipy.sparse.csr_array(entries), shape, output):
        assert sum(isinstance(step, Kernel) and not step.exact for step in steps) <= 1
        y = y + factor * Term(source=0, steps=steps).apply(x)
    expected = (x.reshape(2, -1) @ entries).reshape(2, *output)
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-22)


def test_a_pooling_is_found_again():
    windows = Kernel(weight=np.ones((3, 1, 2, 2)), geometry=ConvGeometry.of((2, 2), groups=3), exact=True)
    ((steps, factor),) = chains(windows.matrix((3, 4, 4)) * 0.25, (3, 4, 4), (3, 3, 3))
    assert factor == 0.25
    assert [is_pooling(step) for step in steps] == [False, True, False]


@pytest.mark.slow
def test_no_product_is_made_that_is_too_large():
    size = 2 * int(MOST_ENTRIES**0.5)
    flat = ConvGeometry.of(())
    narrow = (
        Kernel(weight=np.ones((1, size)), geometry=flat),
        Kernel(weight=np.ones((size, 1)), geometry=flat),
    )
    assert matrix_of([Term(source=0, steps=narrow)], (size,)) is None
    assert composed(Term(source=0, steps=narrow), (size,)) is None
