"""Splits each of the last accumulators into planes: several narrow sums, which the client adds up.

The last accumulators have no lookup, but a wide accumulator raises the price of the whole circuit. So the
integer weights of the last layer are written in digits, w = Σ base^p · d_p, and each digit gets its own
accumulator, a plane. If planes are still too wide, the taps are divided among several blocks, with one plane
for each block. After decryption, Σ base^p · plane is exactly the accumulator, because everything is linear.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fheconv.arithmetic import OUTSIDE
from fheconv.basics.arrays import Array, Shape, frozen
from fheconv.networks.bounds import FREE_BITS, AccumulatorBounds, layer_bounds, norm_bits, without_bias
from fheconv.networks.integers import QuantizedLayer
from fheconv.networks.linear import Kernel, Select, Step

# Planes cost ciphertexts and additions. Compared with lookups, this is almost nothing while planes are few,
# or while each result comes with many lookups. But Concrete reads all weights as text, a million in 3 s.
MOST_PLANES, LOOKUPS_A_RESULT, MOST_WEIGHTS = 32, 32, 10**6


@dataclass(frozen=True, kw_only=True, eq=False)
class Planes:
    """A layer without its bias, whose channels are replaced by their planes.

    `layer` (K·n, *S) computes the planes: plane p of channel c is its channel c·n + p. `bounds` are the
    bounds of its accumulators. The accumulators of the original layer are Σ `factors`[p] · plane p. They are
    `accumulator_bits` wide in offset form.
    """

    layer: QuantizedLayer
    bounds: AccumulatorBounds
    factors: Array
    accumulator_bits: int


def in_planes(layer: QuantizedLayer, shapes: Sequence[Shape], lookup_bits: int, lookups: int = 0) -> Planes:
    """Return the fewest planes of a layer that cost nothing extra with lookups of up to `lookup_bits` bits.

    There are at most `MOST_PLANES`, or more while `LOOKUPS_A_RESULT` of the `lookups` come with each result
    and all results together have at most `MOST_WEIGHTS`.

    If all planes cost something, return the cheapest, and the fewest of those. `shapes` are the shapes of the
    network's tensors. Without lookups (`lookup_bits` is 0) the result is one plane: the layer as it is.
    """
    layer = without_bias(layer)
    bounds = layer_bounds(layer, shapes)
    best = Planes(
        layer=layer, bounds=bounds, factors=np.ones(1, np.int64), accumulator_bits=bounds.offset_bits
    )
    if not lookup_bits:
        return best
    free, least = max(FREE_BITS, lookup_bits), _price_bits(layer, bounds, shapes)
    enough = min(lookups // LOOKUPS_A_RESULT, MOST_WEIGHTS // max(layer.taps, 1))
    most = max(MOST_PLANES, enough // math.prod(layer.shape))
    for base, digits, blocks in _divisions(layer, most):
        if least <= free:
            break
        divided = _divided(layer, shapes, base, digits, blocks)
        bounds = layer_bounds(divided, shapes)
        bits = _price_bits(divided, bounds, shapes)
        if bits < least:
            factors = np.repeat(base ** np.arange(digits), blocks)
            best, least = replace(best, layer=divided, bounds=bounds, factors=factors), bits
    return best


def _price_bits(layer: QuantizedLayer, bounds: AccumulatorBounds, shapes: Sequence[Shape]) -> float:
    """Return the number of bits that is compared with `FREE_BITS`. More bits make the circuit dearer."""
    return bounds.offset_bits + float(norm_bits(layer, shapes).max())


def _divisions(layer: QuantizedLayer, most: int) -> Iterator[tuple[int, int, int]]:
    """Yield (base, number of digits, number of blocks) of at most `most` planes, the fewest planes first."""
    greatest = max(int(np.abs(term.weighted()[1].weight).max(initial=0)) for term in layer.terms)
    bases: dict[int, int] = {}
    for digits in range(1, most + 1):
        # Digits go from −base/2 to base/2. With base 2 they would be −1 and 0 only: the base is at least 3.
        base = next(b for b in range(3, 2 * greatest + 4) if (b**digits - 1) // 2 >= greatest)
        bases.setdefault(base, digits)
        if base == 3:
            break
    blocks = [2**n for n in range(most.bit_length()) if 2**n <= max(layer.taps, 1)]
    divisions = [(base, n, b) for base, n in bases.items() for b in blocks if 1 < n * b <= most]
    yield from sorted(divisions, key=lambda division: division[1] * division[2])


def _divided(
    layer: QuantizedLayer, shapes: Sequence[Shape], base: int, digits: int, blocks: int
) -> QuantizedLayer:
    """Return the layer that computes a layer's planes: one plane for each digit and each block of taps."""
    planes = digits * blocks
    terms = []
    for term in layer.terms:
        at, kernel = term.weighted()
        parts = [part for digit in _digits(kernel.weight, base, digits) for part in _blocks(digit, blocks)]
        weight = np.stack(parts, axis=1).reshape(-1, *kernel.weight.shape[1:])
        befores = term.shapes(shapes[term.source])[at + 1 : -1]
        after = [_repeated(s, b, planes) for s, b in zip(term.steps[at + 1 :], befores, strict=True)]
        divided = term.with_weight(weight)
        terms.append(replace(divided, steps=(*divided.steps[: at + 1], *after)))
    channels, *size = layer.shape
    factors = np.tile(np.repeat(base ** np.arange(digits), blocks), channels)
    scale = np.repeat(np.broadcast_to(layer.scale, (channels, *layer.scale.shape[1:])), planes, axis=0)
    return replace(
        layer,
        shape=(channels * planes, *size),
        terms=tuple(terms),
        scale=frozen(scale * factors.reshape(-1, *[1] * len(size))),
        bias=np.zeros((1,) * len(layer.shape), np.int64),
        weight_range=(-base, base),
    )


def _repeated(step: Step, shape: Shape, planes: int) -> Step:
    """Return `step`, which works on the channels of `shape`, repeated for each plane of every channel."""
    if isinstance(step, Kernel):  # a pooling, which treats each channel separately
        geometry = replace(step.geometry, groups=step.geometry.groups * planes)
        return replace(step, weight=frozen(np.repeat(step.weight, planes, axis=0)), geometry=geometry)
    size = math.prod(shape[1:])
    channel, position = np.divmod(step.index, size)
    index = np.stack([(channel * planes + plane) * size + position for plane in range(planes)], axis=1)
    outside = np.repeat(step.index == OUTSIDE, planes, axis=0)
    return Select(index=frozen(np.where(outside, OUTSIDE, index.reshape(outside.shape))))


def _digits(weight: Array, base: int, count: int) -> list[Array]:
    """Return integers as `count` digits from about −base/2 to base/2, the lowest digit first.

    Signed digits are smaller than the digits of the magnitude, whose planes would be one bit wider.
    """
    digits = []
    for _ in range(count - 1):
        digit = (weight + base // 2) % base - base // 2
        digits.append(digit)
        weight = (weight - digit) // base
    return [*digits, weight]


def _blocks(weight: Array, count: int) -> list[Array]:
    """Return weights (K, C/groups, *k) as `count` summands. The taps are divided evenly among them."""
    taps = weight[0].size
    block = (np.arange(taps) * count // taps).reshape(weight.shape[1:])
    return [np.where(block == number, weight, 0) for number in range(count)]
