"""Computes the exact range of every accumulator: some input attains each end, and none exceeds it.

With weights q and inputs in [xmin, xmax], an accumulator lies in [Σ q⁺·xmin + q⁻·xmax, Σ q⁺·xmax + q⁻·xmin]
with q⁺ = max(q, 0), q⁻ = min(q, 0). Both ends are attained if every q belongs to a different pixel. Where
padding repeats a pixel, several taps read it, and their weights are added first. A tap that reads a zero
contributes the constant pad value. The computation uses integers only. A2Q (Colbert et al. 2023) gives the
bound for data types; this is the bound for the given weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from fheconv.arithmetic import OUTSIDE, ConvGeometry, exact_dtypes, tap_sources
from fheconv.basics.arrays import Array, ArrayLike, Shape, along_channels, as_array, channel_vector
from fheconv.basics.checks import check_integer
from fheconv.basics.errors import InvalidArgumentError
from fheconv.networks.integers import QuantizedLayer
from fheconv.networks.linear import Term
from fheconv.networks.quantization import twos_complement_bits

# In a circuit with lookups, a sum costs nothing extra while the bits of it that are looked up or decrypted,
# and its `norm_bits`, are together below this. tests/benchmarks/planes.py prints the complexity of TinyCNN by
# the total for its results, at p_error 0.01 and 0.05. With lookups of 5 bits, exact or rounded, it is 22.9e9
# and 20.9e9 up to 11.4 bits, and 33.0e9 and 30.6e9 from 13 bits on. With lookups of 6 bits the step lies
# between 10.3 and 11.4 bits. With lookups of 3 and 4 bits there is a smaller step below, at 7 bits; to stay
# under it would take six times the planes.
FREE_BITS = 10.5


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AccumulatorBounds:
    """Holds the exact minimum and maximum of every accumulator of a layer.

    Output positions that see the same taps share their bounds: `class_minimum` and `class_maximum` are
    (K, n_1, …, n_d), and `classes[axis][o]` says to which of the n_axis classes position `o` belongs.

    Example:
        >>> bounds = accumulator_bounds([[[1, -1]]], ConvGeometry.of((2,)), (4,), (0, 3))
        >>> bounds.minimum.tolist(), bounds.maximum.tolist()
        ([[-3, -3, -3]], [[3, 3, 3]])
    """

    class_minimum: Array
    class_maximum: Array
    classes: tuple[Array, ...]

    def __repr__(self) -> str:
        least, greatest = self.class_minimum.min(), self.class_maximum.max()
        return f"AccumulatorBounds: {len(self.class_minimum)} channels, {least} to {greatest}"

    @property
    def minimum(self) -> Array:
        """The minimum of every accumulator, (K, *Out)."""
        return self._everywhere(self.class_minimum)

    @property
    def maximum(self) -> Array:
        """The maximum of every accumulator, (K, *Out)."""
        return self._everywhere(self.class_maximum)

    def _everywhere(self, values: Array) -> Array:
        return values[np.ix_(np.arange(len(values)), *self.classes)]

    @cached_property
    def channel_minimum(self) -> Array:
        """The minimum over all positions, (K,)."""
        return self.class_minimum.reshape(len(self.class_minimum), -1).min(axis=1)

    @cached_property
    def channel_maximum(self) -> Array:
        """The maximum over all positions, (K,)."""
        return self.class_maximum.reshape(len(self.class_maximum), -1).max(axis=1)

    @property
    def channel_span(self) -> Array:
        """The number of steps between a channel's minimum and maximum, (K,)."""
        return self.channel_maximum - self.channel_minimum

    @property
    def offset_bits(self) -> int:
        """The width in offset form: each channel's minimum is subtracted first."""
        return int(self.channel_span.max()).bit_length()

    @property
    def twos_complement_bits(self) -> int:
        """The width when nothing is subtracted; it includes a sign bit if an accumulator can be negative."""
        return twos_complement_bits(int(self.channel_minimum.min()), int(self.channel_maximum.max()))

    def minimum_position(self, channel: int) -> tuple[int, ...]:
        """Return the first output position at which `channel` attains its minimum."""
        return self._position(self.class_minimum[channel] == self.channel_minimum[channel])

    def maximum_position(self, channel: int) -> tuple[int, ...]:
        """Return the first output position at which `channel` attains its maximum."""
        return self._position(self.class_maximum[channel] == self.channel_maximum[channel])

    def _position(self, classes: Array) -> tuple[int, ...]:
        return min(
            tuple(int(np.argmax(axis == number)) for axis, number in zip(self.classes, wanted, strict=True))
            for wanted in np.argwhere(classes)
        )


