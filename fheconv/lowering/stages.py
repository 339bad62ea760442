"""Cuts the function of a network into stages, and these into blocks that can be computed one by one.

A stage is a layer. A block computes some of its outputs, and reads the image or results of earlier blocks.
All stages run under one key set, and a result goes from block to block as it is, encrypted. So whoever runs
them can stop between two blocks, or run the blocks of a stage on several machines.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from fheconv.arithmetic import OUTSIDE
from fheconv.basics.arrays import Array
from fheconv.basics.compile_config import Engine
from fheconv.lowering.blocks import Block
from fheconv.lowering.dialect import hint, plus, take
from fheconv.lowering.lanes import Lanes
from fheconv.lowering.layers import Lowering, Step, looked_up
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
    whole network, without stages.
    """

    lowered: Lowered
    blocks: tuple[Block, ...]
    functions: tuple[BlockFunction, ...]
    lookups: tuple[int, ...]
    sizes: tuple[int, ...]

    def run(self, x: Any) -> Any:
        """Return what `lowered.function` returns, computed block by block."""
        values = [x]
        for block, function in zip(self.blocks, self.functions, strict=True):
            values.append(function([values[value] for value in block.reads]))
        return values[-1]

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
    making = _Making(Lowering.of(network, engine))
    if _image_is_joined(network):
        making.pass_image_on()
    for number, layer in enumerate(network.layers[:-1]):
        wanted = counted = making.lowering.masks[number + 1]
        if isinstance(layer, QuantizedLayer) and layer.lookup is not None:
            counted = looked_up(layer.lookup, layer, wanted)
        for mask in parts(wanted, counted, blocks):
            making.add(number, layer, mask, partial(Lowering.each, wanted=mask, number=number))
    results = np.zeros(lowered.planes.layer.shape, bool)
    results.reshape(-1)[lowered.interface.outputs] = True
    last = partial(Lowering.last, planes=lowered.planes, wanted=results, lanes=Lanes.of(1, 1))
    making.add(len(network.layers) - 1, lowered.planes.layer, results, last)
    making.leave_unread_out()
    return Staged(
        lowered=lowered,
        blocks=tuple(making.blocks),
        functions=tuple(making.functions),
        lookups=tuple(making.lookups),
        sizes=tuple(making.sizes),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Piece:
    """Says which values (C, *S) of a tensor are in the value of that number."""

    value: int
    mask: Array


class _Making:
    """The blocks of a network that have been made so far, and the pieces of its tensors that they compute."""

    def __init__(self, lowering: Lowering) -> None:
        self.lowering = lowering
        self.blocks: list[Block] = []
        self.functions: list[BlockFunction] = []
        self.lookups: list[int] = []
        self.sizes = [int(lowering.masks[0].sum())]
        self._pieces = defaultdict(list, {0: [_Piece(value=0, mask=lowering.masks[0])]})

    def pass_image_on(self) -> None:
        """Add a block that returns the image, for those to read that would read it."""
        image = self._pieces[0]
        self._append(0, {0: image}, self._assembled({0: image}, lambda tensors: tensors[0]), 0)
        self._pieces[0] = [replace(image[0], value=1)]
        self.sizes.append(self.sizes[0])

    def add(
        self, number: int, layer: QuantizedLayer | Maximum, mask: Array, step_of: Callable[[Lowering], Step]
    ) -> None:
        """Add the block that computes the outputs `mask` of layer `number`, which `step_of` makes."""
        reads = _reads(layer, mask, self.lowering.masks, self._pieces)
        masks = list(self.lowering.masks)
        for tensor, pieces in reads.items():
            masks[tensor] = np.logical_or.reduce([piece.mask for piece in pieces])
        step = step_of(replace(self.lowering, masks=masks))
        self._append(number, reads, self._assembled(reads, step.function), step.layer.lookups)
        self._pieces[number + 1].append(_Piece(value=len(self.blocks), mask=mask))
        self.sizes.append(int(mask.sum()))

    def leave_unread_out(self) -> None:
        """Remove the blocks on which no result depends, and number the others anew.

        There are some where the trained weights read a value, and the integer weights there are all zero.
        """
        read = {len(self.blocks)}
        for block in reversed(self.blocks):
            read |= {*block.reads} if block.number in read else set()
        kept = [block for block in self.blocks if block.number in read]
        numbers = {block.number: number for number, block in enumerate(kept, 1)} | {0: 0}
        self.functions = [self.functions[block.number - 1] for block in kept]
        self.lookups = [self.lookups[block.number - 1] for block in kept]
        self.sizes = [self.sizes[0], *(self.sizes[block.number] for block in kept)]
        self.blocks = [
            replace(block, number=numbers[block.number], reads=tuple(numbers[n] for n in block.reads))
            for block in kept
        ]

    def _append(
        self, stage: int, reads: dict[int, list[_Piece]], function: BlockFunction, lookups: int
    ) -> None:
        values = tuple(piece.value for pieces in reads.values() for piece in pieces)
        self.blocks.append(Block(stage=stage, number=len(self.blocks) + 1, reads=values))
        self.functions.append(function)
        self.lookups.append(lookups)

    def _assembled(self, reads: dict[int, list[_Piece]], function: Callable[[Any], Any]) -> BlockFunction:
        """Return a block's function of values, from one that takes tensors by their numbers."""

        def block(values: Sequence[Any]) -> Any:
            given, tensors = iter(values), {}
            for tensor, pieces in reads.items():
                tensors[tensor] = self._joined(pieces, [next(given) for _ in pieces])
            return function(tensors)

        return block

    def _joined(self, pieces: list[_Piece], values: list[Any]) -> Any:
        """Return the values of a tensor that are there, in their order, from those of its pieces."""
        if pieces[0].value == 0:
            blank = self.lowering.blank(0)[pieces[0].mask]
            return plus(hint(values[0], self.lowering.network.input.integer_bits), -blank)
        if len(pieces) == 1:
            return values[0]
        order = np.argsort(np.concatenate([np.flatnonzero(piece.mask) for piece in pieces]))
        return take(np.concatenate(tuple(values), axis=1), order)


def parts(wanted: Array, counted: Array, blocks: int) -> list[Array]:
    """Return up to `blocks` masks that divide `wanted`, each with as many of the values `counted`.

    They go row by row. So blocks of neighbouring layers read few values of one another.
    """
    places = np.flatnonzero(wanted)
    axes = np.unravel_index(places, wanted.shape)
    order = np.lexsort((places, axes[0], axes[min(1, len(axes) - 1)]))
    weights = counted.reshape(-1)[places[order]].astype(np.int64)
    total = max(int(weights.sum()), 1)
    # Constants go with a lookup before or after them.
    part = np.minimum(np.cumsum(weights) - weights, total - 1) * blocks // total
    masks = []
    for number in np.unique(part):
        mask = np.zeros(wanted.shape, bool)
        mask.reshape(-1)[places[order[part == number]]] = True
        masks.append(mask)
    return masks


def _reads(
    layer: QuantizedLayer | Maximum, wanted: Array, masks: list[Array], pieces: Mapping[int, list[_Piece]]
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


def _image_is_joined(network: IntegerNetwork) -> bool:
    """Return whether the image must come through a block of its own.

    All blocks of a layer of accumulators take it in one form. Where others read it too, Concrete may choose
    another width or another secret key there. It gives one form to what a block returns.
    """
    readers = [layer for layer in network.layers if 0 in layer.sources]
    return len(readers) > 1 or any(isinstance(layer, Maximum) for layer in readers)
