"""Tells how long lookups and compiling take, from what was timed on this machine, or on a usual one.

The optimiser's complexity counts operations. But the time of a lookup is limited by the memory from which its
bootstrapping key is streamed, and depends on the machine. So some lookups of different complexities are
timed, and times between them are interpolated. `fheconv.circuits.native.lookup_times` times them, and keeps
the measurement in the user's cache folder.
"""

import json
import math
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

import numpy as np
import platformdirs

from fheconv.lowering.lower import Lowered
from fheconv.networks.floats import Maximum
from fheconv.networks.linear import Kernel

# The complexity and the seconds of one lookup, by complexity.
Times: TypeAlias = list[tuple[float, float]]

# Widths of the lookups that are timed.
BITS = (2, 4, 5, 6)
# Measured on two cores of an x86-64 machine, many lookups at once.
USUAL: Times = [(27.3e6, 0.0055), (46.2e6, 0.0057), (66.1e6, 0.0065), (112e6, 0.0095)]
# The seconds of compiling: of any circuit, of a lookup, of a weight or a table entry, which Concrete reads
# as text. Measured on one core, for 300 to 98,000 lookups and 10^4 to 5·10^7 numbers.
COMPILING, A_LOOKUP, A_NUMBER = 0.4, 20e-6, 2.5e-6
# The seconds of circuits without lookups, measured on two cores too: of a multiply-add for each number of a
# ciphertext, and of a byte of the images and results that are read and written, encrypted and decrypted.
A_MULTIPLY_ADD, A_BYTE, ENCRYPTING, DECRYPTING = 0.9e-9, 5.8e-9, 11e-9, 8.5e-9
# The cache folder may not exist (there is no home: RuntimeError), and files may be damaged or impossible to
# open. With no file descriptor left, a version is not found either (ImportError). An estimate needs no file.
_NO_CACHE = (OSError, ValueError, TypeError, RuntimeError, ImportError)


def seconds_of(times: Sequence[tuple[float, float]], lookups: int, complexity: float) -> float:
    """Return the estimated seconds of `lookups` lookups, whose `complexity` together is known."""
    known, seconds = np.log(np.array(times)).T
    each = math.log(complexity / lookups)
    slope = (seconds[-1] - seconds[-2]) / (known[-1] - known[-2])
    beyond = max(each - known[-1], 0.0) * max(slope, 1.0)
    return lookups * math.exp(float(np.interp(each, known, seconds)) + beyond)


def linear_seconds(multiply_adds: int, dimension: float, total: float) -> float:
    """Return about how long a circuit without lookups runs, under a key of that dimension.

    `total` is the number of bytes of its encrypted image and results.
    """
    return multiply_adds * dimension * A_MULTIPLY_ADD + total * A_BYTE


def owner_seconds(image: float, result: float) -> float:
    """Return how long it takes to encrypt so many bytes, and to decrypt results, without lookups."""
    return image * ENCRYPTING + result * DECRYPTING


def compiling_seconds(lowered: Lowered) -> float:
    """Return about how long Concrete takes to compile a circuit's function."""
    return COMPILING + A_LOOKUP * lowered.lookups + A_NUMBER * sum(numbers_of(lowered))


def numbers_of(lowered: Lowered) -> list[int]:
    """Return how many weights and table entries of each layer Concrete reads, when it compiles a function."""
    numbers = []
    for layer, low in zip([*lowered.network.layers[:-1], lowered.planes.layer], lowered.layers, strict=True):
        if isinstance(layer, Maximum):
            numbers.append(2**low.bits)
            continue
        kernels = (step for term in layer.terms for step in term.steps if isinstance(step, Kernel))
        # A matrix has a number for each product, a convolution one for all positions.
        weights = low.multiply_adds if "matrix" in low.engine else sum(one.weight.size for one in kernels)
        numbers.append(weights + (0 if layer.lookup is None else len(layer.lookup.tables) << low.bits))
    return numbers


def read_times() -> Times:
    """Return what an earlier process measured, or an empty list if it is missing or damaged."""
    try:
        pairs = [
            (float(complexity), float(seconds)) for complexity, seconds in json.loads(_file().read_text())
        ]
    except _NO_CACHE:
        return []
    sound = len(pairs) == len(BITS) and all(0 < number < math.inf for pair in pairs for number in pair)
    return pairs if sound and pairs == sorted(pairs) else []


def keep_times(times: Times) -> None:
    """Keep a measurement for later processes, if that is possible."""
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        _file().write_text(json.dumps(times))
    except _NO_CACHE:
        pass  # the next process will measure again


def _file() -> Path:
    name = f"lookups-{version('concrete-python')}-{os.cpu_count()}.json"
    return Path(platformdirs.user_cache_dir("fheconv")) / name
