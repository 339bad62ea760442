"""Makes keys, encrypts images and decrypts results: the side that owns the keys."""

from pathlib import Path

from fheconv.basics.arrays import Array, ArrayLike
from fheconv.circuits.ciphertext import Ciphertext
from fheconv.circuits.cost import Cost
from fheconv.circuits.files.archive import read_client
from fheconv.circuits.files.manifest import Manifest
from fheconv.circuits.native.worker import worker
from fheconv.circuits.owner import KeyedHandle, KeyOwner
from fheconv.lowering.interface import Interface


class Client(KeyOwner):
    """The client side of a saved circuit: everything that the owner of the keys needs, without weights.

    Made by `fheconv.load_client`. `manifest` describes the circuit and its cost. Like a circuit, it can be
    used again after a call was interrupted, and it cannot be copied or pickled.

    Example:
        >>> import numpy as np, tempfile
        >>> from fheconv import compile, load_server, quantize
        >>> image = np.arange(9).reshape(1, 3, 3)
        >>> circuit = compile(quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), image))
        >>> client_file, server_file = circuit.save(tempfile.mkdtemp())
        >>> client, server = load_client(client_file), load_server(server_file)
        >>> client.keygen()
        >>> client.decrypt(server.run(client.encrypt(image), client.evaluation_keys))
        array([[[ 5.,  7.],
                [11., 13.]]])
    """

    def __init__(self, manifest: Manifest, interface: Interface, specs: bytes) -> None:
        self.manifest = manifest
        super().__init__()
        self._one = KeyedHandle(worker(), ("open_client", (manifest.fingerprint, specs)), interface)

    @property
    def cost(self) -> Cost:
        """The cost of one encrypted image for the server."""
        return self.manifest.cost

    @property
    def input_range(self) -> tuple[float, float]:
        """The smallest and the greatest value of an image that can be encrypted."""
        return self._one.interface.input.real_range

    def encrypt(self, x: ArrayLike) -> Ciphertext:
        """Quantize and encrypt images (n, *input_shape), or one image without n.

        Raises `InputRangeError`, which names the first value that cannot be represented, `NotCompiledError`
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

    Example:
        >>> import numpy as np, tempfile
        >>> from fheconv import compile, quantize
        >>> image = np.arange(9).reshape(1, 3, 3)
        >>> circuit = compile(quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), image))
        >>> client_file, server_file = circuit.save(tempfile.mkdtemp())
        >>> load_client(client_file).input_range
        (0.0, 15.0)
    """
    parts = read_client(file)
    return Client(parts.manifest, parts.interface, parts.specs)
