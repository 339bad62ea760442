"""Holds a circuit of the native library by number, across the deaths of its process."""

import itertools
import weakref
from typing import Any

from fheconv.basics.config import CompileConfig
from fheconv.basics.errors import CompilationError, ExecutionError
from fheconv.circuits.native.protocol import CircuitForgotten, Session

_numbers = itertools.count()


class Program:
    """Something that the native library holds by number, and is given again where a worker is a new one.

    `opening` is the method of `NativeCircuits` that makes it, with the arguments after the number.
    """

    def __init__(self, session: Session, opening: tuple[str, tuple[Any, ...]], limits: CompileConfig) -> None:
        self.number = next(_numbers)
        weakref.finalize(self, session.released.append, self.number).atexit = False
        self._session, self.limits = session, limits
        self._method, self._arguments = opening
        self.compiled: Any = self._open()

    @property
    def fingerprint(self) -> str:
        """Which circuit it is, in hexadecimal."""
        return str(self.compiled.fingerprint)

    def request(self, method: str, *arguments: Any) -> Any:
        """Call a method of `NativeCircuits` for it.

        Raises `ExecutionError` if the native library fails.
        """
        try:
            return self._request(method, arguments)
        except CircuitForgotten:
            self._reopen()
            return self._request(method, arguments)

    def _request(self, method: str, arguments: tuple[Any, ...]) -> Any:
        return self._session.request(ExecutionError, method, self.number, *arguments, limits=self.limits)

    def _open(self, *more: Any) -> Any:
        arguments = (self.number, *self._arguments, *more)
        return self._session.request(CompilationError, self._method, *arguments, limits=self.limits)

    def _reopen(self, *more: Any) -> None:
        """Give a new worker what the old one knew."""
        if self._open(*more).fingerprint != self.fingerprint:
            raise ExecutionError("Compiling again gave another circuit; compile anew and make new keys.")
