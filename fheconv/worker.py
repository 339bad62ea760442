"""Where the native library lives: a process of its own, so that the user's survives it.

Concrete aborts, segfaults, holds the GIL through key generation, dies of Ctrl-C, and after a run makes its
process exit with status 0 whatever happened. In a worker (a fresh interpreter in its own session) all of
that stays there: a death becomes an exception that quotes the library's last words, Ctrl-C reaches only
the caller, and exit statuses are the caller's own.

Limits of time and memory are kept by a thread of the caller, which ends the worker. RLIMIT_AS in the worker
would be no limit of memory: the library's first run takes 1.4 GiB of addresses for stacks that it never
fills, and where it does not get them it hangs instead of failing.

Requests and replies are pickled over a private socket between a process and its own child; nothing from
elsewhere is ever unpickled.
"""

import atexit
import contextlib
import functools
import hashlib
import itertools
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any, Protocol

from fheconv.config import CompileConfig
from fheconv.errors import CompilationError, ExecutionError, FheConvError

LAST_WORDS = 2000
# LLVM says why it aborts before it prints the whole stack, of which only the reason is of use.
LAST_OUTPUT = 100_000
_FRAME = re.compile(r" *#\d+ 0x")
WATCH_SECONDS = 0.02
UNLIMITED = CompileConfig()
_numbers = itertools.count()
# For glibc: keep the memory of ciphertexts, megabytes each, for the next ones. Taking it anew from the system
# costs as much time as a convolution of a small image.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**29)}
_REMEDY = {
    "compile": 'a smaller image or engine="conv"',
    "encrypt": "fewer images at a time",
    "decrypt": "fewer images at a time",
    "run": "a smaller image",
}


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Which circuit the native library holds, in hexadecimal."""

    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Compiled(Opened):
    """What is known of a circuit once it is compiled, before any key is made. Sizes in bytes."""

    output_bits: int
    lookups: int
    complexity: float
    key_bytes: int
    input_bytes: int
    output_bytes: int
    p_error: float
    global_p_error: float


def fingerprint_of(specs: bytes, mlir: bytes) -> str:
    """Return a circuit's name, in hexadecimal: of its parameters and of what it computes."""
    return hashlib.sha256(specs + mlir).hexdigest()


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
        self, failure: type[FheConvError], method: str, *arguments: Any, limits: CompileConfig = UNLIMITED
    ) -> Any:
        """Call a method of `NativeCircuits`; raise `failure` if it or the place fails."""


class InProcess:
    """The native library in this process, for debugging."""

    def __init__(self) -> None:
        from fheconv.native import NativeCircuits

        self._circuits = NativeCircuits()
        self.released: deque[int] = deque()

    def request(
        self, failure: type[FheConvError], method: str, *arguments: Any, limits: CompileConfig = UNLIMITED
    ) -> Any:
        """Call the method here, without limits: `CompileConfig` refuses them together with `in_process`."""
        self._circuits.release(_drain(self.released))
        succeeded, value = _call(self._circuits, failure, method, arguments)
        if not succeeded:
            raise value
        return value


