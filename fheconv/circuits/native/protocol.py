"""Defines what the caller and the native library's process say to each other."""

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from fheconv.basics.compile_config import CompileConfig
from fheconv.basics.errors import CompilationError, FheConvError
from fheconv.circuits.sizes import Sizes
from fheconv.lowering.blocks import Block


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most `seconds` that a request may take, and `bytes` that the worker may hold; None for no limit.

    Example:
        >>> Limits.of(CompileConfig(time_limit=60))
        Limits(seconds=60, bytes=None)
    """

    seconds: float | None = None
    bytes: int | None = None

    @classmethod
    def of(cls, config: CompileConfig) -> "Limits":
        """Return the limits that a user chose."""
        return cls(seconds=config.time_limit, bytes=config.memory_limit)


UNLIMITED = Limits()


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Names the circuit that the native library holds, in hexadecimal. `specs` are Concrete's parameters.

    `blocks` are those of a circuit in stages; others have none.
    """

    fingerprint: str
    specs: bytes
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Compiled(Opened):
    """Holds the figures of a compiled circuit, known before any key is made.

    `as_whole` says that a circuit in stages runs under the keys of the one without.
    """

    output_bits: int
    lookups: int
    complexity: float
    sizes: Sizes
    p_error: float
    global_p_error: float
    as_whole: bool = False


class Refused(CompilationError):
    """Concrete ran, and cannot compile this network with these options. Others may do."""


class CircuitForgotten(FheConvError):
    """The circuit is not in this worker: it is a new one, and has to be given the circuit again."""


class KeysForgotten(FheConvError):
    """The evaluation keys are not in this worker, or no longer, and have to be given to it."""


class Session(Protocol):
    """A place where `NativeCircuits` lives.

    `released` takes the numbers of circuits that were garbage collected, to be forgotten at the next request:
    a finalizer runs at any moment, in the middle of a request too, and must not make one itself.
    """

    released: deque[int]

    def request(
        self, failure: type[FheConvError], method: str, *arguments: Any, limits: Limits = UNLIMITED
    ) -> Any:
        """Call a method of `NativeCircuits`; raise `failure` if it or the place fails."""


def drain(numbers: deque[int]) -> list[int]:
    """Take out the numbers that are there, and return them."""
    return [numbers.popleft() for _ in range(len(numbers))]
