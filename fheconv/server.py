"""The side that computes on ciphertexts, and holds no key that could decrypt them."""

from dataclasses import replace
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
    program: the network's weights are in it, as far as the circuit needs them. `client_file` is the
    `client.zip` that goes with it.
    """

    def __init__(
        self,
        manifest: Manifest,
        specs: bytes,
        mlir: str,
        config: CompileConfig,
        *,
        client_file: bytes,
        session: Session | None = None,
        keys_in_memory: int = KEYS_IN_MEMORY,
    ) -> None:
        self.manifest = manifest
        self.client_file = client_file
        self._parts = specs, mlir, config
        self._keys_in_memory = keys_in_memory
        opening = manifest.fingerprint, specs, mlir, manifest.cost.lookups > 0, config
        self._program = Program(worker() if session is None else session, ("open_server", opening), config)

    def __reduce__(self) -> NoReturn:
        raise ArtifactError(
            "A server's worker is this process's own: it cannot be copied or pickled. Load server.zip again."
        )

    def beside(self, session: Session, keys_in_memory: int = KEYS_IN_MEMORY) -> "Server":
        """Return the same server in another worker process."""
        options: dict[str, Any] = {"session": session, "keys_in_memory": keys_in_memory}
        return Server(self.manifest, *self._parts, client_file=self.client_file, **options)

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
        keys = self.checked(ciphertext, evaluation_keys)
        values = track(ciphertext.values, "Running on encrypted images…")
        return replace(
            ciphertext, kind="output", values=tuple(self.run_value(value, keys) for value in values)
        )

    def checked(
        self, ciphertext: Ciphertext, evaluation_keys: EvaluationKeys | StoredKeys
    ) -> EvaluationKeys | StoredKeys:
        """Return the keys with which the ciphertext can be run. Raises `ArtifactError` like `run`."""
        keys = self.checked_keys(evaluation_keys)
        check_ciphertext(ciphertext, "input", "run", self.fingerprint, keys.key_id, 1)
        most = self.cost.input_bytes + MARGIN
        for value in ciphertext.values:
            if len(value) > most:
                raise ArtifactError(
                    f"The ciphertext has a value of {len(value):,} bytes; an encrypted image of this circuit "
                    f"has at most {most:,}."
                )
        return keys

    def checked_keys(self, keys: EvaluationKeys | StoredKeys) -> EvaluationKeys | StoredKeys:
        """Return evaluation keys of this circuit. Raises `ArtifactError` for others."""
        if not isinstance(keys, EvaluationKeys | StoredKeys):
            raise ArtifactError(
                f"run takes evaluation keys, not {type(keys).__name__}; give it client.evaluation_keys."
            )
        if keys.fingerprint != self.fingerprint:
            raise ArtifactError(
                "The evaluation keys belong to another circuit; make keys with this one's client."
            )
        return keys

    def run_value(self, value: bytes, keys: EvaluationKeys | StoredKeys) -> bytes:
        """Evaluate the circuit on one value of a ciphertext, both of which `checked` has let pass."""
        most = self._keys_in_memory
        try:
            return bytes(self._program.request("run_for", keys.name, None, most, value))
        except KeysForgotten:
            given = keys.payload if isinstance(keys, EvaluationKeys) else keys
            return bytes(self._program.request("run_for", keys.name, given, most, value))
