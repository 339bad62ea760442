"""Finds the encrypted sums of a circuit whose noise must stay small: what enters lookups, and the results.

What is added or multiplied together forms a block: some tensors, the weights of the layers that read them,
and the accumulators of these layers. Concrete gives a block one width, so that a narrow accumulator in the
block of a wide one becomes wider. And it gives a block one key, that of lookups of one width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fheconv.analysis.parameters import IMAGE, Noise, Pair, Sum
from fheconv.basics.arrays import Array
from fheconv.lowering.lower import Lowered
from fheconv.networks.floats import Maximum
from fheconv.networks.integers import AnyLayer, IntegerNetwork, QuantizedLayer
from fheconv.networks.linear import Kernel, Term
from fheconv.networks.quantization import twos_complement_bits
from fheconv.quantizer.components import connected

# Concrete does not widen a lookup of at most so many bits.
SHIFTED = 8


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Holds the sums of a circuit for each layer, and the conversions of lookups' results to other keys.

    `bits` is the width that Concrete gives the sums of each layer, `looked_up` that of its lookups (0: none).
    Layers of maxima have several sums. Other layers have one, or none if they only have constants.
    """

    by_layer: tuple[tuple[Sum, ...], ...]
    conversions: Mapping[Pair, int]
    bits: tuple[int, ...]
    looked_up: tuple[int, ...]

    @property
    def lookups(self) -> int:
        """The number of lookups."""
        return sum(one.count for sums in self.by_layer for one in sums if one.lookup is not None)


def sums_of(lowered: Lowered) -> Sums:
    """Return the sums of a circuit, with the partitions that Concrete makes of its lookups."""
    layers: list[AnyLayer] = [*lowered.network.layers[:-1], lowered.planes.layer]
    block = _blocks(lowered, layers)
    bits = _bits(lowered, layers, block)
    widened = [width - low.bits for width, low in zip(bits, lowered.layers, strict=True)]
    alive = _alive(lowered, layers)
    looked_up = tuple(
        (low.lookup_bits + (more if low.lookup_bits > SHIFTED else 0)) * (low.lookups > 0 and lives)
        for low, more, lives in zip(lowered.layers, widened, alive, strict=True)
    )
    partitions = {one: place for place, one in enumerate(sorted({*looked_up} - {0}))}
    keys = [partitions.get(one) for one in looked_up]
    homes = _homes(_key_blocks(lowered, layers, bits), keys)
    noises: list[Noise] = [{IMAGE: 1.0}]
    conversions: dict[Pair, int] = {}
    by_layer = []
    for number, (layer, low, key) in enumerate(zip(layers, lowered.layers, keys, strict=True)):
        home, after = homes[len(layers) + 1 + number], homes[number + 1]
        # A narrow value in a wide block is multiplied before its lookup, instead of a wider lookup.
        shift = 4.0 ** widened[number] if key is not None and low.lookup_bits <= SHIFTED else 1.0
        result: Noise = {} if key is None else {key: 1.0}
        if key is not None and key != after:
            result[key, after] = 1.0
            conversions[key, after] = conversions.get((key, after), 0) + low.lookups
        if isinstance(layer, Maximum):
            source, others = noises[layer.source], len(layer.index) - 1
            entering = [_sum([(source, 2 * shift), (result, before * shift)]) for before in range(others)]
            noises.append(_sum([(source, 1.0), (result, float(others))]))
        else:
            growths = [_growth(term, low.engine, lowered.network) for term in layer.terms]
            entering = [
                _sum([(noises[t.source], shift * g) for t, g in zip(layer.terms, growths, strict=True)])
            ]
            noises.append(result)
        last = number == len(layers) - 1
        width = bits[number] if last else looked_up[number]
        count = math.prod(layer.shape) if last else low.lookups // max(len(entering), 1)
        sums = (Sum(bits=width, noise=noise, home=home, lookup=key, count=count) for noise in entering)
        by_layer.append(tuple(sums) if last or key is not None else ())
    return Sums(by_layer=tuple(by_layer), conversions=conversions, bits=bits, looked_up=looked_up)


def _blocks(lowered: Lowered, layers: Sequence[AnyLayer]) -> Array:
    """Return the block of each tensor, and of the accumulators of each layer, in which widths are shared.

    Maxima are added to what they are taken of, and constants to accumulators times 0.
    """
    count = len(layers)
    pairs = [(source, count + 1 + n) for n, layer in enumerate(layers) for source in layer.sources]
    return connected(np.array([*pairs, *_added(lowered, layers)]).T, 2 * count + 1)


def _key_blocks(lowered: Lowered, layers: Sequence[AnyLayer], bits: Sequence[int]) -> Array:
    """Return the blocks of `_blocks` in which keys are shared, which Concrete makes after widths are known.

    It has folded products with 0, so constants are no longer in the block of what they are made of. And all
    paddings of one width are the same encrypted zero, which connects the blocks that read it. It also stands
    for the constants of a table in which others are looked up.
    """
    count, zeros = len(layers), dict[int, int]()
    pairs = _added(lowered, layers)
    for n, layer in enumerate(layers):
        at = count + 1 + n
        if not _constant(lowered, n):
            pairs += [(source, at) for source in layer.sources]
        if lowered.padded[n] or any(_partly_constant(lowered, source - 1) for source in layer.sources):
            pairs.append((zeros.setdefault(bits[n], at), at))
    return connected(np.array(pairs).T, 2 * count + 1)


