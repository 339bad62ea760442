"""The last accumulators in planes: several narrow ones in place of a wide one, added up by the client.

Nothing is looked up in the last accumulators, but every width raises the price of the whole circuit. So the
integer weights of the last layer are written in digits, w = Σ base^p · d_p, and each digit has an accumulator
of its own. Where those are still too wide, the taps are dealt out to several blocks with one each. After
decryption Σ base^p · plane is the accumulator, exactly, because everything is linear.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fheconv.arithmetic import OUTSIDE
from fheconv.basics.arrays import Array, Shape, frozen
from fheconv.networks.bounds import AccumulatorBounds, layer_bounds, norm_bits, without_bias
from fheconv.networks.integers import QuantizedLayer
from fheconv.networks.linear import Kernel, Select, Step

# Beside lookups, results cost nothing extra while their width and the log2 of their weights' Euclidean norm,
# by which noise grows, stay below so many bits together. tests/benchmarks/planes.py prints the complexity of
# TinyCNN by that sum, at p_error 0.01 and 0.05: with lookups of 5 bits, exact or rounded, 22.9e9 and 20.9e9
# up to 11.4 bits, 33.0e9 and 30.6e9 from 13 on; with 6 bits the step lies between 10.3 and 11.4 bits. With
# lookups of 3 and 4 bits there is a smaller step below, at 7 bits, which would take six times the planes.
FREE_BITS = 10.5
# Planes cost ciphertexts and additions: next to nothing beside lookups, while they are few.
MOST_PLANES = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Planes:
    """A layer without its bias, its channels replaced by their planes.

    `layer` (K·n, *S) computes them, plane p of channel c as channel c·n + p, and `bounds` are the bounds of
    its accumulators. The layer's own accumulators, `accumulator_bits` wide in offset form, are
    Σ `factors`[p] · plane p.
    """

    layer: QuantizedLayer
    bounds: AccumulatorBounds
    factors: Array
    accumulator_bits: int


def in_planes(layer: QuantizedLayer, shapes: Sequence[Shape], lookup_bits: int) -> Planes:
    """Return the fewest planes of a layer that cost nothing beside lookups of up to `lookup_bits` bits.

    Where no planes cost nothing, the cheapest, and of those the fewest. `shapes` are those of the network's
    tensors. Where there are no lookups, of 0 bits, it is one plane: the layer as it is.
    """
    layer = without_bias(layer)
    bounds = layer_bounds(layer, shapes)
    best = Planes(
        layer=layer, bounds=bounds, factors=np.ones(1, np.int64), accumulator_bits=bounds.offset_bits
    )
    if not lookup_bits:
        return best
    free, least = max(FREE_BITS, lookup_bits), _price_bits(layer, bounds, shapes)
    for base, digits, blocks in _divisions(layer):
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
    """Return what `FREE_BITS` bounds: the more, the dearer the circuit."""
    return bounds.offset_bits + float(norm_bits(layer, shapes).max())


def _divisions(layer: QuantizedLayer) -> Iterator[tuple[int, int, int]]:
    """Yield bases with their numbers of digits, and numbers of blocks, those of the fewest planes first."""
    greatest = max(int(np.abs(term.weighted()[1].weight).max(initial=0)) for term in layer.terms)
    bases: dict[int, int] = {}
    for digits in range(1, MOST_PLANES + 1):
        # Digits from −base/2 to base/2: three values at least, or none but −1 and 0 would be left.
        base = next(b for b in range(3, 2 * greatest + 4) if (b**digits - 1) // 2 >= greatest)
        bases.setdefault(base, digits)
        if base == 3:
            break
    blocks = [2**n for n in range(MOST_PLANES.bit_length()) if 2**n <= max(layer.taps, 1)]
    divisions = [(base, n, b) for base, n in bases.items() for b in blocks if 1 < n * b <= MOST_PLANES]
    yield from sorted(divisions, key=lambda division: division[1] * division[2])


def _divided(
    layer: QuantizedLayer, shapes: Sequence[Shape], base: int, digits: int, blocks: int
) -> QuantizedLayer:
    """Return the layer of a layer's planes: for each digit, one for each block of taps."""
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
    """Return what does for each plane of all channels what `step` does for the channels of `shape`."""
    if isinstance(step, Kernel):  # a pooling, each channel by itself
        geometry = replace(step.geometry, groups=step.geometry.groups * planes)
        return replace(step, weight=frozen(np.repeat(step.weight, planes, axis=0)), geometry=geometry)
    size = math.prod(shape[1:])
    channel, position = np.divmod(step.index, size)
    index = np.stack([(channel * planes + plane) * size + position for plane in range(planes)], axis=1)
    outside = np.repeat(step.index == OUTSIDE, planes, axis=0)
    return Select(index=frozen(np.where(outside, OUTSIDE, index.reshape(outside.shape))))


def _digits(weight: Array, base: int, count: int) -> list[Array]:
    """Return integers as `count` digits of about −base/2 to base/2, the last one in units first.

    Signed digits: they are smaller than those of the magnitude, whose planes would be a bit wider.
    """
    digits = []
    for _ in range(count - 1):
        digit = (weight + base // 2) % base - base // 2
        digits.append(digit)
        weight = (weight - digit) // base
    return [*digits, weight]


def _blocks(weight: Array, count: int) -> list[Array]:
    """Return weights (K, C/groups, *k) as `count` summands, which share their taps evenly."""
    taps = weight[0].size
    block = (np.arange(taps) * count // taps).reshape(weight.shape[1:])
    return [np.where(block == number, weight, 0) for number in range(count)]
