"""The side that owns the keys: it makes them, encrypts images and decrypts results."""

from pathlib import Path
from typing import Any

from fheconv.basics.arrays import Array
from fheconv.circuits.ciphertext import Ciphertext
from fheconv.circuits.cost import Cost
from fheconv.circuits.files.archive import read_client
from fheconv.circuits.files.manifest import Manifest
from fheconv.circuits.native.worker import worker
from fheconv.circuits.owner import KeyedProgram, KeyOwner
from fheconv.lowering.interface import Interface


class Client(KeyOwner):
    """The client side of a saved circuit: all that its owner needs, and no weight of the network's.

    Made by `fheconv.load_client`. `manifest` says what the circuit is and what it costs. Like a circuit, it
    is usable again after a call that was interrupted, and is neither copied nor pickled.
    """

    def __init__(self, manifest: Manifest, interface: Interface, specs: bytes) -> None:
        self.manifest = manifest
        super().__init__()
        self._one = KeyedProgram(worker(), ("open_client", (manifest.fingerprint, specs)), interface)

    @property
    def cost(self) -> Cost:
        """What one encrypted image costs the server."""
        return self.manifest.cost

    @property
    def input_range(self) -> tuple[float, float]:
        """The smallest and the greatest value of an image that can be encrypted."""
        return self._one.interface.input.real_range

    def encrypt(self, x: Any) -> Ciphertext:
        """Quantize and encrypt images (n, *input_shape), or one image without n.

        Raises `InputRangeError` naming the first value that cannot be represented, `NotCompiledError`
        before `keygen`.
        """
        q, batched = self._one.interface.quantize_input(x)
        with self._lock:
            return self._one.encrypt(q, batched)

    def decrypt(self, ciphertext: Ciphertext, *, dequantize: bool = True) -> Array:
        """Return the results in torch's shape: floats, or with `dequantize=False` the exact integers.

        Raises `ArtifactError` for a ciphertext of another circuit or key set, or one that no server returned.
        """
        with self._lock:
            self._one.check(ciphertext, "output", "decrypt")
            accumulators = self._one.decrypt(ciphertext)
        y = self._one.interface.dequantize(accumulators) if dequantize else accumulators
        return y if ciphertext.batched else y[0]


def load_client(file: str | Path | bytes) -> Client:
    """Return the client of a `client.zip`, or of its bytes. It has no keys yet.

    Raises `ArtifactError` for a file that is damaged, altered or of another version, or whose parameters
    would not hide the images (`fheconv.circuits.files.security`).
    """
    parts = read_client(file)
    return Client(parts.manifest, parts.interface, parts.specs)
