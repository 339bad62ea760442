"""Takes over the integer weights of models that were trained for integers.

Such a model multiplies integers with a scale for each filter. The integers can be read off the products: they
are the least ones whose ratios are those of the weights, as exactly as float32 tells. Where filters of
different scales meet in one accumulator, as in a sum of two branches, all are counted in a common step: one
that divides the steps of all, or else one that is so small that results hardly differ.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fheconv.basics.arrays import Array, Shape
from fheconv.basics.warning import RequantizationWarning, warn
from fheconv.networks.floats import Layer, Network
from fheconv.networks.grids import ROUNDING_OPERATORS, trained_quantization
from fheconv.networks.integers import IntegerNetwork, QuantizedLayer
from fheconv.networks.quantization import Quantization
from fheconv.quantizer.rows import IntegerTerms, Rows
from fheconv.quantizer.windows import LOOKUP_LIMIT

# Weights of 8 bits, less a zero-point of 8 bits, are at most this far from 0.
GREATEST = 255
# By how much weights may differ from integers times their scale, as a share: a few roundings of float32.
FLOAT_ERROR = 2.0**-21
# If filters have no step in common, their sums may be wrong by this share of a step of the activation.
ERROR = 1e-3
# Steps are the greatest one divided by at most this number.
MOST_COUNTS = 4096
# So many sizes of a step are tried between those that the two steps suggest.
STEPS = 9
# With more parts of a step, two steps have a common one by chance.
MOST_EXACT = 64
# Sums of two tensors of few integers are compared for all pairs of these, at most so many.
MOST_PAIRS = 2**16


class _Filter(NamedTuple):
    """Holds the integers and the step of a filter's weights, and the greatest span of its sums, in steps."""

    integers: Array
    step: float
    span: int


def grid(weights: Array) -> tuple[Array, Array] | None:
    """Return the least integers (K, n), and scales (K,), whose products are the weights (K, n).

    Return None if one filter has none of at most `GREATEST`. Filters of zeros have the scale 0.

    Example:
        >>> integers, scales = grid(np.array([[0.3, -0.2, 0.5]]))
        >>> integers.tolist(), scales.round(6).tolist()
        ([[3, -2, 5]], [0.1])
    """
    weights = weights.astype(np.float64)
    sizes = np.abs(weights).max(axis=1, initial=0.0)
    found, open_ = np.zeros(weights.shape, np.int64), np.flatnonzero(sizes)
    shares = weights[open_] / sizes[open_, None]
    for greatest in range(1, GREATEST + 1):
        steps = shares * greatest
        integers = np.rint(steps)
        fits = np.abs(steps - integers).max(axis=1, initial=0.0) <= greatest * FLOAT_ERROR
        found[open_[fits]] = integers[fits]
        open_, shares = open_[~fits], shares[~fits]
        if not open_.size:
            break
    if open_.size:
        return None
    squares = np.square(found).sum(axis=1)
    products = np.einsum("kn,kn->k", weights, found.astype(np.float64))
    return found, np.divide(products, squares, out=np.zeros(len(weights)), where=squares > 0)


def trained_weights(
    layer: Layer,
    inputs: Sequence[Quantization],
    shapes: Sequence[Shape],
    output: Quantization | None,
    limit: int | None,
) -> IntegerTerms | None:
    """Return the integer weights that training has left in a layer, or None if it has left none.

    `output` is the quantization of the layer's activation, None for the last layer. Accumulators may have
    `limit` bits (None: those of a lookup): where filters have no step in common, this decides how nearly
    they are counted in one.
    """
    limit = LOOKUP_LIMIT if limit is None else limit
    rows = Rows(layer, inputs, shapes)
    integers: list[Array] = [np.zeros(0, np.int64)] * len(rows.rows)
    scales = np.zeros(len(rows.rows))
    for numbers in rows.alike():
        first = rows.rows[numbers[0]]
        ends = np.cumsum([rows.parts[part].kernel.weight[channel].size for part, channel in first])[:-1]
        grids = [grid(block) for block in np.split(rows.stacked(numbers), ends, axis=1)]
        ranges = [int(found[0]) for found in np.split(rows.ranges(rows.inputs(first)), ends)]
        for at, number in enumerate(numbers):
            filters = []
            for found, one in zip(grids, ranges, strict=True):
                if found is None:
                    return None
                span = int(np.abs(found[0][at]).sum()) * one
                filters.append(_Filter(found[0][at], float(found[1][at]), span))
            meeting = _Meeting(layer, rows, number, inputs, output, limit)
            factors, scales[number] = meeting.common_step(filters)
            integers[number] = np.concatenate(
                [one.integers * factor for one, factor in zip(filters, factors, strict=True)]
            )
    greatest = max(int(np.abs(values).max(initial=1)) for values in integers)
    most = 2 ** greatest.bit_length() - 1
    return rows.assemble(integers, scales, (-most, most))


