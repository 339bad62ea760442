"""Divides a ciphertext into works, each for one of a server's workers at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from fheconv.circuits.ciphertext import Ciphertext
from fheconv.circuits.keys import StoredKeys
from fheconv.circuits.server import Server
from fheconv.lowering.blocks import Block

# The circuits that a server serves, by their fingerprints, all in one worker.
Circuits: TypeAlias = Mapping[str, Server]


@dataclass(frozen=True, kw_only=True)
class Work:
    """Describes what a worker does without a pause: an image, or a block of one in a circuit in stages.

    `evaluate` takes the worker's circuits and the results of the works at the places `reads`, all before it.
    """

    evaluate: Callable[[Circuits, Sequence[bytes]], bytes]
    reads: tuple[int, ...] = ()


def works_of(server: Server, ciphertext: Ciphertext, keys: StoredKeys) -> list[Work]:
    """Return the works of a ciphertext, each after those that it reads. The results are read by none."""
    works: list[Work] = []
    for value in ciphertext.values:
        if not server.blocks:
            works.append(Work(evaluate=partial(_image, server.fingerprint, keys, value)))
        before = len(works)
        for block in server.blocks:
            reads = tuple(before + number - 1 for number in block.reads if number)
            works.append(Work(evaluate=partial(_block, server.fingerprint, keys, value, block), reads=reads))
    return works


def _image(served: str, keys: StoredKeys, value: bytes, circuits: Circuits, _: Sequence[bytes]) -> bytes:
    return circuits[served].run_value(value, keys)


def _block(
    served: str, keys: StoredKeys, image: bytes, block: Block, circuits: Circuits, read: Sequence[bytes]
) -> bytes:
    others = iter(read)
    values = [next(others) if number else image for number in block.reads]
    return circuits[served].run_block(keys, block, values)
