"""Laws of linear steps: each is a matrix, and merging them never changes what they compute."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fheconv.arithmetic import OUTSIDE, ConvGeometry
from fheconv.arithmetic.geometry import direct_form
from fheconv.networks.linear import Kernel, Select, Term, pointwise

seeds = st.integers(0, 2**32 - 1)


def random_kernel(rng, channels, spatial):
    """A kernel that fits (channels, *spatial): any stride, dilation, groups, padding mode, or transposed."""
    axes = len(spatial)
    groups = int(rng.choice([g for g in range(1, channels + 1) if channels % g == 0]))
    filters = groups * int(rng.integers(1, 3))
    exact = bool(rng.integers(4) == 0)
    one = bool(rng.integers(3) == 0)
    dilation = rng.integers(1, 3, axes).tolist()
    kernel = [1 if one else int(rng.integers(1, 4)) for _ in spatial]
    if not axes:
        weight, geometry = rng.normal(size=(filters, channels // groups)), ConvGeometry.of((), groups=groups)
    elif rng.integers(4) == 0:
        shape = (channels, filters // groups, *kernel)
        options = {
            "stride": rng.integers(1, 3, axes).tolist(),
            "padding": 0,
            "dilation": dilation,
            "groups": groups,
        }
        weight, geometry = direct_form(
            rng.normal(size=shape), transposed=True, padding_mode="zeros", output_padding=0, **options
        )
    else:
        extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        needed = [max(0, -(-(e - s) // 2)) for e, s in zip(extent, spatial, strict=True)]
        mode = str(rng.choice(["zeros", "zeros", "replicate", "reflect", "circular"]))
        padding = [n if one else n + int(rng.integers(0, 2)) for n in needed]
        if mode in ("reflect", "circular") and any(p >= s for p, s in zip(padding, spatial, strict=True)):
            mode = "replicate"
        stride = [1] * axes if one and rng.integers(2) else rng.integers(1, 3, axes).tolist()
        weight = rng.normal(size=(filters, channels // groups, *kernel))
        geometry = ConvGeometry.of(
            kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=mode
        )
    weight = np.where(rng.random(weight.shape) < 0.2, 0, weight)
    return Kernel(weight=np.rint(weight) if exact else weight, geometry=geometry, exact=exact)


def random_select(rng, shape):
    """A selection from `shape` with zeros and repeated values, to any shape; sometimes the identity."""
    size = int(np.prod(shape))
    if rng.integers(4) == 0:
        return Select(index=np.arange(size).reshape(shape))
    axes = int(rng.integers(0, 3))
    output = rng.integers(1, 4, 1 + axes)
    return Select(index=rng.integers(OUTSIDE, size, output))


def random_steps(rng, shape, n):
    steps = []
    for _ in range(n):
        step = random_kernel(rng, shape[0], shape[1:]) if rng.integers(3) else random_select(rng, shape)
        steps.append(step)
        shape = step.output_shape(shape)
    return steps


def random_shape(rng):
    return tuple(map(int, (rng.integers(1, 5), *rng.integers(1, 5, rng.integers(0, 4)))))


def same(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@given(seeds)
def test_steps_are_their_matrices(seed):
    rng = np.random.default_rng(seed)
    shape = random_shape(rng)
    term = Term(source=0, steps=tuple(random_steps(rng, shape, int(rng.integers(0, 4)))))
    x = rng.normal(size=(3, *shape))
    y = term.apply(x)
    assert y.shape[1:] == term.shapes(shape)[-1]
    same(x.reshape(3, -1) @ term.matrix(shape), y.reshape(3, -1))
    for step, before in zip(term.steps, term.shapes(shape)[:-1], strict=True):
        z = rng.normal(size=(2, *before))
        assert step.output_shape(before) == step.apply(z, 0).shape[1:]
        same(z.reshape(2, -1) @ step.matrix(before), step.apply(z, 0).reshape(2, -1))


@given(seeds)
def test_one_more_step_is_the_step_after_the_term(seed):
    rng = np.random.default_rng(seed)
    shape = random_shape(rng)
    term, x = Term(source=0), rng.normal(size=(2, *shape))
    expected = x
    factor = 1.0
    for step in random_steps(rng, shape, int(rng.integers(1, 6))):
        by = float(rng.normal())
        before = len(term.steps)
        term = term.then(step, shape, by)
        expected, factor = step.apply(expected, 0), factor * by
        same(term.apply(x), expected)
        assert term.factor == pytest.approx(factor)
        assert len(term.steps) <= before + 1
    assert not any(
        isinstance(a, Select) and isinstance(b, Select)
        for a, b in zip(term.steps, term.steps[1:], strict=False)
    )


@given(seeds)
def test_scaling_channels_scales_the_result(seed):
    rng = np.random.default_rng(seed)
    shape = random_shape(rng)
    term = Term(source=0, factor=2.0, steps=tuple(random_steps(rng, shape, int(rng.integers(0, 4)))))
    if rng.integers(2):  # through a pooling
        channels, *spatial = term.shapes(shape)[-1]
        ones = np.ones((channels, 1, *[1] * len(spatial)))
        geometry = ConvGeometry.of([1] * len(spatial), groups=channels, stride=2 if spatial else 1)
        term = replace(term, steps=(*term.steps, Kernel(weight=ones, geometry=geometry, exact=True)))
    x = rng.normal(size=(2, *shape))
    y = term.factor * term.apply(x)
    factors = rng.normal(size=y.shape[1]) if rng.integers(4) else np.full(y.shape[1], 1.5)
    scaled = term.scaled(factors, y.ndim - 2)
    same(scaled.factor * scaled.apply(x), y * factors.reshape(-1, *[1] * (y.ndim - 2)))
    for old, new in zip(term.steps, scaled.steps, strict=False):
        if isinstance(old, Kernel) and old.exact:
            assert new.exact
            np.testing.assert_array_equal(new.weight, old.weight)


@given(seeds)
def test_the_inputs_read_are_those_with_a_weight(seed):
    rng = np.random.default_rng(seed)
    shape = random_shape(rng)
    (step,) = random_steps(rng, shape, 1)
    if isinstance(step, Kernel):  # positive weights: repeated padding cancels none
        step = replace(step, weight=np.abs(step.weight))
    output = step.output_shape(shape)
    wanted = rng.random(output) < 0.4
    expected = (step.matrix(shape).toarray()[:, wanted.ravel()] != 0).any(1).reshape(shape)
    np.testing.assert_array_equal(step.read(wanted, shape), expected)


@given(seeds)
def test_the_inputs_a_chain_reads_are_those_with_a_weight(seed):
    rng = np.random.default_rng(seed)
    shape = random_shape(rng)
    steps = [
        replace(step, weight=np.abs(step.weight)) if isinstance(step, Kernel) else step
        for step in random_steps(rng, shape, 3)
    ]
    term = Term(source=0, steps=tuple(steps))
    wanted = rng.random(term.shapes(shape)[-1]) < 0.4
    expected = (term.matrix(shape).toarray()[:, wanted.ravel()] > 0).any(1).reshape(shape)
    np.testing.assert_array_equal(term.read(wanted, shape), expected)


@given(seeds)
def test_integers_stay_exact_and_padding_stands_for_zero(seed):
    """With a zero point z, the sums over x − z padded with 0 are those over x padded with z, less z · ΣW."""
    rng = np.random.default_rng(seed)
    shape = random_shape(rng)
    steps = random_steps(rng, shape, 3)
    kernels = [n for n, step in enumerate(steps) if isinstance(step, Kernel)]
    if not kernels:
        return
    steps = [
        replace(step, weight=rng.integers(-9, 9, step.weight.shape)) if isinstance(step, Kernel) else step
        for step in steps[: kernels[0] + 1]
    ]
    term, zero = Term(source=0, steps=tuple(steps)), 7
    x = rng.integers(0, 200, (2, *shape))
    y = term.apply(x, zero)
    assert y.dtype == np.int64
    np.testing.assert_array_equal(y - term.apply(np.full_like(x, zero), zero), term.apply(x - zero))


def test_what_merges():
    rng = np.random.default_rng(0)
    wide = Kernel(weight=rng.normal(size=(4, 2, 3, 3)), geometry=ConvGeometry.of((3, 3), padding=1, groups=2))
    mix, each = pointwise(rng.normal(size=(4, 4)), 2), pointwise(rng.normal(size=(4, 1)), 2, groups=4)
    for first in (wide, mix, each):
        for second in (wide, mix, each):
            term = Term(source=0).then(first, (4, 5, 5)).then(second, (4, 5, 5))
            assert len(term.steps) == (2 if first is second is wide else 1)
            grouped = {id(first), id(second)} <= {id(wide), id(each)} and len(term.steps) == 1
            if grouped:
                assert term.steps[0].geometry.groups > 1
    pooled = replace(each, exact=True)
    assert len(Term(source=0, steps=(wide,)).then(pooled, (4, 5, 5)).steps) == 2


@given(seeds)
def test_weights_absorb_what_their_source_was_divided_by(seed):
    """Factors by channel: the term of the divided source is the term of the source."""
    rng = np.random.default_rng(seed)
    shape = random_shape(rng)
    term = Term(source=0, factor=3.0, steps=tuple(random_steps(rng, shape, int(rng.integers(0, 4)))))
    factors = np.broadcast_to(rng.uniform(0.5, 2, (shape[0], *[1] * (len(shape) - 1))), shape)
    absorbed = term.absorbed(factors)
    first = term.steps[0] if term.steps else None
    if isinstance(first, Kernel) and not first.exact:
        assert absorbed is not None  # each of its weights reads one channel
    if absorbed is not None:
        x = rng.normal(size=(2, *shape))
        same(absorbed.apply(x / factors), term.apply(x))
        assert (absorbed.source, absorbed.factor) == (term.source, term.factor)
        assert len(absorbed.steps) == len(term.steps)


@given(seeds)
def test_weights_absorb_no_more_than_one_factor_each(seed):
    """Factors of single values: a convolution whose taps all have weights reads several with each."""
    rng = np.random.default_rng(seed)
    kernel = Kernel(weight=rng.normal(size=(2, 2, 2, 2)), geometry=ConvGeometry.of((2, 2)))
    factors = rng.choice([1.0, 2.0], (2, 3, 3))
    by_channel = factors.reshape(2, -1)
    absorbed = Term(source=0, steps=(kernel,)).absorbed(factors)
    assert (absorbed is None) == bool((by_channel != by_channel[:, :1]).any())
    # A selection that takes the values of one factor apart makes channels of them again.
    apart = Select(index=np.stack([np.arange(18)] * 2).reshape(2, 18).T.reshape(18, 2))
    linear = Kernel(weight=rng.normal(size=(3, 18, 1)), geometry=ConvGeometry.of((1,)))
    term = Term(source=0, steps=(apart, linear))
    absorbed = term.absorbed(factors)
    x = rng.normal(size=(2, 2, 3, 3))
    same(absorbed.apply(x / factors), term.apply(x))


def test_nothing_without_weights_absorbs_factors():
    pooling = Kernel(weight=np.ones((2, 1, 2, 2)), geometry=ConvGeometry.of((2, 2), groups=2), exact=True)
    factors = np.broadcast_to(np.array([1.0, 2.0])[:, None, None], (2, 3, 3))
    assert Term(source=0).absorbed(factors) is None
    assert Term(source=0, steps=(pooling,)).absorbed(factors) is None
