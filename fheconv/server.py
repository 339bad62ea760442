"""The side that computes on ciphertexts, and holds no key that could decrypt them."""

from typing import Any, NoReturn

from fheconv.ciphertext import Ciphertext
from fheconv.client import check_ciphertext
from fheconv.config import CompileConfig
from fheconv.errors import ArtifactError
from fheconv.keys import EvaluationKeys, StoredKeys
from fheconv.manifest import Manifest
from fheconv.progress import track
from fheconv.reports import Cost
from fheconv.worker import KeysForgotten, Program, Session, worker

# Key sets that are kept in memory, those used last.
KEYS_IN_MEMORY = 4
# Serialized ciphertexts have so much around the numbers that Concrete counts.
MARGIN = 2**16


class Server:
    """The server side of a saved circuit. Made by `fheconv.load_server`.

    `manifest` says what the circuit is and what it costs. `config` is what it was compiled with, `mlir` the
    program: the network's weights are in it, as far as the circuit needs them. `file` is the
    `server.zip` itself.
    """

    def __init__(
        self,
        manifest: Manifest,
        specs: bytes,
        mlir: str,
        config: CompileConfig,
        *,
        file: bytes,
        session: Session | None = None,
        keys_in_memory: int = KEYS_IN_MEMORY,
    ) -> None:
        self.manifest = manifest
        self.config = config
        self.file = file
        self._parts = specs, mlir, config
        self._keys_in_memory = keys_in_memory
        # Not `cost.lookups`: Concrete leaves out lookups on which no result depends.
        looks_up = any(layer.lookups for layer in manifest.cost.layers)
        opening = manifest.fingerprint, specs, mlir, looks_up, config
        self._program = Program(worker() if session is None else session, ("open_server", opening), config)

    def __reduce__(self) -> NoReturn:
        raise ArtifactError(
            "A server's worker is this process's own: it cannot be copied or pickled. Load server.zip again."
        )

    def beside(self, session: Session, keys_in_memory: int = KEYS_IN_MEMORY) -> "Server":
        """Return the same server in another worker process."""
        options: dict[str, Any] = {"session": session, "keys_in_memory": keys_in_memory}
        return Server(self.manifest, *self._parts, file=self.file, **options)

    @property
    def fingerprint(self) -> str:
        """Which circuit it is, in hexadecimal."""
        return self.manifest.fingerprint

    @property
    def cost(self) -> Cost:
        """What one encrypted image costs."""
        return self.manifest.cost

    def run(self, ciphertext: Ciphertext, evaluation_keys: EvaluationKeys | StoredKeys) -> Ciphertext:
        """Evaluate the circuit on encrypted images, with their owner's evaluation keys.

        Raises `ArtifactError`, before the native library sees a byte, for ciphertexts or keys of another
        circuit, or of each other's key sets, `ExecutionError` if it fails.
        """
        self.check(ciphertext, evaluation_keys)
        values = track(ciphertext.values, "Running on encrypted images…")
        return ciphertext.with_results(self.run_value(value, evaluation_keys) for value in values)

    def check(self, ciphertext: Ciphertext, evaluation_keys: EvaluationKeys | StoredKeys) -> None:
        """Raise `ArtifactError` unless the ciphertext can be run with these keys."""
        check_keys(evaluation_keys, self.fingerprint)
        check_input(ciphertext, self.manifest, evaluation_keys.key_id)

    def run_value(self, value: bytes, keys: EvaluationKeys | StoredKeys) -> bytes:
        """Evaluate the circuit on one value of a ciphertext, both of which `check` has let pass."""
        most = self._keys_in_memory
        try:
            return bytes(self._program.request("run_for", keys.name, None, most, value))
        except KeysForgotten:
            given = keys.payload if isinstance(keys, EvaluationKeys) else keys
            return bytes(self._program.request("run_for", keys.name, given, most, value))


def check_keys(keys: EvaluationKeys | StoredKeys, fingerprint: str) -> None:
    """Raise `ArtifactError` unless these are evaluation keys of that circuit."""
    if not isinstance(keys, EvaluationKeys | StoredKeys):
        raise ArtifactError(
            f"run takes evaluation keys, not {type(keys).__name__}; give it client.evaluation_keys."
        )
    if keys.fingerprint != fingerprint:
        raise ArtifactError(
            "The evaluation keys belong to another circuit; make keys with this one's client."
        )


def check_input(ciphertext: Ciphertext, manifest: Manifest, key_id: str) -> None:
    """Raise `ArtifactError` unless these are encrypted images of that circuit and key set, of their size."""
    check_ciphertext(ciphertext, "input", "run", manifest.fingerprint, key_id, 1)
    most = manifest.cost.input_bytes + MARGIN
    for value in ciphertext.values:
        if len(value) > most:
            raise ArtifactError(
                f"The ciphertext has a value of {len(value):,} bytes; an encrypted image of this circuit "
                f"has at most {most:,}."
            )