class Worker:
    """The native library in a child process, started at the first request and after each death."""

    def __init__(self) -> None:
        self.released: deque[int] = deque()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._stderr: IO[bytes] | None = None
        self._idle_memory = 0
        self._lock = threading.Lock()

    def request(
        self, failure: type[FheConvError], method: str, *arguments: Any, limits: CompileConfig = UNLIMITED
    ) -> Any:
        """Call the method in the worker, within the time and the memory of `limits`.

        An interruption ends the worker, as exceeding a limit does; the next request starts a new one.
        """
        exceeded: list[str] = []
        with self._lock:
            try:
                most = limits.memory_limit
                if self.pid is not None and most is not None and self._held(self.pid) > most:
                    self.stop()  # others filled it: this circuit's limit is for itself, in a new one
                connection = self._connection or self._start()
                with self._watched(method, limits, exceeded):
                    connection.send((_drain(self.released), failure, method, arguments))
                    succeeded, value = connection.recv()
                if exceeded:  # just as the reply came
                    raise EOFError
            except (EOFError, ConnectionError) as error:
                obituary = self._obituary(method)
                raise failure(exceeded[0] if exceeded else obituary) from error
            except BaseException:
                self.stop()
                raise
        if not succeeded:
            raise value
        return value

    def stop(self) -> None:
        """End the worker at once."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        if self._stderr is not None:
            self._stderr.close()
        self._process = self._connection = self._stderr = None

    def abandon(self) -> None:
        """Forget the worker without ending it: after a fork it is the parent's, and so is its socket."""
        if self._connection is not None:
            self._connection.close()
        if self._stderr is not None:
            self._stderr.close()
        self._process = self._connection = self._stderr = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The worker's process number while it lives."""
        return None if self._process is None else self._process.pid

    def _start(self) -> "Connection[Any, Any]":
        connection, theirs = Pipe()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the worker
        # -P and the caller's own path: the worker imports what the caller would, from anywhere. It works in a
        # folder for such things because the library, when it aborts, leaves a log where it is.
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        environment = {**_MALLOC, **os.environ, "PYTHONPATH": path}
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter, our own module
            [sys.executable, "-P", "-m", "fheconv.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._stderr,
            stderr=self._stderr,
            start_new_session=True,
            cwd=tempfile.gettempdir(),
            env=environment,
        )
        theirs.close()
        self._connection = connection
        connection.recv()  # once its imports are done
        self._idle_memory = _memory(self._process.pid)
        return connection

    def _held(self, pid: int) -> int:
        """Return how many bytes the worker holds beyond what it had after its imports."""
        return _memory(pid) - self._idle_memory

    @contextlib.contextmanager
    def _watched(self, method: str, limits: CompileConfig, exceeded: list[str]) -> Iterator[None]:
        """End the worker, and tell `exceeded` why, if the block takes more than `limits`."""
        process, seconds, most = self._process, limits.time_limit, limits.memory_limit
        if process is None or (seconds is None and most is None):
            yield
            return
        start = time.monotonic()
        done = threading.Event()
        smaller = f", or use {_REMEDY[method]}" if method in _REMEDY else ""

        def watch() -> None:
            while not done.wait(WATCH_SECONDS):
                held = self._held(process.pid)
                if seconds is not None and time.monotonic() - start > seconds:
                    exceeded.append(
                        f"The native library was ended: {method} took longer than time_limit={seconds} "
                        f"seconds. Raise CompileConfig.time_limit{smaller}."
                    )
                elif most is not None and held > most:
                    exceeded.append(
                        f"The native library was ended: during {method} it held {held:,} bytes, more than "
                        f"memory_limit={most:,}. Raise CompileConfig.memory_limit{smaller}."
                    )
                else:
                    continue
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                return

        # The process is reaped after the thread has ended, so its number is still its own.
        watcher = threading.Thread(target=watch, name="fheconv limits", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()

    def _obituary(self, method: str) -> str:
        """Say how the worker died, and bury it."""
        process, stderr = self._process, self._stderr
        if process is None or stderr is None:
            return f"The worker process ended during {method}."
        try:
            status = process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            status = 0
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - LAST_OUTPUT))
        lines = stderr.read().decode(errors="replace").splitlines()
        words = "\n".join(line for line in lines if not _FRAME.match(line)).strip()[-LAST_WORDS:] or "nothing"
        self.stop()
        return (
            f"The process of the native library {how} during {method}; the next call starts a new one. Its "
            f"last words: {words}"
        )


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


def _drain(numbers: deque[int]) -> list[int]:
    return [numbers.popleft() for _ in range(len(numbers))]


def _memory(pid: int) -> int:
    """Return how many bytes of its own a process holds; 0 where the system has no such file."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as lines:
        for line in lines:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


@functools.cache
def worker() -> Worker:
    """Return the worker that all circuits of this process share: it takes seconds to start."""
    shared = Worker()
    atexit.register(shared.stop)
    os.register_at_fork(after_in_child=shared.abandon)
    return shared


@functools.cache
def in_process() -> InProcess:
    """Return the debugging session that all circuits of this process share."""
    return InProcess()


def _call(
    circuits: Any, failure: type[FheConvError], method: str, arguments: tuple[Any, ...]
) -> tuple[bool, Any]:
    try:
        return True, getattr(circuits, method)(*arguments)
    except FheConvError as error:
        return False, error
    except Exception as error:  # Concrete raises whatever it likes; the user gets one tree of errors
        words = "".join(traceback.format_exception_only(error)).strip()
        return False, failure(f"Concrete failed during {method}: {words}")


def main() -> None:
    """Serve requests until the caller goes away."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold the secret keys
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    from fheconv.native import NativeCircuits

    circuits = NativeCircuits()
    with contextlib.suppress(EOFError, ConnectionError):
        connection.send("ready")
        while True:
            released, failure, method, arguments = connection.recv()
            circuits.release(released)
            connection.send(_call(circuits, failure, method, arguments))
    os._exit(0)  # the library's own exit handlers are not to be trusted


if __name__ == "__main__":
    main()
