"""Weighs the two factors of a product against each other, so that neither hides the other.

A product is the difference of two squares: xy = (x + y)²/4 − (x − y)²/4. If x is far larger than y, both
squares are nearly x², and their difference is lost in the rounding of the lookups. So x is multiplied by a
number and y divided by it, for each channel, which leaves the product as it is.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fheconv.basics.arrays import Array, along_channels, frozen
from fheconv.networks.floats import Layer, Maximum, Network
from fheconv.networks.linear import Term


def balanced(network: Network, tensors: Sequence[Array]) -> Network:
    """Return a network with equal results, in which the factors of each product have equal sizes.

    `tensors` holds the network's tensors for the calibration images. The network is then one like all others:
    it no longer tells which terms are those of a factor. A network without products is returned as it is.
    """
    if not any(isinstance(layer, Layer) and layer.factor_terms is not None for layer in network.layers):
        return network
    layers: list[Layer | Maximum] = []
    for layer in network.layers:
        if isinstance(layer, Layer) and layer.factor_terms is not None:
            layer = _balanced(layer, layer.factor_terms, tensors)
        layers.append(layer)
    return replace(network, layers=tuple(layers))


def _balanced(layer: Layer, count: int, tensors: Sequence[Array]) -> Layer:
    """Return the layer of a product whose first `count` terms are those of one factor."""
    axes = len(layer.shape)
    sums = layer.bias.reshape(-1, 2, *layer.shape[1:])
    biases = (sums[:, 0] + sums[:, 1]) / 2, (sums[:, 0] - sums[:, 1]) / 2
    parts = layer.terms[:count], layer.terms[count:]
    sizes = [
        _sizes(replace(layer, terms=terms, bias=np.repeat(bias, 2, axis=0)).sums(tensors)[:, ::2])
        for terms, bias in zip(parts, biases, strict=True)
    ]
    with np.errstate(over="ignore"):
        growth = np.repeat(np.sqrt(sizes[1] / sizes[0]), 2)
    growth = np.where(np.isfinite(growth) & (growth > 0), growth, 1.0)
    growing = (_scaled(parts[0], growth, axes - 1), _scaled(parts[1], 1 / growth, axes - 1))
    if not all(len(term.inexact()) == 1 for terms in growing for term in terms):
        growth = np.full(len(growth), np.exp(np.log(growth).mean()))
        growing = (_scaled(parts[0], growth, axes - 1), _scaled(parts[1], 1 / growth, axes - 1))
    first, second = (np.repeat(bias, 2, axis=0) for bias in biases)
    first = first * along_channels(growth, axes)
    second = second / along_channels(growth, axes)
    signs = along_channels(np.tile([1.0, -1.0], len(growth) // 2), axes)
    terms = (*growing[0], *growing[1])
    return replace(layer, terms=terms, bias=frozen(first + signs * second), factor_terms=None)


def _sizes(values: Array) -> Array:
    """Return the size (C,) of each channel of a factor (N, C, *S); one of zeros has that of the others."""
    greatest = np.abs(values).max(axis=(0, *range(2, values.ndim)))
    usual = greatest[greatest > 0].mean() if greatest.any() else 1.0
    return np.where(greatest > 0, greatest, usual)


def _scaled(terms: Sequence[Term], factors: Array, axes: int) -> list[Term]:
    return [term.scaled(factors, axes) for term in terms]
