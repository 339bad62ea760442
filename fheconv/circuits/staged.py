"""Runs a circuit stage by stage: with progress within an image, and on from where it was interrupted."""

from functools import cached_property
from pathlib import Path

from fheconv.basics.arrays import Array, Shape
from fheconv.basics.compile_config import CompileConfig
from fheconv.basics.keywords import answers_keywords
from fheconv.circuits.ciphertext import Ciphertext
from fheconv.circuits.circuit import Fhe, FheCircuit, LoweredHandle
from fheconv.circuits.files.recipe import Recipe
from fheconv.circuits.kept import InFolder, InMemory, name_of
from fheconv.circuits.native.wiring import lenient
from fheconv.circuits.owner import KeyOwner
from fheconv.circuits.stepping import run_blocks
from fheconv.lowering.blocks import Block
from fheconv.lowering.lower import Lowered
from fheconv.quantized import QuantizedNetwork


class StagedCircuit(FheCircuit):
    """A circuit whose layers are stages, each of them in blocks. Made by `fheconv.compile` with `stages`.

    It computes the same integers as the circuit without stages, under one key set, and costs as much. What a
    block returns goes encrypted into the next. So a run shows progress within an image, and one that was
    interrupted goes on after the last block that finished. `blocks` says what each block reads.

    Example:
        >>> import fheconv, numpy as np, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Conv2d(2, 1, 2))
        >>> images = np.random.default_rng(0).uniform(size=(8, 1, 6, 6))
        >>> network = fheconv.quantize(net, images)
        >>> circuit = fheconv.compile(network, stages="layers", blocks=2)
        >>> [(block.stage, block.reads) for block in circuit.blocks]
        [(0, (0,)), (0, (0,)), (1, (1, 2))]
        >>> (circuit.predict(images) == network(images)).all()
        True
    """

    def __init__(
        self,
        network: QuantizedNetwork,
        config: CompileConfig,
        lowered: Lowered,
        most: int,
        keys_of: KeyOwner | None = None,
    ) -> None:
        """Compile the network in up to `most` blocks for each stage, for the keys of `keys_of` if given.

        `lowered` is its function.
        """
        self._most = most
        self._kept = InMemory()
        super().__init__(network, config, lowered, keys_of)

    def _open(self, lowered: Lowered, keys_of: KeyOwner | None = None) -> LoweredHandle:
        within = None if keys_of is None else keys_of.specs
        opening = "compile_stages", (self.network, self.config, self._most, within)
        return LoweredHandle(self._session, opening, lowered, self.config, keys_of)

    def _described(self) -> tuple[Shape, Shape, list[tuple[str, str]]]:
        inputs, outputs, rows = super()._described()
        stages = f"{1 + self.blocks[-1].stage} with {len(self.blocks)} blocks"
        return inputs, outputs, [*rows, ("stages", stages)]

    def _recipe(self) -> Recipe:
        as_whole = self._one.compiled.as_whole
        return Recipe.of(lenient(self.config) if as_whole else self.config, keys_given=as_whole)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks, in an order in which each follows what it reads. The last returns the results."""
        return tuple(self._one.compiled.blocks)

    @answers_keywords
    def run(
        self, ciphertext: Ciphertext, *, keep: str | Path | None = None, time_limit: float | None = None
    ) -> Ciphertext:
        """Evaluate the circuit on encrypted images, block by block.

        keep: a folder for what has been computed, in files that only their owner can read. Without it, it is
            in memory, until another ciphertext is run.
        time_limit: seconds after which the run ends between two blocks, with `UnfinishedError`.

        After that, after an interruption, or if the native library's process dies, a call with the same
        ciphertext goes on from there. With a folder, another process can do so, after it loaded the keys. The
        folder holds at most the values that later layers of one image read, and results. It is removed when
        all is done.

        Raises `ArtifactError` for a ciphertext of another circuit or key set, and for a folder that others
        may read or that cannot be written.
        """
        with self._lock:
            handle = self._check(ciphertext, "input", "run")
            if keep is None:
                self._kept.only({name_of(ciphertext, place) for place in range(len(ciphertext.values))})
            kept = self._kept if keep is None else InFolder(keep)

            def evaluate(block: Block, values: list[bytes]) -> bytes:
                return bytes(handle.request("run", values, block.name))

            return run_blocks(self.blocks, ciphertext, evaluate, kept, time_limit)

    def accumulate(self, q: Array, fhe: Fhe = "disable") -> Array:
        """Return the integer outputs as `FheCircuit.accumulate`.

        What is simulated is the circuit without stages, whose lookups fail as often.
        """
        return self._whole.accumulate(q, fhe) if fhe == "simulate" else super().accumulate(q, fhe)

    @cached_property
    def _whole(self) -> FheCircuit:
        """The circuit without stages, with the same parameters."""
        keys_of = self if self._keys_given else None
        return FheCircuit(self.network, self.config, self._one.lowered, keys_of)
