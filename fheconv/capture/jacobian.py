"""Measures the sparse matrix of a linear function, in memory that its entries need."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import scipy.sparse

from fheconv.basics.arrays import Array
from fheconv.capture.calls import BATCH
from fheconv.capture.graph import Unsupported
from fheconv.networks.composition import MOST_ENTRIES

# A linear function of rows (n, inputs), which gives rows (n, outputs).
Rows: TypeAlias = Callable[[Array], Array]

_COLOURS = 64
# So many numbers are run through the operator at once.
_PIECE = 2**22


def sparse_matrix(forward: Rows, backward: Rows, inputs: int, outputs: int) -> scipy.sparse.csr_array:
    """Return the matrix (inputs, outputs) of a linear function, in memory that its entries need.

    `forward` applies it to rows, `backward` applies the transposed matrix.
    Raises `Unsupported` if it has more than `MOST_ENTRIES` entries.
    """
    if outputs < inputs:
        return scipy.sparse.csr_array(sparse_matrix(backward, forward, outputs, inputs).T)
    width = 1 << max(inputs - 1, 0).bit_length()
    # Blocks of inputs, and which outputs each may reach: halved until a block is one input.
    starts, reach = [0], [np.arange(outputs)]
    values = [np.zeros(0)]
    while True:
        reach, values = _reached(forward, starts, width, reach, inputs, outputs)
        if sum(map(len, reach)) > MOST_ENTRIES:
            raise Unsupported(
                f"it is linear, but its outputs read so many of the {inputs:,} values that its matrix has "
                f"more than {MOST_ENTRIES:,} entries; reduce the image before it"
            )
        if width == 1:
            break
        width //= 2
        halves = [(s, r) for start, r in zip(starts, reach, strict=True) for s in (start, start + width)
                  for r in [r] if s < inputs and len(r)]  # fmt: skip
        starts, reach = [s for s, _ in halves], [r for _, r in halves]
        if not starts:
            return scipy.sparse.csr_array((inputs, outputs))
    rows = np.repeat(starts, [len(r) for r in reach])
    entries = np.concatenate(values), (rows, np.concatenate(reach))
    return scipy.sparse.csr_array(entries, shape=(inputs, outputs))


def _reached(
    forward: Rows, starts: Sequence[int], width: int, reach: Sequence[Array], inputs: int, outputs: int
) -> tuple[list[Array], list[Array]]:
    """Return which outputs each block of inputs reaches, and their values.

    Blocks that reach none in common share an image (Curtis, Powell and Reid 1974). A block shows random
    numbers, of which no two sums cancel; a block of one shows 1.
    """
    rng = np.random.default_rng(width)
    shown = np.ones(inputs) if width == 1 else rng.uniform(0.5, 1, inputs) * rng.choice([-1.0, 1.0], inputs)
    images = _coloured(reach, outputs)
    found: list[Array] = [np.zeros(0, np.int64)] * len(starts)
    values: list[Array] = [np.zeros(0)] * len(starts)
    count = max(BATCH, _PIECE // max(inputs, outputs))
    for first in range(0, len(images), count):
        piece = images[first : first + count]
        rows = np.zeros((len(piece), inputs))
        for row, blocks in zip(rows, piece, strict=True):
            for block in blocks:
                own = slice(starts[block], starts[block] + width)
                row[own] = shown[own]
        for result, blocks in zip(forward(rows), piece, strict=True):
            for block in blocks:
                own_values = result[reach[block]]
                found[block] = reach[block][own_values != 0]
                values[block] = own_values[own_values != 0]
    return found, values


def _coloured(reach: Sequence[Array], outputs: int) -> list[list[int]]:
    """Return the numbers of the blocks in lists of those that reach no output in common."""
    used = np.zeros(outputs, np.uint64)
    images: list[list[int]] = [[] for _ in range(_COLOURS)]
    alone: list[list[int]] = []
    for block, own in enumerate(reach):
        taken = int(np.bitwise_or.reduce(used[own]))
        free = ~taken & (2**_COLOURS - 1)
        if not free:
            alone.append([block])
            continue
        lowest = free & -free
        used[own] |= np.uint64(lowest)
        images[lowest.bit_length() - 1].append(block)
    return [one for one in images if one] + alone
