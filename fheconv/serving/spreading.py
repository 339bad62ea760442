"""Spreads the blocks of one image over the workers of a Dask cluster.

Each block is a task, and what it reads are the results of other tasks. Dask sends a result from worker to
worker, and only to those that read it. A block goes to the worker that has the same share of each stage, so
blocks of neighbouring layers find most of what they read there. If a worker dies, Dask runs its blocks again
on others. The values of an image stay on the workers until it has finished.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from fheconv.circuits.ciphertext import Ciphertext
from fheconv.lowering.blocks import Block

# Submits a task: a function, its arguments, and Dask's options.
Submit: TypeAlias = Callable[..., Any]


class Runner(Protocol):
    """A circuit with its keys, which runs blocks on a worker."""

    def run_block(self, block: Block, values: Sequence[bytes]) -> bytes:
        """Evaluate a block on the values that it reads."""


def spread(
    submit: Submit,
    runner: Any,
    blocks: Sequence[Block],
    ciphertext: Ciphertext,
    addresses: Sequence[str],
    name: tuple[str, int],
) -> tuple[Any, list[Any]]:
    """Submit the blocks of a ciphertext's images, and return Dask's future of the results, and of all values.

    `runner` is the future of a `Runner`. `addresses` are those of the workers. `name` is that of the tasks.
    """
    of_stage: dict[int, list[int]] = {}
    for block in blocks:
        of_stage.setdefault(block.stage, []).append(block.number)
    everything, results = [], []
    for place, value in enumerate(ciphertext.values):
        values = [submit(given, value, key=(*name, place, 0))]
        for block in blocks:
            beside = of_stage[block.stage]
            at = beside.index(block.number) * len(addresses) // len(beside)
            where = {"workers": [addresses[at]], "allow_other_workers": True}
            read = [values[number] for number in block.reads]
            key = (*name, place, block.number)
            values.append(submit(run_block, runner, block, *read, key=key, **where))
        everything += values
        results.append(values[-1])
    blank = ciphertext.with_results(b"" for _ in ciphertext.values)  # the images need not travel again
    return submit(assembled, blank, *results, key=(*name, "results")), everything


def given(value: bytes) -> bytes:
    """Return an image, so that Dask has it as the result of a task, and can make it again."""
    return value


def run_block(runner: Runner, block: Block, *values: bytes) -> bytes:
    """Evaluate a block on a worker. Workers look it up by its name, so that it can be replaced."""
    return runner.run_block(block, values)


def assembled(blank: Ciphertext, *values: bytes) -> bytes:
    """Return the bytes of a ciphertext of results, from one without contents."""
    return blank.with_results(values).to_bytes()
