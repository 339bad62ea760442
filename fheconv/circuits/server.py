"""Runs circuits on ciphertexts, without a key that could decrypt them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from fheconv.basics.errors import ArtifactError, InvalidArgumentError
from fheconv.basics.keywords import answers_keywords
from fheconv.basics.progress import track
from fheconv.basics.report import Brief
from fheconv.circuits.ciphertext import Ciphertext, check_ciphertext
from fheconv.circuits.cost import Cost
from fheconv.circuits.files.archive import ServerParts, read_server
from fheconv.circuits.files.manifest import Manifest
from fheconv.circuits.kept import InFolder, InMemory
from fheconv.circuits.keys import EvaluationKeys, StoredKeys
from fheconv.circuits.native.handle import Handle
from fheconv.circuits.native.protocol import KeysForgotten, Limits, Session
from fheconv.circuits.native.worker import worker
from fheconv.circuits.stepping import run_blocks
from fheconv.lowering.blocks import Block

# The number of key sets that are kept in memory: those used last.
KEYS_IN_MEMORY = 4
# A serialized ciphertext may have this many bytes more than the size that Concrete tells.
MARGIN = 2**16


class Server(Brief):
    """The server side of a saved circuit. Made by `fheconv.load_server`.

    `manifest` describes the circuit and its cost. `config` is the configuration it was compiled with.
    `file` is the `server.zip` itself: it holds the network's weights, as far as the circuit needs them.

    Example:
        >>> import numpy as np, tempfile
        >>> from fheconv import compile, load_client, quantize
        >>> image = np.arange(9).reshape(1, 3, 3)
        >>> circuit = compile(quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), image))
        >>> client_file, server_file = circuit.save(tempfile.mkdtemp())
        >>> client, server = load_client(client_file), load_server(server_file)
        >>> client.keygen()
        >>> result = server.run(client.encrypt(image), client.evaluation_keys)
        >>> result.kind, result.images
        ('output', 1)
    """

    def __init__(
        self, parts: ServerParts, *, session: Session | None = None, keys_in_memory: int = KEYS_IN_MEMORY
    ) -> None:
        self.manifest, self.config, self.file = parts.manifest, parts.recipe.config, parts.file
        self._parts = parts
        self._keys_in_memory = keys_in_memory
        # `cost.lookups` cannot be used: Concrete leaves out lookups on which no result depends.
        looks_up = any(layer.lookups for layer in parts.manifest.cost.layers)
        opening = parts.manifest.fingerprint, parts.specs, parts.mlir, looks_up, parts.recipe
        self._handle = Handle(
            worker() if session is None else session, ("open_server", opening), Limits.of(parts.recipe.config)
        )

    def _summary(self) -> tuple[str, list[tuple[str, str]]]:
        about = self.manifest
        return f"Server {self.fingerprint:.12}: {about.input_shape} → {about.output_shape}", self.cost.rows()

    def __reduce__(self) -> NoReturn:
        raise ArtifactError(
            "A server's worker is this process's own: it cannot be copied or pickled. Load server.zip again."
        )

    def beside(self, session: Session, keys_in_memory: int = KEYS_IN_MEMORY) -> "Server":
        """Return the same server in another worker process."""
        return Server(self._parts, session=session, keys_in_memory=keys_in_memory)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the circuit, in hexadecimal."""
        return self.manifest.fingerprint

    @property
    def keyset(self) -> str:
        """The name of the key set, in hexadecimal: circuits with the same one run under the same keys."""
        return self._handle.keyset

    @property
    def cost(self) -> Cost:
        """The cost of one encrypted image."""
        return self.manifest.cost

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of a circuit in stages (`fheconv.StagedCircuit`). Others have none."""
        return tuple(self._handle.compiled.blocks)

    @answers_keywords
    def run(
        self,
        ciphertext: Ciphertext,
        evaluation_keys: EvaluationKeys | StoredKeys,
        *,
        keep: str | Path | None = None,
        time_limit: float | None = None,
    ) -> Ciphertext:
        """Evaluate the circuit on encrypted images, with their owner's evaluation keys.

        keep, time_limit: for circuits in stages, as for `StagedCircuit.run`: a folder for what has been
            computed, so that a later call goes on from there, and the seconds after which this call ends.

        Raises `ArtifactError` for ciphertexts or keys of another circuit, or of different key sets, before
        the native library sees a byte. Raises `ExecutionError` if the evaluation fails, `UnfinishedError`
        when the time is over, `InvalidArgumentError` for a time limit without a folder, and for either of
        them with a circuit that is not in stages.
        """
        self.check(ciphertext, evaluation_keys)
        if (keep is not None or time_limit is not None) and not self.blocks:
            raise InvalidArgumentError(
                f"keep={keep!r:.50} and time_limit={time_limit!r:.20} are for circuits in stages; compile "
                'with stages="layers".'
            )
        if time_limit is not None and keep is None:
            raise InvalidArgumentError(
                f"time_limit={time_limit!r:.20} without keep=; give a folder, or what was computed is lost."
            )
        if self.blocks:
            kept = InMemory() if keep is None else InFolder(keep)
            evaluate = partial(self.run_block, evaluation_keys)
            return run_blocks(self.blocks, ciphertext, evaluate, kept, time_limit)
        values = track(ciphertext.values, "Running on encrypted images…")
        return ciphertext.with_results(self.run_value(value, evaluation_keys) for value in values)

    def check(self, ciphertext: Ciphertext, evaluation_keys: EvaluationKeys | StoredKeys) -> None:
        """Raise `ArtifactError` unless the ciphertext can be run with these keys."""
        check_keys(evaluation_keys, self.fingerprint, self.keyset)
        check_input(ciphertext, self.manifest, evaluation_keys.key_id)

    def run_value(self, value: bytes, keys: EvaluationKeys | StoredKeys) -> bytes:
        """Evaluate the circuit, not in stages, on one value of a ciphertext that `check` has accepted."""
        return self._run_for(keys, [value], None)

    def run_block(self, keys: EvaluationKeys | StoredKeys, block: Block, values: Sequence[bytes]) -> bytes:
        """Evaluate a block on the values that it reads, of a ciphertext that `check` has accepted."""
        return self._run_for(keys, values, block.name)

    def _run_for(
        self, keys: EvaluationKeys | StoredKeys, values: Sequence[bytes], block: str | None
    ) -> bytes:
        most = self._keys_in_memory
        try:
            return bytes(self._handle.request("run_for", keys.name, None, most, values, block))
        except KeysForgotten:
            given = keys.payload if isinstance(keys, EvaluationKeys) else keys
            return bytes(self._handle.request("run_for", keys.name, given, most, values, block))


def check_keys(keys: EvaluationKeys | StoredKeys, fingerprint: str, keyset: str) -> None:
    """Raise `ArtifactError` unless the circuit of that fingerprint and key set runs under these keys."""
    if not isinstance(keys, EvaluationKeys | StoredKeys):
        raise ArtifactError(
            f"run takes evaluation keys, not {type(keys).__name__}; give it client.evaluation_keys."
        )
    if not keys.belong_to(fingerprint, keyset):
        raise ArtifactError(
            "The evaluation keys belong to another circuit, with other parameters; make keys with this one's "
            "client. (With a server.zip of file format 1, a client of format 1 goes.)"
        )


def check_input(ciphertext: Ciphertext, manifest: Manifest, key_id: str) -> None:
    """Raise `ArtifactError` unless these are encrypted images of that circuit and key set, of their size."""
    check_ciphertext(ciphertext, "input", "run", manifest.fingerprint, key_id, manifest.lanes)
    most = manifest.cost.input_bytes + MARGIN
    for value in ciphertext.values:
        if len(value) > most:
            raise ArtifactError(
                f"The ciphertext has a value of {len(value):,} bytes; an encrypted image of this circuit "
                f"has at most {most:,}."
            )


def load_server(
    file: str | Path | bytes,
    *,
    time_limit: float | None = None,
    memory_limit: int | None = None,
    session: Session | None = None,
) -> Server:
    """Return the compiled server of a `server.zip`, or of its bytes.

    The limits are those of `CompileConfig`, for each call of the native library. The library runs in
    `session`, by default the process that all circuits share. Raises `ArtifactError` for a file that is
    damaged, altered or of another version, `CompilationError` if Concrete cannot compile it.

    Example:
        >>> import numpy as np, tempfile
        >>> from fheconv import compile, quantize
        >>> image = np.arange(9).reshape(1, 3, 3)
        >>> circuit = compile(quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), image))
        >>> client_file, server_file = circuit.save(tempfile.mkdtemp())
        >>> load_server(server_file).manifest.output_shape
        (1, 2, 2)
    """
    parts = read_server(file)
    limited = replace(parts.recipe.config, time_limit=time_limit, memory_limit=memory_limit)
    return Server(replace(parts, recipe=replace(parts.recipe, config=limited)), session=session)
