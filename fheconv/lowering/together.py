"""Decides how many images of a batch share one ciphertext."""

import math

import numpy as np

from fheconv.basics.compile_config import CompileConfig
from fheconv.basics.errors import AccumulatorOverflowError, InvalidArgumentError
from fheconv.lowering.lower import Lowered
from fheconv.networks.bounds import norm_bits

# A circuit without lookups compiles while width + log2‖w‖₂ stays under about 57 bits, depending on p_error.
# A little above that, Concrete finds no parameters. Far above it, Concrete aborts its process.
LINEAR_LIMIT = 58.0
# Up to this limit Concrete finds parameters for every engine and p_error.
SAFE_LIMIT = 54.0
# With more lanes the ciphertexts grow as fast as the images they carry.
MOST_LANES = 4


def images_together(one: Lowered, config: CompileConfig) -> int:
    """Return the number of images that share a ciphertext.

    Raises `AccumulatorOverflowError` for widths on which the native compiler aborts.
    """
    if not one.takes_lanes:
        if config.lanes not in ("auto", 1):
            raise InvalidArgumentError(
                f"lanes={config.lanes}; images share a ciphertext only in networks without lookups. Use 1."
            )
        return 1
    layer = one.network.last
    norms = norm_bits(layer, one.network.shapes)
    channel = int(np.argmax(norms))
    width = max(one.bits, one.network.input.bits) + float(norms[channel])

    def all_lanes(lanes: int) -> float:
        return width + (lanes - 1) * one.interface.lanes.bits

    if config.lanes == "auto":
        lanes = max((n for n in range(1, MOST_LANES + 1) if all_lanes(n) <= SAFE_LIMIT), default=1)
    else:
        lanes = config.lanes
    if all_lanes(lanes) > LINEAR_LIMIT:
        raise AccumulatorOverflowError(
            f"Layer {layer.name!r} needs {one.bits} accumulator bits for each of {lanes} images in a "
            f"ciphertext, and with weights of Euclidean norm 2^{norms[channel]:.1f} in channel {channel} "
            f"that is {all_lanes(lanes):.1f} bits of the {LINEAR_LIMIT:.0f} that Concrete has.",
            layer=layer.name,
            channel=channel,
            value=math.ceil(all_lanes(lanes)),
            limit=int(LINEAR_LIMIT),
        )
    return lanes
