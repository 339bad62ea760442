"""Defines the linear steps between the tensors of a network, and chains of steps.

There are two kinds of steps: convolutions and selections. Every linear operation on a tensor (C, *S) is a
chain of them. A linear layer is a convolution without spatial axes. Average pooling is a convolution whose
weights are all 1. Operations that only move values (padding, slicing, reshaping, shuffling, concatenating)
are selections.
"""

import functools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import scipy.sparse

from fheconv.arithmetic import OUTSIDE, ConvGeometry, conv, expand, tap_slices
from fheconv.arithmetic.matrix import csr_filter_matrix
from fheconv.basics.arrays import Array, Shape, along_channels, frozen

# Two convolutions, one of them of a single tap, merge at once into one of at most so many weights, or of no
# more than the two have. Where a narrow layer stands between two wide ones, two are cheaper than one.
MERGED_WEIGHTS = 2**16


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernel:
    """Computes a convolution without bias: `weight` (K, C/groups, *k), floats or integers.

    `exact` says that the weights are integers already, such as the ones of a pooling window, and must not be
    quantized. Without spatial axes it is a linear layer, (K, C).
    """

    weight: Array
    geometry: ConvGeometry
    exact: bool = False

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape (K, *Out) for inputs of shape (C, *S)."""
        self.geometry.check_channels(shape[0], self.weight.shape)
        return (len(self.weight), *self.geometry.output_size(shape[1:]))

    def apply(self, x: Array, pad: int) -> Array:
        """Return the outputs (N, K, *Out) of a batch, padded with `pad`; integers give exact int64."""
        geometry, weight = self.geometry, self.weight
        x = expand(x, geometry, pad)
        direct = functools.partial(conv, groups=geometry.groups, method="im2col")  # which does without torch
        if not geometry.kernel:  # `conv` needs a spatial axis
            return direct(x[..., None], weight[..., None])[..., 0]
        return direct(x, weight, stride=geometry.stride, dilation=geometry.dilation)

    def matrix(self, shape: Shape) -> scipy.sparse.csr_array:
        """Return B with `x.reshape(N, -1) @ B` the flattened outputs."""
        if not self.geometry.kernel and self.geometry.groups == 1:  # a linear layer
            return scipy.sparse.csr_array(self.weight.T)
        return csr_filter_matrix(self.weight, self.geometry, shape[1:], self.output_shape(shape)[1:])

    def meeting(self, inputs: Array) -> Array:
        """Return a mask like `weight`: those that are multiplied by any of the mask `inputs` (C, *S)."""
        geometry, groups = self.geometry, self.geometry.groups
        output = geometry.output_size(inputs.shape[1:])
        expanded = expand(inputs[None], geometry, False)[0]
        mask = np.zeros(self.weight.shape, bool)
        for tap in np.ndindex(*geometry.kernel):
            window = tap_slices(tap, output, geometry.stride, geometry.dilation)
            met = expanded[(slice(None), *window)].reshape(len(inputs), -1).any(axis=1)
            mask[(..., *tap)] = np.repeat(met.reshape(groups, -1), len(self.weight) // groups, axis=0)
        return mask

    def read(self, wanted: Array, shape: Shape) -> Array:
        """Return a mask (C, *S) of the inputs that the outputs in the mask `wanted` (K, *Out) depend on."""
        geometry, groups = self.geometry, self.geometry.groups
        # Products of numbers are much faster than those of booleans, if rows lie together in memory.
        by_group = wanted.reshape(groups, len(wanted) // groups, -1).astype(np.float32)
        used = self.weight.reshape(groups, -1, self.weight.shape[1], math.prod(geometry.kernel)) != 0
        by_tap = used.transpose(3, 0, 2, 1).astype(np.float32, order="C")
        expanded = np.zeros((shape[0], *geometry.expanded_size(shape[1:])), bool)
        for tap, weights in zip(np.ndindex(*geometry.kernel), by_tap, strict=True):
            window = tap_slices(tap, wanted.shape[1:], geometry.stride, geometry.dilation)
            expanded[(slice(None), *window)] |= (weights @ by_group > 0).reshape(-1, *wanted.shape[1:])
        for axis, size in enumerate(shape[1:]):
            grid = geometry.grid(axis, size)
            moved = np.moveaxis(expanded, 1 + axis, 0)
            held = np.zeros((size, *moved.shape[1:]), bool)
            np.logical_or.at(held, grid[grid != OUTSIDE], moved[grid != OUTSIDE])
            expanded = np.moveaxis(held, 0, 1 + axis)
        return expanded


@dataclass(frozen=True, kw_only=True, eq=False)
class Select:
    """Selects inputs by their flat positions `index` (C', *S'); the output is zero where it is `OUTSIDE`."""

    index: Array

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of `index`, for inputs of any shape."""
        return self.index.shape

    def apply(self, x: Array, pad: int) -> Array:
        """Return the outputs (N, C', *S') of a batch, with `pad` for zeros."""
        flat = x.reshape(len(x), math.prod(x.shape[1:]))[:, self.index.ravel()]
        flat[:, self.index.ravel() == OUTSIDE] = pad
        return flat.reshape(len(x), *self.index.shape)

    def matrix(self, shape: Shape) -> scipy.sparse.csr_array:
        """Return B with `x.reshape(N, -1) @ B` the flattened outputs."""
        (outputs,) = np.nonzero(self.index.ravel() != OUTSIDE)
        entries = np.ones(len(outputs), np.int64), (self.index.ravel()[outputs], outputs)
        return scipy.sparse.csr_array(entries, shape=(math.prod(shape), self.index.size))

    def read(self, wanted: Array, shape: Shape) -> Array:
        """Return a mask of `shape`: the inputs that the outputs in the mask `wanted` depend on."""
        mask = np.zeros(math.prod(shape), bool)
        chosen = self.index[wanted]
        mask[chosen[chosen != OUTSIDE]] = True
        return mask.reshape(shape)

    def is_identity(self, shape: Shape) -> bool:
        """Return whether it leaves a tensor of `shape` as it is."""
        return self.index.shape == shape and bool((self.index.ravel() == np.arange(math.prod(shape))).all())


