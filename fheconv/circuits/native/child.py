"""Runs the native library in a child process that serves requests, or in the caller's own process."""

import atexit
import contextlib
import functools
import os
import resource
import traceback
from collections import deque
from multiprocessing.connection import Connection
from typing import Any

from fheconv.basics.errors import FheConvError
from fheconv.circuits.native.folders import remove_empty
from fheconv.circuits.native.protocol import UNLIMITED, Limits, drain
from fheconv.circuits.native.system import raise_address_limit


class InProcess:
    """The native library in this process, for debugging."""

    def __init__(self) -> None:
        from fheconv.circuits.native.library import NativeCircuits

        self._circuits = NativeCircuits()
        self._pid = os.getpid()
        self.released: deque[int] = deque()
        # Concrete ends the process in an exit handler of its own. This one was registered later: it is first.
        atexit.register(self._close)

    def _close(self) -> None:
        if os.getpid() == self._pid:  # in a forked child, the circuits are the parent's
            self._circuits.close()

    def request(
        self, failure: type[FheConvError], method: str, *arguments: Any, limits: Limits = UNLIMITED
    ) -> Any:
        """Call the method here, without limits. `CompileConfig` refuses limits together with `in_process`."""
        self._circuits.release(drain(self.released))
        succeeded, value = call(self._circuits, failure, method, arguments)
        if succeeded:
            return value
        try:
            raise value
        finally:
            del value  # with it, the error would hold this frame, and so the circuit, and itself


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


def serve(descriptor: int) -> None:
    """Serve the requests that come over this socket, until the caller goes away."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold the secret keys
    raise_address_limit()
    connection: Connection[Any, Any] = Connection(descriptor)
    from fheconv.circuits.native.library import NativeCircuits

    circuits = NativeCircuits()
    with contextlib.suppress(EOFError, ConnectionError):
        connection.send("ready")
        while True:
            released, failure, method, arguments = connection.recv()
            circuits.release(released)
            reply = call(circuits, failure, method, arguments)
            remove_empty(os.curdir)  # a worker works in its private folder
            connection.send(reply)
            del reply  # results have megabytes, which would count towards the limits of the next request
    os._exit(0)  # the library's own exit handlers cannot be trusted
