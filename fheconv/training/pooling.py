"""Moves poolings before the activations that they follow, where there is one lookup for a whole window."""

from dataclasses import replace

import numpy as np

from fheconv.arithmetic import OUTSIDE, ConvGeometry, tap_slices
from fheconv.basics.arrays import Array, Shape, along_channels, frozen
from fheconv.networks.floats import Layer, Maximum, Network
from fheconv.networks.linear import Kernel, is_pooling


def pooled_before(network: Network, number: int) -> Network | None:
    """Return the network with the average pooling after activation `number` moved before it, or None.

    Every reader of the activation must start with the same pooling, whose windows have no padding.
    """
    layer = network.layers[number - 1]
    readers = [
        term
        for reader in network.layers
        for term in (reader.terms if isinstance(reader, Layer) else ())
        if term.source == number
    ]
    firsts = [term.steps[0] if term.steps else None for term in readers]
    pool = firsts[0] if firsts else None
    if (
        not isinstance(layer, Layer)
        or not isinstance(pool, Kernel)
        or not is_pooling(pool)
        or pool.geometry.expands
        or any(isinstance(one, Maximum) and one.source == number for one in network.layers)
        or not all(
            isinstance(one, Kernel) and is_pooling(one) and one.geometry == pool.geometry for one in firsts
        )
    ):
        return None
    window = int(np.prod(pool.geometry.kernel))
    layers = []
    for place, one in enumerate(network.layers, 1):
        if isinstance(one, Layer):
            terms, bias = one.terms, one.bias
            if place == number:
                terms = tuple(
                    replace(term, steps=(*term.steps, pool), factor=term.factor / window) for term in terms
                )
                bias = frozen(pool.apply(bias[None], 0)[0] / window)
            terms = tuple(
                replace(term, steps=term.steps[1:], factor=term.factor * window)
                if term.source == number
                else term
                for term in terms
            )
            one = replace(one, terms=terms, bias=bias)
        layers.append(one)
    return replace(network, layers=tuple(layers))


def averaged_before(network: Network, number: int, images: Array) -> Network | None:
    """Return the network with the maxima of activation `number` replaced, or None if that is impossible.

    The layer averages its sums over the windows of the maxima, and its activation takes their place. So the
    tensor of the maxima is gone. Each channel is scaled and shifted so that its averages come near to the
    greatest sums of their windows on the images (N, C, *S), by least squares.

    The maxima must be the only reader of the activation, and their windows must have one size and no padding.
    """
    layer, place = network.layers[number - 1], only_maximum(network, number)
    if place is None or not isinstance(layer, Layer):
        return None
    maximum = network.layers[place]
    if not isinstance(maximum, Maximum) or (pool := _pooling(maximum, layer.shape)) is None:
        return None
    sums = layer.sums(network.tensors(images))
    factors, shifts = _nearest(pool.apply(sums, 0), maximum.candidates(sums).max(axis=0))
    axes = len(maximum.shape)
    bias = pool.apply(layer.bias[None], 0)[0] * along_channels(factors, axes) + along_channels(shifts, axes)
    terms = tuple(replace(term, steps=(*term.steps, pool)).scaled(factors, axes - 1) for term in layer.terms)
    layers = []
    for at, one in enumerate(network.layers):
        if at == place:
            continue
        if at == number - 1:
            one = replace(layer, terms=terms, bias=frozen(bias))
        elif isinstance(one, Maximum):
            one = replace(one, source=renumbered(one.source, place + 1, number))
        else:
            moved = (replace(term, source=renumbered(term.source, place + 1, number)) for term in one.terms)
            one = replace(one, terms=tuple(moved))
        layers.append(one)
    return replace(network, layers=tuple(layers))


def only_maximum(network: Network, number: int) -> int | None:
    """Return the place of the maxima of tensor `number` among the layers, None if something else reads it."""
    readers = [at for at, one in enumerate(network.layers) if number in one.sources]
    return readers[0] if len(readers) == 1 and isinstance(network.layers[readers[0]], Maximum) else None


def renumbered(source: int, gone: int, instead: int) -> int:
    """Return the number of a tensor after tensor `gone` was replaced by `instead`, which comes before it."""
    return instead if source == gone else source - (source > gone)


def _pooling(maximum: Maximum, shape: Shape) -> Kernel | None:
    """Return the pooling with the windows of maxima of a tensor of `shape`, None if there is none."""
    index, axes = maximum.index, len(shape) - 1
    if len(maximum.shape) != len(shape) or (index == OUTSIDE).any():
        return None
    # The coordinates (axes, n, C, *Out) of the values in each window.
    at = np.stack(np.unravel_index(index, shape)[1:])
    sizes = [np.unique(along) for along in at.reshape(axes, len(index), -1)[:, :, 0]]
    dilation = [int(along[1] - along[0]) if len(along) > 1 else 1 for along in sizes]
    stride = []
    for axis, along in enumerate(at[:, 0, 0]):
        line = np.moveaxis(along, axis, 0).reshape(along.shape[axis], -1)[:, 0]
        stride.append(max(int(line[1] - line[0]), 1) if len(line) > 1 else 1)
    geometry = ConvGeometry.of([*map(len, sizes)], stride=stride, dilation=dilation, groups=shape[0])
    places = np.arange(int(np.prod(shape))).reshape(shape)
    taps = list(np.ndindex(*geometry.kernel))
    output = maximum.shape[1:]
    if len(taps) != len(index) or maximum.shape != (shape[0], *geometry.output_size(shape[1:])):
        return None
    for tap, wanted in zip(taps, index, strict=True):
        if not np.array_equal(places[(slice(None), *tap_slices(tap, output, stride, dilation))], wanted):
            return None
    ones = np.ones((shape[0], 1, *geometry.kernel), np.int64)
    return Kernel(weight=frozen(ones), geometry=geometry, exact=True)


def _nearest(x: Array, y: Array) -> tuple[Array, Array]:
    """Return the factor and the shift (C,) of each channel that bring `x` (N, C, *S) nearest to `y`."""
    x, y = (np.moveaxis(one, 1, 0).reshape(one.shape[1], -1) for one in (x, y))
    mean = x.mean(axis=1), y.mean(axis=1)
    away = x - mean[0][:, None]
    square = (away**2).sum(axis=1)
    product = (away * (y - mean[1][:, None])).sum(axis=1)
    count = np.where(square > 0, square, 1.0)
    factor = np.where(square > 0, product / count, 1.0)
    return factor, mean[1] - factor * mean[0]
