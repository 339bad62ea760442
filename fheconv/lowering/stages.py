"""Cuts the function of a network into stages, and these into blocks that can be computed one by one.

A stage is a layer. A block computes some of its outputs, and reads the image or results of earlier blocks.
All stages run under one key set, and a result goes from block to block as it is, encrypted. So whoever runs
them can stop between two blocks, or run the blocks of a stage on several machines.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from fheconv.arithmetic import OUTSIDE
from fheconv.basics.arrays import Array
from fheconv.basics.compile_config import Engine
from fheconv.lowering.blocks import Block
from fheconv.lowering.dialect import hint, plus, take
from fheconv.lowering.lanes import Lanes
from fheconv.lowering.layers import Lowering, looked_up
from fheconv.lowering.lower import Lowered, lower
from fheconv.networks.floats import Maximum
from fheconv.networks.integers import IntegerNetwork, QuantizedLayer

# Takes the values that a block reads, each (1, n), and returns its result (1, m).
BlockFunction: TypeAlias = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Staged:
    """A network's function in blocks, the last of which returns the results.

    `functions` are what the `blocks` compute, and `lookups` the number of their lookups. `sizes` holds how
    many integers there are in the image and in the result of each block. `lowered` is the function of the
    whole network, whose `function` here runs block by block.
    """

    lowered: Lowered
    blocks: tuple[Block, ...]
    functions: tuple[BlockFunction, ...]
    lookups: tuple[int, ...]
    sizes: tuple[int, ...]

    def inputset(self, block: Block) -> tuple[Array, ...]:
        """Return the inputs of a block that Concrete sees at compilation, in the order of its values."""
        image = self.lowered.inputset()
        return tuple(image if n == 0 else np.zeros((1, self.sizes[n]), np.int64) for n in block.reads)


def in_stages(network: IntegerNetwork, engine: Engine, blocks: int) -> Staged:
    """Return the function of a network with lookups, in a stage for each layer.

    Each stage has up to `blocks` blocks with equally many lookups. The last, which has none, has one block.

    Raises `InvalidArgumentError` if the named engine cannot run a layer.
    """
    lowered = lower(network, engine)
    lowering = Lowering.of(network, engine)
    image_bits = _image_bits(lowered)
    pieces: list[list[_Piece]] = [[_Piece(value=0, mask=lowering.masks[0])]]
    made: list[Block] = []
    functions: list[BlockFunction] = []
    lookups: list[int] = []
    sizes = [int(lowering.masks[0].sum())]
    for number, wanted in enumerate(_wanted(lowered, lowering)):
        last = number == len(network.layers) - 1
        layer = lowered.planes.layer if last else network.layers[number]
        pieces.append([])
        for mask in [wanted] if last else _parts(layer, wanted, blocks):
            reads = _reads(layer, mask, lowering.masks, pieces)
            own = _Assembly(lowering=lowering, reads=reads, image_bits=image_bits)
            if last:
                step = own.lowering.last(lowered.planes, mask, Lanes.of(1, 1))
            else:
                step = own.lowering.each(mask, number)
            functions.append(own.function(step.function))
            values = tuple(piece.value for each in reads.values() for piece in each)
            made.append(Block(stage=number, number=len(made) + 1, reads=values))
            lookups.append(step.layer.lookups)
            pieces[-1].append(_Piece(value=len(made), mask=mask))
            sizes.append(int(mask.sum()))

    def run(x: Any) -> Any:
        values = [x]
        for block, function in zip(made, functions, strict=True):
            values.append(function([values[value] for value in block.reads]))
        return values[-1]

    return Staged(
        lowered=replace(lowered, function=run),
        blocks=tuple(made),
        functions=tuple(functions),
        lookups=tuple(lookups),
        sizes=tuple(sizes),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Piece:
    """Says which values (C, *S) of a tensor are in the value of that number."""

    value: int
    mask: Array


class _Assembly:
    """Puts tensors together from pieces, by the number of the tensor, for the function of a block."""

    def __init__(self, *, lowering: Lowering, reads: dict[int, list[_Piece]], image_bits: int) -> None:
        masks = list(lowering.masks)
        for tensor, pieces in reads.items():
            masks[tensor] = np.logical_or.reduce([piece.mask for piece in pieces])
        self.lowering = replace(lowering, masks=masks)
        self._reads, self._image_bits = reads, image_bits

    def function(self, step: Callable[[Any], Any]) -> BlockFunction:
        """Return the function of a block from that of its step, which takes tensors."""

        def block(values: Sequence[Any]) -> Any:
            given, tensors = iter(values), {}
            for tensor, pieces in self._reads.items():
                tensors[tensor] = self._joined(tensor, pieces, [next(given) for _ in pieces])
            return step(tensors)

        return block

    def _joined(self, tensor: int, pieces: list[_Piece], values: list[Any]) -> Any:
        """Return the values of a tensor that are there, in their order, from those of its pieces."""
        if tensor == 0:
            blank = self.lowering.blank(0)[pieces[0].mask]
            return plus(hint(values[0], self._image_bits), -blank)
        if len(pieces) == 1:
            return values[0]
        order = np.argsort(np.concatenate([np.flatnonzero(piece.mask) for piece in pieces]))
        return take(np.concatenate(tuple(values), axis=1), order)


def _wanted(lowered: Lowered, lowering: Lowering) -> list[Array]:
    """Return a mask of what each layer computes: what is read of it, and results that are not constant."""
    results = np.zeros(lowered.planes.layer.shape, bool)
    results.reshape(-1)[lowered.interface.outputs] = True
    return [*lowering.masks[1:-1], results]


def _parts(layer: QuantizedLayer | Maximum, wanted: Array, blocks: int) -> list[Array]:
    """Return up to `blocks` masks that divide `wanted`, with equally many lookups, row by row.

    So blocks of neighbouring layers read few values of one another.
    """
    places = np.flatnonzero(wanted)
    axes = np.unravel_index(places, wanted.shape)
    order = np.lexsort((places, axes[0], axes[min(1, len(axes) - 1)]))
    counted = wanted
    if isinstance(layer, QuantizedLayer) and layer.lookup is not None:
        counted = looked_up(layer.lookup, layer, wanted)
    weights = counted.reshape(-1)[places[order]].astype(np.int64)
    before = np.cumsum(weights) - weights
    part = np.minimum(before * blocks // max(int(weights.sum()), 1), blocks - 1)
    masks = []
    for number in np.unique(part):
        mask = np.zeros(wanted.shape, bool)
        mask.reshape(-1)[places[order[part == number]]] = True
        masks.append(mask)
    return masks


def _reads(
    layer: QuantizedLayer | Maximum, wanted: Array, masks: list[Array], pieces: list[list[_Piece]]
) -> dict[int, list[_Piece]]:
    """Return the pieces that the values `wanted` of a layer depend on, by the number of their tensor."""
    read: dict[int, Array] = {}
    if isinstance(layer, Maximum):
        index = layer.index[:, wanted].ravel()
        read[layer.source] = np.zeros(masks[layer.source].shape, bool)
        read[layer.source].reshape(-1)[index[index != OUTSIDE]] = True
    else:
        for term in layer.terms:
            mask = term.read(wanted, masks[term.source].shape)
            read[term.source] = read.get(term.source, False) | mask
    found: dict[int, list[_Piece]] = {
        tensor: [piece for piece in pieces[tensor] if (piece.mask & mask).any()]
        for tensor, mask in read.items()
    }
    found = {tensor: some for tensor, some in found.items() if some}
    # A layer without weights reads something all the same: Concrete has no constant results.
    first = layer.sources[0]
    return found or {first: pieces[first][:1]}


def _image_bits(lowered: Lowered) -> int:
    """Return the width of the image, which is the same in all blocks that read it.

    In Concrete, the inputs of a layer and its accumulators have one width. So have all layers that read the
    image, or a tensor that is read beside it.
    """
    network = lowered.network
    joined, bits = {0}, network.input.integer_bits
    grown = True
    while grown:
        before = len(joined)
        for number, layer in enumerate(network.layers):
            if joined.isdisjoint(layer.sources):
                continue
            joined |= {*layer.sources, *({number + 1} if isinstance(layer, Maximum) else ())}
            bits = max(bits, lowered.layers[number].plane_bits)
        grown = len(joined) > before
    return bits
