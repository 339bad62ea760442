"""Times a few lookups on this machine, once, and predicts from them how long a circuit takes."""

from fheconv.analysis.seconds import BITS, keep_times, read_times, seconds_of
from fheconv.basics.errors import ExecutionError, FheConvError
from fheconv.basics.progress import status
from fheconv.circuits.native.protocol import Session

# The number of lookups that run at once when they are timed.
LOOKUPS = 48

_measured: list[tuple[float, float]] = []


def expected_seconds(session: Session, lookups: int, complexity: float) -> float | None:
    """Return the estimated seconds of `lookups` lookups, or None if nothing can be timed.

    `complexity` is the complexity of all of them together.

    The first call on a machine measures for some seconds.
    """
    if not _measured:
        try:
            _measured.extend(read_times() or _measure(session))
        except FheConvError:
            return None  # an estimate is not worth failing for
    return seconds_of(_measured, lookups, complexity)


def _measure(session: Session) -> list[tuple[float, float]]:
    with status("Timing lookups on this machine, once…"):
        pairs = sorted(session.request(ExecutionError, "time_lookups", bits, LOOKUPS) for bits in BITS)
    keep_times(pairs)
    return pairs
