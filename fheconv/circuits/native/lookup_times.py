"""Predicts how long a circuit takes on this machine, from a few lookups that are timed once.

The optimiser's complexity counts operations. But the time of a lookup is limited by the memory from which its
bootstrapping key is streamed, and depends on the machine. So some lookups of different complexities are run
here, and times between them are interpolated. The measurement is kept in the user's cache folder.
"""

import json
import math
import os
from importlib.metadata import version
from pathlib import Path

import numpy as np
import platformdirs

from fheconv.basics.errors import ExecutionError, FheConvError
from fheconv.basics.progress import status
from fheconv.circuits.native.protocol import Session

# Widths of the lookups that are timed, and the number of lookups that run at once.
BITS = (2, 4, 5, 6)
LOOKUPS = 48

# The cache folder may not exist (there is no home: RuntimeError), and files may be damaged or impossible to
# open. With no file descriptor left, a version is not found either (ImportError). An estimate needs no file.
_NO_CACHE = (OSError, ValueError, TypeError, RuntimeError, ImportError)

_measured: list[tuple[float, float]] = []


def expected_seconds(session: Session, lookups: int, complexity: float) -> float | None:
    """Return the estimated seconds of `lookups` lookups, or None if nothing can be timed.

    `complexity` is the complexity of all of them together.

    The first call on a machine measures for some seconds.
    """
    if not _measured:
        try:
            _measured.extend(_read() or _measure(session))
        except FheConvError:
            return None  # an estimate is not worth failing for
    known, seconds = np.log(np.array(_measured)).T
    each = math.log(complexity / lookups)
    slope = (seconds[-1] - seconds[-2]) / (known[-1] - known[-2])
    beyond = max(each - known[-1], 0.0) * max(slope, 1.0)
    return lookups * math.exp(float(np.interp(each, known, seconds)) + beyond)


def _file() -> Path:
    name = f"lookups-{version('concrete-python')}-{os.cpu_count()}.json"
    return Path(platformdirs.user_cache_dir("fheconv")) / name


def _read() -> list[tuple[float, float]]:
    """Return the measurement of an earlier process, or an empty list if it is missing or damaged."""
    try:
        pairs = [
            (float(complexity), float(seconds)) for complexity, seconds in json.loads(_file().read_text())
        ]
    except _NO_CACHE:
        return []
    sound = len(pairs) == len(BITS) and all(0 < number < math.inf for pair in pairs for number in pair)
    return pairs if sound and pairs == sorted(pairs) else []


def _measure(session: Session) -> list[tuple[float, float]]:
    with status("Timing lookups on this machine, once…"):
        pairs = sorted(session.request(ExecutionError, "time_lookups", bits, LOOKUPS) for bits in BITS)
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        _file().write_text(json.dumps(pairs))
    except _NO_CACHE:
        pass  # the next process will measure again
    return pairs