Step: TypeAlias = Kernel | Select


@dataclass(frozen=True, kw_only=True, eq=False)
class Term:
    """Computes one summand of accumulators: `factor` times a chain of steps on tensor `source`."""

    source: int
    steps: tuple[Step, ...] = ()
    factor: float = 1.0

    def shapes(self, shape: Shape) -> list[Shape]:
        """Return the shape before each step, from a source of `shape`, and after the last."""
        shapes = [shape]
        for step in self.steps:
            shapes.append(step.output_shape(shapes[-1]))
        return shapes

    def apply(self, x: Array, pad: int = 0) -> Array:
        """Apply the steps to a batch, without the factor.

        Up to the first convolution the padding is `pad`, after it the padding is 0.
        """
        for step in self.steps:
            x = step.apply(x, pad)
            if isinstance(step, Kernel):
                pad = 0
        return x

    def matrix(self, shape: Shape) -> scipy.sparse.csr_array:
        """Return B, where `x.reshape(N, -1) @ B` applies the steps to a batch, padded with 0."""
        if not self.steps:
            return scipy.sparse.eye_array(math.prod(shape), dtype=np.int64, format="csr")
        steps = zip(self.steps, self.shapes(shape)[:-1], strict=True)
        product = functools.reduce(operator.matmul, (step.matrix(before) for step, before in steps))
        return product.astype(np.promote_types(product.dtype, np.int64), copy=False)

    def read(self, wanted: Array, shape: Shape) -> Array:
        """Return a mask of `shape`: the values of the source that the outputs in `wanted` depend on."""
        return self.masks(wanted, shape)[0]

    def masks(self, wanted: Array, shape: Shape) -> list[Array]:
        """Return masks of the values before each step that `wanted` outputs depend on, and `wanted`."""
        masks = [wanted]
        for step, before in reversed(list(zip(self.steps, self.shapes(shape)[:-1], strict=True))):
            masks.insert(0, step.read(masks[0], before))
        return masks

    @property
    def convolution(self) -> Kernel | None:
        """The term's convolution, None for a term of other steps or of several."""
        return self.steps[0] if len(self.steps) == 1 and isinstance(self.steps[0], Kernel) else None

    def inexact(self) -> list[int]:
        """Return the places of the convolutions whose weights are to be quantized."""
        return [at for at, step in enumerate(self.steps) if isinstance(step, Kernel) and not step.exact]

    def weighted(self) -> tuple[int, Kernel]:
        """Return the place of the one convolution whose weights are to be quantized, and that convolution."""
        (at,) = self.inexact()
        kernel = self.steps[at]
        if not isinstance(kernel, Kernel):
            raise TypeError("A term must have one convolution whose weights are to be quantized.")
        return at, kernel

    def with_weight(self, weight: Array) -> "Term":
        """Return the term with another weight in the convolution that is to be quantized."""
        at, kernel = self.weighted()
        steps = (*self.steps[:at], replace(kernel, weight=frozen(weight)), *self.steps[at + 1 :])
        return replace(self, steps=steps)

    def without_dead_weights(self, shape: Shape) -> "Term":
        """Return the term with 0 for weights that are only ever multiplied by zeros, for a source of `shape`.

        Such weights do not change a result, but they would count when a scale is chosen. They occur where a
        convolution reads several tensors side by side: each term has the weights of all channels, and zeros
        in the channels of the other tensors. A convolution of a whole tensor keeps all its weights, also
        those that meet nothing but its own padding.
        """
        if not self.inexact():
            return self
        at, kernel = self.weighted()
        if not at:
            return self
        alive = np.ones((1, *shape), bool)
        for step in self.steps[:at]:
            if isinstance(step, Kernel):
                step = replace(step, weight=np.ones(step.weight.shape, np.int64))
                alive = step.apply(alive.astype(np.int64), 0) > 0
            else:
                alive = step.apply(alive, 0)
        met = kernel.meeting(alive[0])
        return self if met.all() else self.with_weight(np.where(met, kernel.weight, 0))

    def is_plain(self) -> bool:
        """Return whether the term only moves values, all with the weight 1 or all with −1."""
        kernels = [step for step in self.steps if isinstance(step, Kernel)]
        plain = all(_is_pointwise(kernel) and _is_depthwise(kernel) for kernel in kernels)
        return plain and abs(self.factor) == 1 and all((kernel.weight == 1).all() for kernel in kernels)

    def then(self, step: Step, shape: Shape, factor: float = 1.0) -> "Term":
        """Return the term with one more step, merged with the step before it if possible.

        `shape` is the source's. Two selections merge; two convolutions merge if one of them has a single tap.
        """
        steps = list(self.steps)
        if isinstance(step, Select) and step.is_identity(self.shapes(shape)[-1]):
            return replace(self, factor=self.factor * factor)
        merged = _merged(steps[-1], step) if steps else None
        if merged is not None:
            steps.pop()
        return replace(self, steps=(*steps, merged or step), factor=self.factor * factor)

    def scaled(self, factors: Array, axes: int) -> "Term":
        """Return the term with each output channel multiplied by its own of `factors` (C,)."""
        if factors[0] and (factors == factors[0]).all():  # zeros belong into the weights: a factor has a size
            return replace(self, factor=self.factor * float(factors[0]))
        scale = pointwise(factors[:, None], axes, groups=len(factors))
        # The factors move before poolings, to weights that can include them.
        at = len(self.steps)
        while at and is_pooling(self.steps[at - 1]):
            at -= 1
        merged = _merged(self.steps[at - 1], scale) if at else None
        if merged is None:
            return replace(self, steps=(*self.steps, scale))
        return replace(self, steps=(*self.steps[: at - 1], merged, *self.steps[at:]))

    def absorbed(self, factors: Array) -> "Term | None":
        """Return the term whose weights compensate that its source was divided by `factors` (C, *S).

        Return None if one weight would have to compensate several factors.
        """
        for at, step in enumerate(self.steps):
            if isinstance(step, Select):
                factors = np.where(step.index == OUTSIDE, np.nan, factors.ravel()[step.index])
                continue
            flat = factors.reshape(len(factors), -1)  # where all is padding, any factor is right
            own = np.nan_to_num(np.fmax.reduce(flat, axis=1), nan=1.0)
            if (own != np.nan_to_num(np.fmin.reduce(flat, axis=1), nan=1.0)).any():
                return None
            if not step.exact:
                scale = pointwise(own[:, None], len(step.geometry.kernel), groups=len(own))
                merged = _merged(scale, step)
                steps = (*self.steps[:at], merged, *self.steps[at + 1 :]) if merged else ()
                return replace(self, steps=steps) if merged else None
            if not _is_depthwise(step):
                return None
            shape = step.output_shape(factors.shape)
            factors = np.broadcast_to(along_channels(own, len(shape)), shape)
        return None


