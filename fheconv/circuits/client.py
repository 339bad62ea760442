"""Makes keys, encrypts images and decrypts results: the side that owns the keys."""

from pathlib import Path
from typing import Protocol

from fheconv.basics.arrays import Array, ArrayLike, Shape
from fheconv.basics.errors import ArtifactError, InvalidArgumentError
from fheconv.basics.keywords import answers_keywords
from fheconv.basics.samples import Data, share_right, with_classes
from fheconv.circuits.ciphertext import Ciphertext
from fheconv.circuits.cost import Cost
from fheconv.circuits.files.archive import read_client
from fheconv.circuits.files.identity import keyset_of
from fheconv.circuits.files.manifest import Manifest
from fheconv.circuits.keys import EvaluationKeys
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
        >>> (client.predict(image, server=server) == circuit.predict(image)).all()
        True
    """

    def __init__(
        self, manifest: Manifest, interface: Interface, specs: bytes, keys_of: KeyOwner | None = None
    ) -> None:
        self.manifest = manifest
        super().__init__()
        if keys_of is not None:
            self._share_lock_of(keys_of)
        shared = None if keys_of is None else keys_of.present_keys
        opening = "open_client", (manifest.fingerprint, specs)
        self._one = KeyedHandle(worker(), opening, interface, shared=shared)

    def _described(self) -> tuple[Shape, Shape, list[tuple[str, str]]]:
        return self.manifest.input_shape, self.manifest.output_shape, self.cost.rows()

    @property
    def cost(self) -> Cost:
        """The cost of one encrypted image for the server."""
        return self.manifest.cost

    @property
    def input_range(self) -> tuple[float, float]:
        """The smallest and the greatest value of an image that can be encrypted."""
        return self._one.interface.input.real_range

    def encrypt(self, x: Data) -> Ciphertext:
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

    @answers_keywords
    def predict(self, x: Data, fhe: str = "execute", *, server: "Evaluator | None" = None) -> Array:
        """Return float outputs for float images, in torch's shape.

        Images are encrypted here, run at `server` (such as `fheconv.load_server` returns), and decrypted
        here. Raises like `encrypt` and `Server.run`, and `InvalidArgumentError` without a server, or for
        another `fhe` than "execute": the network in clear is not here.
        """
        if fhe != "execute":
            raise InvalidArgumentError(
                f'fhe={fhe!r}; a client knows "execute" only, because the network in clear is not here. Use '
                "the circuit that was compiled from it."
            )
        return self.decrypt(self._run_at(server, self.encrypt(x)))

    @answers_keywords
    def score(
        self, x: Data, y: ArrayLike | None = None, fhe: str = "execute", *, server: "Evaluator | None" = None
    ) -> float:
        """Return the share of images (n, *input_shape) that get their right class of `y` (n,).

        Without `y`, `x` is a loader, a dataset or an iterable of pairs (images, classes). Raises like
        `predict`, and `InvalidArgumentError` if there is not a class for each image, or not a score for each
        class.
        """
        images, classes = with_classes(x, y, len(self._one.interface.input_shape))
        return share_right(self.predict(images, fhe, server=server), classes)

    def _run_at(self, server: "Evaluator | None", ciphertext: Ciphertext) -> Ciphertext:
        if server is None:
            raise InvalidArgumentError(
                "A client does not compute: give server=, such as fheconv.load_server returns, or use a "
                "fheconv.RemoteCircuit."
            )
        return server.run(ciphertext, self.evaluation_keys)


class Evaluator(Protocol):
    """Evaluates a circuit on encrypted images, such as `fheconv.Server`."""

    def run(self, ciphertext: Ciphertext, evaluation_keys: EvaluationKeys, /) -> Ciphertext:
        """Return the encrypted results."""


def load_client(file: str | Path | bytes, *, keys_of: KeyOwner | None = None) -> Client:
    """Return the client of a `client.zip`, or of its bytes. It has no keys yet.

    keys_of: the client of another circuit, which was compiled for the same keys (`keys_of` of
        `fheconv.compile`). The new client has its keys. Keys that either makes later are those of both.

    Raises `ArtifactError` for a file that is damaged, altered or of another version, or whose parameters
    would not hide the images (`fheconv.circuits.files.security`), and for one of another key set.

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
    if keys_of is not None and keyset_of(parts.specs) != keys_of.keyset:
        raise ArtifactError(
            "The circuit has other parameters than the given keys, and cannot run under them; it must be "
            "compiled with keys_of=, or get keys of its own."
        )
    return Client(parts.manifest, parts.interface, parts.specs, keys_of)
