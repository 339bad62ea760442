"""Tells what one image costs that runs tile by tile, before anything is compiled."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from fheconv.analysis.forecast import WORD, Forecast, forecast_of
from fheconv.analysis.seconds import linear_seconds, owner_seconds
from fheconv.arithmetic.geometry import PerAxis
from fheconv.basics.compile_config import CompileConfig
from fheconv.basics.report import Report
from fheconv.lowering.lower import lower
from fheconv.lowering.together import images_together
from fheconv.networks.integers import IntegerNetwork
from fheconv.networks.tiling import Tiling

# How many times the bytes of its image and of its results a ciphertext takes, in the native library and in
# the program together, while it is encrypted, run and decrypted; and what both take besides. Measured for
# 18 to 254 MB of images and 68 to 271 MB of results.
IMAGES, RESULTS, BESIDES = 1.0, 10.3, 80e6


@dataclass(frozen=True, kw_only=True, repr=False)
class TiledForecast(Report):
    """The cost of one image that runs tile by tile, before compiling. Made by `QuantizedNetwork.forecast`.

    `tile` is the forecast of a tile alone in its ciphertext. But `lanes` tiles share one, so that there
    are fewer `ciphertexts`. `seconds` are those of running them one after the other on two usual cores, and
    `owner_seconds` those of encrypting and decrypting. `memory` is what one ciphertext takes, in the program
    and in the native library's process together, if one program encrypts, runs and decrypts. Both take some
    0.4 GB for themselves.

    Example:
        >>> import numpy as np
        >>> from fheconv import quantize
        >>> network = quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), np.arange(30).reshape(1, 5, 6) % 9)
        >>> network.forecast(tile=2).tiles
        6
    """

    tile: Forecast
    tiles: int
    lanes: int
    ciphertexts: int
    seconds: float
    owner_seconds: float
    memory: float

    @property
    def possible(self) -> bool:
        """False if Concrete has no parameters for a tile."""
        return self.tile.possible

    @property
    def complexity(self) -> float:
        """The complexity of all tiles, each in a ciphertext of its own."""
        return self.tiles * self.tile.complexity

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, ready for JSON. Infinite costs are None."""
        values = {**asdict(self), "complexity": self.complexity}
        costs = {name: None if cost == math.inf else cost for name, cost in values.items()}
        return {**costs, "tile": self.tile.to_dict()}

    def __rich__(self) -> RenderableType:
        table = Table(title="Forecast of one image, tile by tile", title_justify="left", show_header=False)
        table.add_row("tiles", f"{self.tiles:,} in {self.ciphertexts:,} ciphertexts")
        if self.possible:
            table.add_row("complexity", f"{self.complexity:,.0f}")
            table.add_row("expected time", f"{self.seconds:.2g} s to run")
            table.add_row("", f"{self.owner_seconds:.2g} s to encrypt and decrypt")
            table.add_row("memory", decimal(int(self.memory)))
        return Group(table, Text("Of this, each tile:"), self.tile)


def forecast_tiled(
    network: IntegerNetwork, tile: PerAxis, config: CompileConfig | None = None
) -> TiledForecast:
    """Return the forecast of an image of the network's size in tiles, compiled with `config`.

    Raises `InvalidArgumentError` if the network is not a single convolution, and for tiles or lanes that
    there cannot be, `AccumulatorOverflowError` for widths that Concrete cannot hold.
    """
    config = CompileConfig() if config is None else config
    tiling = Tiling.of(network, tile)
    one = lower(tiling.network_of_tile(network), config.engine)
    lanes = images_together(one, config)
    together = lower(one.network, config.engine, lanes)
    alone, dimension = forecast_of(one, config), forecast_of(together, config).complexity
    tiles = math.prod(tiling.counts(network.input_shape[1:]))
    ciphertexts = -(-tiles // lanes)
    image, result = (
        len(some) * WORD * (dimension + 1) for some in (one.interface.inputs, one.interface.outputs)
    )
    multiply_adds = sum(layer.multiply_adds for layer in together.layers)
    return TiledForecast(
        tile=alone,
        tiles=tiles,
        lanes=lanes,
        ciphertexts=ciphertexts,
        seconds=ciphertexts * linear_seconds(multiply_adds, dimension, image + result),
        owner_seconds=ciphertexts * owner_seconds(image, result),
        memory=IMAGES * image + RESULTS * result + BESIDES,
    )