def pointwise(weight: Array, axes: int, groups: int = 1) -> Kernel:
    """Return a convolution of one tap, `weight` (K, C/groups), over `axes` spatial axes."""
    geometry = ConvGeometry.of((1,) * axes, groups=groups)
    return Kernel(weight=frozen(weight.reshape(*weight.shape, *[1] * axes)), geometry=geometry)


def _merged(a: Step, b: Step) -> Step | None:
    """Return one step that equals the step `a` followed by `b`, or None if there is none."""
    if isinstance(a, Select) and isinstance(b, Select):
        return Select(index=frozen(np.where(b.index == OUTSIDE, OUTSIDE, a.index.ravel()[b.index])))
    if not (isinstance(a, Kernel) and isinstance(b, Kernel)) or a.exact or b.exact:
        return None
    if _is_pointwise(b) and _is_depthwise(b):
        return replace(a, weight=frozen(a.weight * along_channels(b.weight.ravel(), a.weight.ndim)))
    if _is_pointwise(a) and _is_depthwise(a):  # padding with zeros before or after it is the same
        filters, per_group = b.weight.shape[:2]
        first = np.arange(filters) // (filters // b.geometry.groups) * per_group
        factors = a.weight.ravel()[first[:, None] + np.arange(per_group)]
        weight = b.weight * factors.reshape(*factors.shape, *[1] * (b.weight.ndim - 2))
        return replace(b, weight=frozen(weight))
    if not (_is_pointwise(a) or _is_pointwise(b)):
        return None
    groups = math.gcd(a.geometry.groups, b.geometry.groups)
    size = len(b.weight) * (a.weight.shape[1] * a.geometry.groups // groups)
    if size * math.prod((*a.geometry.kernel, *b.geometry.kernel)) > max(
        MERGED_WEIGHTS, a.weight.size + b.weight.size
    ):
        return None
    axes = a.weight.ndim - 2
    # One of the two has a single tap, and the other's are what is left.
    taps = [k * m for k, m in zip(a.geometry.kernel, b.geometry.kernel, strict=True)]
    weight = np.concatenate(
        [
            np.moveaxis(np.tensordot(second, first, axes=(1, 0)), 1 + axes, 1).reshape(
                len(second), *first.shape[1:2], *taps
            )
            for first, second in zip(blocks(a, groups), blocks(b, groups), strict=True)
        ]
    )
    geometry = a.geometry if _is_pointwise(b) else b.geometry
    return Kernel(weight=frozen(weight), geometry=replace(geometry, groups=groups))


def is_pooling(step: Step) -> bool:
    """Return whether a step sums windows of each channel on its own."""
    return isinstance(step, Kernel) and step.exact and _is_depthwise(step)


def _is_depthwise(kernel: Kernel) -> bool:
    """Return whether each output channel reads the input channel of its own number."""
    return kernel.weight.shape[1] == 1 and len(kernel.weight) == kernel.geometry.groups


def _is_pointwise(kernel: Kernel) -> bool:
    geometry = kernel.geometry
    plain = not geometry.expands and all(s == 1 for s in geometry.stride)
    return plain and all(k == 1 for k in geometry.kernel)


def blocks(kernel: Kernel, groups: int) -> Iterator[Array]:
    """Yield the weights (K, C, *k) of each of `groups` groups, which divide the kernel's own.

    Within a group, each filter reads every channel: where it did not, its weights are zeros.
    """
    inner, rows = kernel.geometry.groups // groups, len(kernel.weight) // groups
    per_group = kernel.weight.shape[1]
    for group in range(groups):
        weight = kernel.weight[group * rows : (group + 1) * rows]
        full = np.zeros((rows, inner * per_group, *weight.shape[2:]), weight.dtype)
        for one in range(inner):
            own = slice(one * rows // inner, (one + 1) * rows // inner)
            full[own, one * per_group : (one + 1) * per_group] = weight[own]
        yield full