def with_own_widths(network: IntegerNetwork) -> IntegerNetwork:
    """Return the network whose configuration has the widths of its weights as they are."""
    layers = (layer for layer in network.layers if isinstance(layer, QuantizedLayer))
    widths = {layer.name: min(layer.weight_range[1].bit_length() + 1, 8) for layer in layers}
    return replace(network, config=replace(network.config, weight_bits=widths))


def warn_of_losses(network: Network, layers: Sequence[str]) -> None:
    """Warn of what training for integers has left and the integer network has not, if there is anything.

    `layers` names those whose weights are rounded anew. Activations that round in a way of their own are
    found here.
    """
    freely = [
        layer.name
        for layer in network.layers
        if isinstance(layer, Layer)
        and layer.activation is not None
        and not ROUNDING_OPERATORS.isdisjoint(layer.activation.operators())
        and trained_quantization(layer.activation) is None
    ]
    for what, lost in (("The weights", layers), ("What the activations round to", freely)):
        if lost:
            warn(
                f"{what} in {', '.join(map(repr, lost))} cannot be kept as training for integers has left "
                "them: they are not whole numbers times a scale, at most 256 and with 0 among them. They are "
                "quantized anew, by calibration, which may cost accuracy.",
                RequantizationWarning,
            )


@dataclass(frozen=True, eq=False)
class _Meeting:
    """Finds a common step for the filters that meet in row `number` of a layer."""

    layer: Layer
    rows: Rows
    number: int
    inputs: Sequence[Quantization]
    output: Quantization | None
    limit: int

    def common_step(self, filters: Sequence[_Filter]) -> tuple[list[int], float]:
        """Return the factors by which to multiply the integers of filters, and the real size of a step."""
        steps = np.array([one.step for one in filters])
        spans = np.array([float(one.span) for one in filters])
        if not steps.any():
            return [1] * len(filters), 0.0
        greatest = steps.max()
        counts = np.arange(1, MOST_COUNTS + 1)[:, None]
        factors = np.rint(steps * counts / greatest)
        errors = (np.abs(steps - factors * greatest / counts) * spans).sum(axis=1)
        narrow = (factors * spans).sum(axis=1) < 2**self.limit
        narrow[0] = True
        exact = (errors <= FLOAT_ERROR * float((steps * spans).sum())) & (counts[:, 0] <= MOST_EXACT)
        pairs = self._pairs(filters) if len(filters) == 2 and not exact[0] else None
        if pairs is not None:
            for own in factors[narrow & (factors > 0).all(axis=1)]:
                first, last = (steps / own).tolist()
                for step in np.linspace(first, last, STEPS):
                    if pairs(own, step):
                        return [int(one) for one in own], float(step)
        close = exact if exact.any() else narrow & (errors <= self._allowed(steps, spans))
        found = iter(np.flatnonzero(close))
        best = next(found, np.where(narrow, errors, np.inf).argmin())
        return [int(one) for one in factors[best]], float(greatest / counts[best, 0])

    def _allowed(self, steps: Array, spans: Array) -> float:
        """Return by how much the sums may be wrong, as a real number."""
        unit = abs(self.rows.parts[0].unit)
        of_sums = float((steps * spans).sum()) / 2**self.limit
        return of_sums if self.output is None else ERROR * self.output.scale / unit

    def _pairs(self, filters: Sequence[_Filter]) -> Callable[[Array, float], bool] | None:
        """Return a test of factors and a step: whether the layer's results stay for all pairs of inputs.

        None if the sums are not of two values, or there are too many pairs.
        """
        row, layer = self.rows.rows[self.number], self.layer
        places = np.flatnonzero(self.rows.of_value.ravel() == self.number)
        _, first = np.unique(layer.bias.ravel()[places], return_index=True)
        places = places[first] if layer.activation is None or not layer.activation.arrays() else places
        pairs = len(places) * math.prod(one.span + 1 for one in filters)
        single = all(one.integers.size == 1 and abs(one.integers[0]) == 1 for one in filters)
        if not single or pairs > MOST_PAIRS or layer.activation is None or self.output is None:
            return None
        activation, output = layer.activation.at(layer.shape, places), self.output
        unit, bias = self.rows.parts[0].unit, layer.bias.ravel()[places, None, None]
        a, b = (
            (np.arange(q.minimum, q.maximum + 1) - q.zero_point) * int(one.integers[0])
            for q, one in zip((self.inputs[part] for part, _ in row), filters, strict=True)
        )

        def results(factors: Sequence[float] | Array, step: float) -> Array:
            sums = factors[0] * a[:, None] + factors[1] * b
            return output.nearest(activation(unit * step * sums + bias))

        expected = results([one.step for one in filters], 1.0)
        return lambda factors, step: bool((results(factors, step) == expected).all())