def _added(lowered: Lowered, layers: Sequence[AnyLayer]) -> list[Pair]:
    """Return the tensors that are added to the accumulators of their own layer, each with these."""
    return [
        (n + 1, len(layers) + 1 + n)
        for n, layer in enumerate(layers)
        if isinstance(layer, Maximum) or _constant(lowered, n)
    ]


def _constant(lowered: Lowered, number: int) -> bool:
    """Return whether a layer delivers constants only: it is not the last, and has no lookups."""
    return number < len(lowered.layers) - 1 and not lowered.layers[number].lookups


def _partly_constant(lowered: Lowered, number: int) -> bool:
    """Return whether some values of a layer are looked up, and others are constants. The image is not."""
    layer = lowered.network.layers[number] if number >= 0 else None
    table = layer.lookup if isinstance(layer, QuantizedLayer) else None
    return table is not None and bool(table.constant.any()) and not _constant(lowered, number)


def _alive(lowered: Lowered, layers: Sequence[AnyLayer]) -> list[bool]:
    """Return for each layer whether results depend on it. Concrete leaves out what only constants read."""
    alive = [False] * len(layers) + [True]
    for number in reversed(range(len(layers))):
        if alive[number + 1] and not _constant(lowered, number):
            for source in layers[number].sources:
                alive[source] = True
    return alive[1:]


def _bits(lowered: Lowered, layers: Sequence[AnyLayer], block: Array) -> tuple[int, ...]:
    """Return the width of each layer's accumulators: that of the widest value in their block."""
    count, image = len(layers), lowered.interface.lanes.width(lowered.network.input.integer_bits)
    wide = np.zeros(block.max() + 1, int)
    wide[block[0]] = image
    for number, (layer, low) in enumerate(zip(layers, lowered.layers, strict=True)):
        own = [low.plane_bits, image if number == count - 1 else 0]
        if isinstance(layer, QuantizedLayer):
            kernels = [step for term in layer.terms for step in term.steps if isinstance(step, Kernel)]
            own += [
                twos_complement_bits(int(kernel.weight.min()), int(kernel.weight.max())) for kernel in kernels
            ]
            if (table := layer.lookup) is not None:
                entries = table.tables - table.centers[:, None]
                signed = twos_complement_bits(int(entries.min()), int(np.abs(entries).max()))
                after = block[number + 1]
                wide[after] = max(wide[after], signed)
        at = block[count + 1 + number]
        wide[at] = max(wide[at], *own)
    return tuple(wide[block[count + 1 :]].tolist())


def _homes(block: Array, keys: Sequence[int | None]) -> list[int]:
    """Return the partition whose key each block has, for each place of `block`.

    It is that of the lookups whose results are in the block. If there are none, it is that of the lookups
    that the block enters. If these have several partitions, it is the first.
    """
    count = len(keys)
    homes = {}
    for one in np.unique(block).tolist():
        made = {key for n, key in enumerate(keys) if key is not None and block[n + 1] == one}
        entered = {key for n, key in enumerate(keys) if key is not None and block[count + 1 + n] == one}
        homes[one] = min(made) if made else entered.pop() if len(entered) == 1 else 0
    return [homes[one] for one in block.tolist()]


def _growth(term: Term, engine: str, network: IntegerNetwork) -> float:
    """Return the factor by which a term multiplies variance: its greatest sum of squared weights.

    Concrete's analysis of noise starts the sums of a convolution with the variance of an input, not with 0.
    """
    shape, kernel = network.shapes[term.source], term.convolution
    if "matrix" in engine and kernel is not None and kernel.geometry.padding_mode == "zeros":
        # One channel of ones meets the squares of all channels' weights, except where there is padding.
        squares = np.square(kernel.weight.astype(np.float64)).sum(axis=1, keepdims=True)
        every = replace(kernel, weight=squares, geometry=replace(kernel.geometry, groups=1))
        return float(every.apply(np.ones((1, 1, *shape[1:])), 0).max())
    if "matrix" in engine:
        return float(term.matrix(shape).astype(np.float64).power(2).sum(axis=0).max())
    kernels = [step.weight.astype(np.float64) for step in term.steps if isinstance(step, Kernel)]
    return math.prod(1 + float((w**2).reshape(len(w), -1).sum(axis=1).max()) for w in kernels)


def _sum(parts: Sequence[tuple[Noise, float]]) -> Noise:
    """Return the noise of a sum, whose parts have their noise multiplied by a factor."""
    total: dict[int | Pair, float] = {}
    for noise, factor in parts:
        for source, times in noise.items():
            total[source] = total.get(source, 0.0) + factor * times
    return {source: times for source, times in total.items() if times}
