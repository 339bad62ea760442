"""Runs images of any size through the circuit of one tile.

Neighbouring outputs read overlapping inputs (a halo). So tiles of the output that lie side by side need tiles
of the input that overlap. Padding is added in clear, before encryption. So the tile's circuit has no padding,
and all tiles are alike for every stride, padding and dilation.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from fheconv.arithmetic.geometry import PerAxis
from fheconv.basics.arrays import Array, ArrayLike, as_array
from fheconv.basics.checks import check_integer
from fheconv.basics.compile_config import CompileConfig
from fheconv.basics.errors import ArtifactError, InputRangeError, InvalidArgumentError
from fheconv.basics.keywords import answers_keywords
from fheconv.basics.progress import track
from fheconv.basics.report import Brief
from fheconv.circuits.ciphertext import Ciphertext
from fheconv.circuits.circuit import Fhe, FheCircuit
from fheconv.circuits.cost import TiledCost
from fheconv.circuits.refused import compiled
from fheconv.circuits.verification import VerifyReport, compare
from fheconv.networks.tiling import Tiling
from fheconv.quantized import QuantizedNetwork


class TiledCircuit(Brief):
    """Runs images of any size through a circuit for one tile.

    Made by `fheconv.compile_tiled`. Memory is needed only for the tiles that share one ciphertext. If a call
    is interrupted, finished tiles are kept, and the next call with the same image goes on from there.

    The widths are those of the tile, `circuit.network.budget()`. In a tile no position misses a tap, and the
    zeros that a transposed convolution inserts are encrypted like pixels. So the widths may be greater than
    those that `network.budget()` proves for a whole image.

    Example:
        >>> import numpy as np
        >>> from fheconv import quantize
        >>> image = np.arange(30).reshape(1, 5, 6) % 9
        >>> network = quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), image)
        >>> tiled = compile_tiled(network, (2, 2))
        >>> tiled.tiles((5, 6))
        6
    """

    def __init__(self, network: QuantizedNetwork, tile: PerAxis, config: CompileConfig) -> None:
        self.network = network
        self._tiling = Tiling.of(network, tile)
        self.circuit = FheCircuit(self._tiling.network_of_tile(network), config)
        self._unfinished: tuple[str, dict[int, Array]] = ("", {})

    @property
    def tile(self) -> tuple[int, ...]:
        """The number of outputs of a tile along each axis."""
        return self._tiling.tile

    def _summary(self) -> tuple[str, list[tuple[str, ...]]]:
        title, rows = self.circuit._summary()
        count = self.tiles(self.network.input_shape[1:])
        tiles = f"{count:,} for images {self.network.input_shape}"
        return f"TiledCircuit, each tile a {title}", [("tiles", tiles), *rows]

    @property
    def cost(self) -> TiledCost:
        """The cost of one encrypted image of the size that `network` was calibrated on."""
        return self.cost_of(self.network.input_shape[1:])

    def cost_of(self, spatial: Sequence[int]) -> TiledCost:
        """Return the cost of one encrypted image of sizes `spatial`.

        Raises `InvalidArgumentError` for sizes from which there is no output.
        """
        return TiledCost(tile=self.circuit.cost, tiles=self.tiles(spatial))

    def tiles(self, spatial: Sequence[int]) -> int:
        """Return the number of tiles of an image of sizes `spatial`. Raises like `cost_of`."""
        return math.prod(self._tiling.counts(spatial))

    @property
    def _together(self) -> int:
        """The number of tiles that share a ciphertext."""
        return self.circuit.cost.lanes

    def keygen(self) -> None:
        """Generate new keys. Raises `ExecutionError` if the native library fails."""
        self.circuit.keygen()

    def predict(self, x: ArrayLike, fhe: Fhe = "disable") -> Array:
        """Return the float outputs (K, *Out) of one float image (C, *S) of any size.

        `fhe` is "disable", "simulate" or "execute", as for `FheCircuit.predict`. Raises
        `InputRangeError` for an image that cannot be represented, `NotCompiledError` before `keygen`.
        """
        return self.network.dequantize(self._integers(self._quantize(x), fhe)[None])[0]

    def verify(self, x: ArrayLike, *, show: int = 10) -> VerifyReport:
        """Run an image encrypted, tile by tile, and compare every result with the clear integers."""
        check_integer("show", show, 0)
        q = self._quantize(x)
        expected = self.network.accumulate(q[None])[0]
        return compare(expected, self._integers(q, "execute"), self.circuit.promised(self._together), show)

    def encrypt(self, x: ArrayLike) -> Iterator[Ciphertext]:
        """Encrypt one float image (C, *S) of any size. Yield its tiles one by one, each as a ciphertext.

        The ciphertexts are for the circuit that `circuit.save` writes. `fheconv.serving.distributed` runs it
        on many machines. Raises like `predict`.
        """
        q = self._quantize(x)
        windows = self._tiling.windows(q)
        counts = windows.shape[: len(self.tile)]
        return (self.circuit._encrypt(windows[at][None], batched=False) for at in np.ndindex(*counts))

    def decrypt(self, results: Iterable[tuple[int, Ciphertext]], spatial: Sequence[int]) -> Array:
        """Return the float outputs (K, *Out) of an image of sizes `spatial` from the results for its tiles.

        `results` are pairs (number, result) in any order, as `fheconv.distributed.stream` yields them. Each
        is decrypted when it comes. Raises `ArtifactError` like `FheCircuit.decrypt`, and unless there is
        exactly one result for each tile that `encrypt` yields.
        """
        count = self.tiles(spatial)
        finished: dict[int, Array] = {}
        for number, result in results:
            if number in finished:
                raise ArtifactError(f"There are two results for tile {number}; give one for each tile.")
            finished[number] = self.circuit.decrypt(result, dequantize=False)
        if set(finished) != set(range(count)):
            raise ArtifactError(
                f"There are results for {len(finished)} tiles, where an image of sizes {tuple(spatial)} has "
                f"the tiles 0 to {count - 1}; give the results for all that encrypt() yielded."
            )
        y = self._tiling.assembled(finished, spatial)
        return self.network.dequantize(y[None])[0]

    def _quantize(self, x: ArrayLike) -> Array:
        x = as_array(x, "The image")
        if x.ndim != len(self.network.input_shape) or x.shape[0] != self.network.input_shape[0]:
            channels, axes = self.network.input_shape[0], ", ".join("MND"[: len(self.tile)])
            raise InputRangeError(
                f"The image has shape {x.shape}; tiles are cut from one image ({channels}, {axes}) at a time."
            )
        return self.network.input.integers(x)

    def _integers(self, q: Array, fhe: Fhe) -> Array:
        windows = self._tiling.windows(q)
        counts = windows.shape[: len(self.tile)]
        name = hashlib.sha256(q.tobytes() + repr((q.shape, fhe)).encode()).hexdigest()
        if self._unfinished[0] != name:
            self._unfinished = (name, {})
        finished = self._unfinished[1]
        numbers = [number for number in range(math.prod(counts)) if number not in finished]
        together = self._together
        for start in track(range(0, len(numbers), together), "Running tile by tile…"):
            chunk = numbers[start : start + together]
            tiles = np.stack([windows[np.unravel_index(number, counts)] for number in chunk])
            finished.update(zip(chunk, self.circuit.accumulate(tiles, fhe), strict=True))
        self._unfinished = ("", {})
        return self._tiling.assembled(finished, q.shape[1:])


@answers_keywords
def compile_tiled(
    network: QuantizedNetwork, tile: PerAxis = 64, config: CompileConfig | None = None
) -> TiledCircuit:
    """Compile the circuit of a tile of `tile` outputs along each axis, for images of any size.

    The image size that `network` was calibrated on does not matter. Raises like `fheconv.compile`.

    Example:
        >>> import numpy as np
        >>> from fheconv import quantize
        >>> image = np.arange(9).reshape(1, 3, 3)
        >>> tiled = compile_tiled(quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), image), (2, 2))
        >>> tiled.predict(np.ones((1, 4, 3)))
        array([[[2., 2.],
                [2., 2.],
                [2., 2.]]])
    """
    if not isinstance(network, QuantizedNetwork):
        raise InvalidArgumentError(
            f"compile_tiled takes what fheconv.quantize returned, not {type(network).__name__}."
        )

    def of_tiles(network: QuantizedNetwork, config: CompileConfig) -> TiledCircuit:
        return TiledCircuit(network, tile, config)

    return compiled(of_tiles, network, CompileConfig() if config is None else config)