def max_taps(*, input_bits: int, weight_bits: int, accumulator_bits: int) -> int:
    """Return how many products of unsigned integers every accumulator of a width can hold.

    The number is ⌊(2^P − 1) / ((2^N − 1)·(2^M − 1))⌋, the data-type bound (Colbert et al. 2023, section 3).
    It holds for any weights. `AccumulatorBounds` is exact for given weights, and usually allows three or four
    times as many taps.

    Example:
        >>> max_taps(input_bits=2, weight_bits=2, accumulator_bits=7)
        14

    Raises `InvalidArgumentError` for widths that are not positive integers.
    """
    for name, bits in (
        ("input_bits", input_bits),
        ("weight_bits", weight_bits),
        ("accumulator_bits", accumulator_bits),
    ):
        check_integer(name, bits, 1)
    products = (2 ** int(input_bits) - 1) * (2 ** int(weight_bits) - 1)
    return int((2 ** int(accumulator_bits) - 1) // products)


def accumulator_bounds(
    weight: ArrayLike,
    geometry: ConvGeometry,
    spatial: Sequence[int],
    input_range: tuple[int, int],
    *,
    pad_value: int = 0,
    bias: ArrayLike | None = None,
) -> AccumulatorBounds:
    """Return the exact bounds of every accumulator of an integer convolution.

    `weight` (K, C/groups, *k) and `bias` (K,) are integers, `spatial` the input's sizes, `input_range`
    the (smallest, greatest) input.

    Example:
        >>> sobel = [[[[1, 0, -1], [2, 0, -2], [1, 0, -1]]]]
        >>> geometry = ConvGeometry.of((3, 3))
        >>> bounds = accumulator_bounds(sobel, geometry, (8, 8), (0, 15))
        >>> bounds.channel_minimum.tolist(), bounds.channel_maximum.tolist(), bounds.offset_bits
        ([-60], [60], 7)

    Raises `AccumulatorOverflowError` if the bounds or their span can exceed 2⁶³, and `InvalidArgumentError`
    for fractions or an empty range.
    """
    weight = _integers(weight, "weight")
    if weight.ndim != 2 + len(geometry.kernel) or weight.shape[2:] != geometry.kernel:
        raise InvalidArgumentError(
            f"weight has shape {weight.shape}; with this geometry it must be (K, C/groups, "
            f"{', '.join(map(str, geometry.kernel))})."
        )
    geometry.check_channels(weight.shape[1] * geometry.groups, weight.shape)
    low, high = input_range
    whole = all(isinstance(value, int | np.integer) for value in (low, high, pad_value))
    if not whole or low > high:
        raise InvalidArgumentError(
            f"input_range={input_range} and pad_value={pad_value} must be integers, the smaller end first."
        )
    low, high, pad_value = int(low), int(high), int(pad_value)
    # The difference of the extreme inputs is checked too, because the span must fit as well. These are Python
    # integers, because numpy turns integers beyond int64 into floats.
    extremes = [low, high, pad_value, max(high, pad_value) - min(low, pad_value)]
    bias = None if bias is None else channel_vector(_integers(bias, "bias"), len(weight))
    exact_dtypes(weight, np.array(extremes, dtype=object), math.prod(weight.shape[1:]), bias)
    weight = weight.astype(np.int64)
    bias = None if bias is None else bias.astype(np.int64)
    output = geometry.output_size(spatial)
    tables = [tap_sources(geometry, axis, spatial[axis], output[axis]) for axis in range(len(output))]
    classes, representatives = zip(*map(_alike, tables), strict=True) if tables else ((), ())
    shape = (len(weight), *map(len, representatives))
    minimum, maximum = np.empty(shape, np.int64), np.empty(shape, np.int64)
    for number in np.ndindex(*shape[1:]):
        rows = [table[o[n]] for table, o, n in zip(tables, representatives, number, strict=True)]
        merged = _merge(weight, rows)[0].reshape(len(weight), -1)
        positive, negative = np.maximum(merged, 0).sum(axis=1), np.minimum(merged, 0).sum(axis=1)
        minimum[:, *number] = positive * (low - pad_value) + negative * (high - pad_value)
        maximum[:, *number] = positive * (high - pad_value) + negative * (low - pad_value)
    # The constant counts every tap as if it read the pad value. The loop above added the difference of the
    # taps that read a pixel.
    constant = weight.reshape(len(weight), -1).sum(axis=1) * pad_value
    if bias is not None:
        constant = constant + bias
    constant = constant.reshape(-1, *[1] * len(output))
    return AccumulatorBounds(
        class_minimum=minimum + constant, class_maximum=maximum + constant, classes=tuple(classes)
    )


def _alike(table: Array) -> tuple[Array, Array]:
    """Sort the outputs of one axis into classes that read the same pattern of pixels.

    `table` comes from `tap_sources`. Returns the class of each output and one output of each class.
    """
    inside = table != OUTSIDE
    nearest = np.where(inside, table, np.iinfo(np.int64).max).min(axis=1, keepdims=True)
    pattern = np.where(inside, table - nearest, OUTSIDE)
    _, first, member = np.unique(pattern, axis=0, return_index=True, return_inverse=True)
    return member.reshape(-1), first


def _merge(weight: Array, rows: Sequence[Array]) -> tuple[Array, list[Array]]:
    """Add the weights (…, *k) of taps that read the same pixel, and leave out taps that read none.

    `rows` holds the sources of the taps, one row an axis. Returns the weights (…, *pixels) and the pixels.
    """
    pixels = []
    for axis, row in enumerate(rows):
        distinct = np.unique(row[row != OUTSIDE])
        belongs = (row == distinct[:, None]).astype(weight.dtype)
        at = weight.ndim - len(rows) + axis
        weight = np.moveaxis(np.tensordot(weight, belongs, axes=(at, 1)), -1, at)
        pixels.append(distinct)
    return weight, pixels


def _integers(value: Any, name: str) -> Array:
    array = as_array(value, name)
    if array.dtype.kind == "f":
        raise InvalidArgumentError(
            f"{name} has dtype {array.dtype}; bounds need integers, so quantize it first."
        )
    return array


def without_bias(layer: QuantizedLayer) -> QuantizedLayer:
    """Return the layer without its bias, as the circuit computes it: the client adds the bias."""
    return replace(layer, bias=np.zeros_like(layer.bias))


def layer_bounds(layer: QuantizedLayer, shapes: Sequence[Shape]) -> AccumulatorBounds:
    """Return the bounds of a layer's accumulators, `bias` included; `shapes` are those of all tensors.

    The inputs of a layer may take any values in their ranges. In an inner layer the bounds hold, but it is
    not checked that an image of the whole network attains them. Terms that read the same tensor are added
    first.
    """
    bounds = _sums_of_convolutions(layer, shapes) or _sums_of_terms(layer, shapes)
    if not layer.bias.any():
        return bounds
    if layer.bias.shape[1:] == (1,) * (len(layer.shape) - 1):
        return replace(
            bounds,
            class_minimum=bounds.class_minimum + layer.bias,
            class_maximum=bounds.class_maximum + layer.bias,
        )
    return _everywhere(bounds.minimum + layer.bias, bounds.maximum + layer.bias)


def _everywhere(minimum: Array, maximum: Array) -> AccumulatorBounds:
    """Return bounds that differ from position to position, from those of all accumulators (C, *S)."""
    classes = tuple(np.arange(size) for size in minimum.shape[1:])
    return AccumulatorBounds(class_minimum=minimum, class_maximum=maximum, classes=classes)


def _sums_of_convolutions(layer: QuantizedLayer, shapes: Sequence[Shape]) -> AccumulatorBounds | None:
    """Return the bounds without the bias, if each term is a convolution of a tensor of its own; else None."""
    found: list[AccumulatorBounds] = []
    for term, quantization in zip(layer.terms, layer.inputs, strict=True):
        if (kernel := term.convolution) is None or layer.sources.count(term.source) > 1:
            return None
        ends = quantization.minimum, quantization.maximum
        spatial, pad = shapes[term.source][1:], quantization.zero_point
        found.append(accumulator_bounds(kernel.weight, kernel.geometry, spatial, ends, pad_value=pad))
    if len(found) == 1:
        return found[0]
    ends = np.sum([(bounds.minimum, bounds.maximum) for bounds in found], axis=0)
    return _everywhere(*ends)


def _sums_of_terms(layer: QuantizedLayer, shapes: Sequence[Shape]) -> AccumulatorBounds:
    """Return the bounds without the bias, of any layer: from its matrices."""
    matrices: dict[int, Any] = {}
    minimum, maximum = np.zeros((2, *layer.shape), np.int64)
    for term, quantization in zip(layer.terms, layer.inputs, strict=True):
        shape = shapes[term.source]
        matrix = term.matrix(shape)
        matrices[term.source] = matrices[term.source] + matrix if term.source in matrices else matrix
        constant = term.apply(np.zeros((1, *shape), np.int64), quantization.zero_point)[0]
        minimum, maximum = minimum + constant, maximum + constant
    ranges = dict(zip(layer.sources, layer.inputs, strict=True))
    for source, matrix in matrices.items():
        low, high = ranges[source].minimum, ranges[source].maximum
        positive = np.asarray(matrix.maximum(0).sum(axis=0)).reshape(layer.shape)
        negative = np.asarray(matrix.minimum(0).sum(axis=0)).reshape(layer.shape)
        minimum = minimum + positive * low + negative * high
        maximum = maximum + positive * high + negative * low
    return _everywhere(minimum, maximum)


def norms(terms: Sequence[Term], shape: Shape, shapes: Sequence[Shape]) -> Array:
    """Return ‖w‖₂ of the weights of the sums (K, *S) of some terms, the greatest of each channel, (K,)."""
    total: Any = 0.0
    for term in terms:
        if (kernel := term.convolution) is not None:
            squares = np.square(kernel.weight.astype(np.float64)).reshape(len(kernel.weight), -1).sum(axis=1)
            total = total + along_channels(squares, len(shape))
        else:
            matrix = term.matrix(shapes[term.source]).astype(np.float64)
            total = total + np.asarray(matrix.power(2).sum(axis=0)).reshape(shape)
    squares = np.broadcast_to(total, shape).reshape(shape[0], -1).max(axis=1)
    return np.sqrt(squares)


def norm_bits(layer: QuantizedLayer, shapes: Sequence[Shape]) -> Array:
    """Return log2 ‖w‖₂ of the weights of an accumulator, the greatest of each channel, (K,).

    An encrypted sum loses this number of bits to the noise of its summands.
    """
    bits: Array = np.log2(np.maximum(norms(layer.terms, layer.shape, shapes), 1.0))
    return bits


def worst_case_inputs(layer: QuantizedLayer, shape: Shape, bounds: AccumulatorBounds) -> Array:
    """Return images on which each channel attains its minimum and its maximum, (2·K, C, *S).

    The layer must be one convolution, of images of `shape`. Image 2·c attains the minimum of channel c, image
    2·c + 1 its maximum. Other pixels are the smallest input in the first and the greatest in the second, so
    that the images cover the whole input range.
    """
    kernel = layer.convolution
    if kernel is None:
        raise InvalidArgumentError(f"Layer {layer.name!r} is not one convolution.")
    geometry, (quantization,) = kernel.geometry, layer.inputs
    filters, per_group = kernel.weight.shape[:2]
    spatial, output = shape[1:], layer.shape[1:]
    tables = [tap_sources(geometry, axis, spatial[axis], output[axis]) for axis in range(len(output))]
    images = np.empty((2 * filters, *shape), np.int64)
    images[0::2], images[1::2] = quantization.minimum, quantization.maximum
    for c in range(filters):
        first = c // (filters // geometry.groups) * per_group
        for which, position in enumerate((bounds.minimum_position(c), bounds.maximum_position(c))):
            rows = [table[o] for table, o in zip(tables, position, strict=True)]
            taps, pixels = _merge(kernel.weight[c], rows)
            greatest = (taps > 0) == bool(which)
            image: Any = images[2 * c + which, first : first + per_group]
            image[(slice(None), *np.ix_(*pixels))] = np.where(
                greatest, quantization.maximum, quantization.minimum
            )
    return images
