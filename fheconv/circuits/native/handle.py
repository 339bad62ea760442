"""Holds a circuit of the native library by number, and reopens it after its process died."""

import itertools
import weakref
from typing import Any

from fheconv.basics.errors import CompilationError, ExecutionError
from fheconv.circuits.files.identity import keyset_of
from fheconv.circuits.native.protocol import CircuitForgotten, Limits, Session

_numbers = itertools.count()


class Handle:
    """A circuit that the native library holds by number. A new worker is given it again.

    `opening` is the method of `NativeCircuits` that makes the circuit, with its arguments after the number.
    """

    def __init__(self, session: Session, opening: tuple[str, tuple[Any, ...]], limits: Limits) -> None:
        self.number = next(_numbers)
        weakref.finalize(self, session.released.append, self.number).atexit = False
        self._session, self.limits = session, limits
        self._method, self._arguments = opening
        self.compiled: Any = self._open()

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the circuit, in hexadecimal."""
        return str(self.compiled.fingerprint)

    @property
    def keyset(self) -> str:
        """The name of the circuit's key set, in hexadecimal."""
        return keyset_of(self.compiled.specs)

    def request(self, method: str, *arguments: Any) -> Any:
        """Call a method of `NativeCircuits` for this circuit.

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
        """Open the circuit in a new worker, as it was in the old one."""
        if self._open(*more).fingerprint != self.fingerprint:
            raise ExecutionError("Compiling again gave another circuit; compile anew and make new keys.")
