"""Multiplies the weights of channels by integers, so that narrow accumulators fill the window of a lookup."""

from collections.abc import Sequence

import numpy as np

from fheconv.basics.arrays import Array, Shape
from fheconv.networks.bounds import norms
from fheconv.networks.integers import QuantizedLayer
from fheconv.networks.linear import Term
from fheconv.quantizer.rows import Rows
from fheconv.quantizer.windows import most_norm


def row_gains(rows: Rows, gain: Array) -> Array:
    """Return the gain of each row, from the gains (C,) that the channels allow.

    All values of a row have its gain. If the values of a channel belong to several rows, all rows share a
    gain, because the values of a channel share a window. Rows without values have gain 1.
    """
    if rows.mixed:
        return np.full(len(rows.rows), gain.min())
    found = np.full(len(rows.rows), np.iinfo(np.int64).max)
    np.minimum.at(found, rows.of_value.reshape(len(gain), -1)[:, 0], gain)
    unused = np.bincount(rows.of_value.ravel(), minlength=len(found)) == 0
    return np.where(unused, 1, found)


def quiet_steps(rows: Rows, shapes: Sequence[Shape], noise: float, rounding_bits: int) -> Array:
    """Return the finest real steps of accumulators (C,) whose integer weights cause noise that costs nothing.

    `noise` is that of the inputs, in units of a lookup's noise. Lookups keep `rounding_bits`.
    """
    layer, weights = rows.layer, [rows.weights(row).astype(np.float64) for row in rows.rows]
    # Dividing by the greatest weight keeps the squares from overflowing.
    size = max((float(np.abs(one).max(initial=0)) for one in weights), default=0) or 1.0
    terms = rows.terms([one / size for one in weights])
    real = norms(terms, layer.shape, shapes) * size * rows.parts[0].unit
    taps = sum(kernel.weight[0].size for _, kernel in (term.weighted() for term in layer.terms))
    steps: Array = real * np.sqrt(noise) / most_norm(taps, rounding_bits)
    return steps


def gained(rows: Rows, terms: Sequence[Term], gains: Array) -> tuple[Term, ...]:
    """Return the terms with the weights of each row multiplied by its gain."""
    return tuple(
        term.with_weight(term.weighted()[1].weight * factor)
        for term, factor in zip(terms, _factors(rows, gains), strict=True)
    )


def without_gains(rows: Rows, layer: QuantizedLayer) -> tuple[Term, ...]:
    """Return the terms of a layer with the weights that they had before the gains."""
    gains = np.ones(len(rows.rows), np.int64)
    gains[rows.of_value.ravel()] = np.broadcast_to(layer.gain, layer.shape).ravel()
    return tuple(
        term.with_weight(term.weighted()[1].weight // factor)
        for term, factor in zip(layer.terms, _factors(rows, gains), strict=True)
    )


def _factors(rows: Rows, gains: Array) -> list[Array]:
    """Return the gain of each filter of each term, with the dimensions of the term's weights."""
    factors = [
        np.ones((len(part.kernel.weight), *[1] * (part.kernel.weight.ndim - 1)), np.int64)
        for part in rows.parts
    ]
    for row, gain in zip(rows.rows, gains, strict=True):
        for part, channel in row:
            factors[part][channel] = gain
    return factors
