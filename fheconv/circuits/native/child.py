"""Runs the native library in a child process that serves requests, or in the caller's own process."""

import contextlib
import functools
import os
import resource
import sys
import traceback
from collections import deque
from multiprocessing.connection import Connection
from typing import Any

from fheconv.basics.errors import FheConvError
from fheconv.circuits.native.protocol import UNLIMITED, Limits, drain


class InProcess:
    """The native library in this process, for debugging."""

    def __init__(self) -> None:
        from fheconv.circuits.native.library import NativeCircuits

        self._circuits = NativeCircuits()
        self.released: deque[int] = deque()

    def request(
        self, failure: type[FheConvError], method: str, *arguments: Any, limits: Limits = UNLIMITED
    ) -> Any:
        """Call the method here, without limits. `CompileConfig` refuses limits together with `in_process`."""
        self._circuits.release(drain(self.released))
        succeeded, value = call(self._circuits, failure, method, arguments)
        if not succeeded:
            raise value
        return value


@functools.cache
def in_process() -> InProcess:
    """Return the debugging session that all circuits of this process share."""
    return InProcess()


def call(
    circuits: Any, failure: type[FheConvError], method: str, arguments: tuple[Any, ...]
) -> tuple[bool, Any]:
    """Call a method of the circuits: return True and its value, or False and the error to raise."""
    try:
        return True, getattr(circuits, method)(*arguments)
    except FheConvError as error:
        return False, error
    except Exception as error:  # Concrete may raise any error; the user gets errors of fheconv only
        words = "".join(traceback.format_exception_only(error)).strip()
        return False, failure(f"Concrete failed during {method}: {words}")


def main() -> None:
    """Serve requests until the caller goes away."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold the secret keys
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    from fheconv.circuits.native.library import NativeCircuits

    circuits = NativeCircuits()
    with contextlib.suppress(EOFError, ConnectionError):
        connection.send("ready")
        while True:
            released, failure, method, arguments = connection.recv()
            circuits.release(released)
            connection.send(call(circuits, failure, method, arguments))
    os._exit(0)  # the library's own exit handlers cannot be trusted


if __name__ == "__main__":
    main()
