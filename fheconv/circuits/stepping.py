"""Runs a circuit in stages, block by block, and goes on where an earlier run ended."""

import time
from collections.abc import Callable, Collection, Sequence

from fheconv.basics.checks import check_number
from fheconv.basics.errors import ArtifactError, UnfinishedError
from fheconv.basics.progress import track
from fheconv.circuits.ciphertext import Ciphertext
from fheconv.circuits.kept import Kept, name_of
from fheconv.lowering.blocks import Block

# Evaluates a block on the values that it reads.
Evaluate = Callable[[Block, list[bytes]], bytes]


def run_blocks(
    blocks: Sequence[Block],
    ciphertext: Ciphertext,
    evaluate: Evaluate,
    kept: Kept,
    time_limit: float | None = None,
) -> Ciphertext:
    """Return the results of encrypted images. Blocks whose results are `kept` do not run again.

    A value is dropped when no block reads it any more, so at most those of two stages of one image are kept,
    and the results of images that have finished. When all have, nothing is. Raises `UnfinishedError` after
    `time_limit` seconds, between two blocks.
    """
    if time_limit is not None:
        check_number("time_limit", time_limit, 0)
    names = [name_of(ciphertext, place) for place in range(len(ciphertext.values))]
    images = dict(zip(names, ciphertext.values, strict=True))
    end = None if time_limit is None else time.monotonic() + time_limit
    with kept.opened():
        todo = [(image, block) for image in images for block in missing(blocks, kept.numbers(image))]
        last_read = {(image, n): at for at, (image, block) in enumerate(todo) for n in block.reads}
        for at, (image, block) in enumerate(track(todo, "Running block by block…")):
            if end is not None and at and time.monotonic() > end:
                raise UnfinishedError(
                    f"time_limit={time_limit} seconds are over, and {len(todo) - at} of {len(todo)} blocks "
                    "are left. Their values are kept: run the same ciphertext again to go on."
                )
            values = [images[image] if n == 0 else _value(kept, image, n) for n in block.reads]
            kept.put(image, block.number, evaluate(block, values))
            for number in block.reads:
                if last_read[image, number] == at:
                    kept.drop(image, number)
        results = [_value(kept, image, len(blocks)) for image in names]
        for image in images:
            for number in kept.numbers(image):
                kept.drop(image, number)
    return ciphertext.with_results(results)


def missing(blocks: Sequence[Block], kept: Collection[int]) -> list[Block]:
    """Return the blocks that must run for the result of the last, where some values are there already.

    Example:
        >>> blocks = [Block(stage=n, number=n + 1, reads=(n,)) for n in range(3)]
        >>> [block.number for block in missing(blocks, {2})]
        [3]
    """
    wanted, found = {len(blocks)}, []
    for block in reversed(blocks):
        if block.number in wanted and block.number not in kept:
            found.append(block)
            wanted |= {*block.reads}
    return found[::-1]


def _value(kept: Kept, image: str, number: int) -> bytes:
    value = kept.get(image, number)
    if value is None:
        raise ArtifactError(
            f"Value {number} of the image, which was kept, is gone or altered; run the image again."
        )
    return value
