"""Runs the native library in its own process, so that the user's process survives a crash.

Concrete aborts, segfaults, holds the GIL during key generation, dies of Ctrl-C, and after a run makes its
process exit with status 0 whatever happened. A worker (a fresh interpreter in its own session) keeps all of
that away from the caller. If the worker dies, the caller gets an exception that quotes the library's last
output. Ctrl-C reaches only the caller, and the caller keeps its own exit status.

A thread of the caller enforces the limits of time and memory, by ending the worker. RLIMIT_AS in the worker
cannot limit memory: the library's first run takes 1.4 GiB of addresses for stacks that it never fills, and if
it does not get them, it hangs instead of failing.

Requests and replies are pickled over a private socket between a process and its own child; nothing from
elsewhere is ever unpickled.
"""

import atexit
import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any

from fheconv.basics.errors import FheConvError
from fheconv.circuits.native.protocol import UNLIMITED, Limits, drain

LAST_WORDS = 2000
# LLVM prints the reason for an abort, and then the whole stack. Only the reason is useful.
LAST_OUTPUT = 100_000
_FRAME = re.compile(r" *#\d+ 0x")
WATCH_SECONDS = 0.02
# For glibc: keep the memory of ciphertexts (megabytes each) for the next ones. To get it again from the
# system takes as much time as a convolution of a small image.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**29)}
_REMEDY = {
    "compile": 'a smaller image or engine="conv"',
    "encrypt": "fewer images at a time",
    "decrypt": "fewer images at a time",
    "run": "a smaller image",
}


class Worker:
    """The native library in a child process. It is started at the first request and after each death."""

    def __init__(self) -> None:
        self.released: deque[int] = deque()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._stderr: IO[bytes] | None = None
        self._idle_memory = 0
        self._lock = threading.Lock()

    def request(
        self, failure: type[FheConvError], method: str, *arguments: Any, limits: Limits = UNLIMITED
    ) -> Any:
        """Call the method in the worker, within the time and the memory of `limits`.

        An interruption ends the worker, and so does exceeding a limit. The next request starts a new one.
        """
        exceeded: list[str] = []
        with self._lock:
            try:
                most = limits.bytes
                if self.pid is not None and most is not None and self._held(self.pid) > most:
                    self.stop()  # others filled it; in a new one, the limit counts this circuit only
                connection = self._connection or self._start()
                with self._watched(method, limits, exceeded):
                    connection.send((drain(self.released), failure, method, arguments))
                    succeeded, value = connection.recv()
                if exceeded:  # at the moment when the reply came
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
        """Forget the worker without ending it. After a fork, the worker and its socket are the parent's."""
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
        # With -P and the caller's own path, the worker imports the same modules as the caller. Its working
        # folder is a temporary one, because the library leaves a log there when it aborts.
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        environment = {**_MALLOC, **os.environ, "PYTHONPATH": path}
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter, our own module
            [sys.executable, "-P", "-m", "fheconv.circuits.native.child", str(theirs.fileno())],
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
    def _watched(self, method: str, limits: Limits, exceeded: list[str]) -> Iterator[None]:
        """End the worker if the block takes more than `limits`, and add the reason to `exceeded`."""
        process, seconds, most = self._process, limits.seconds, limits.bytes
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

        # The process is reaped after the thread has ended, so its number still belongs to it.
        watcher = threading.Thread(target=watch, name="fheconv limits", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()

    def _obituary(self, method: str) -> str:
        """Return a message that says how the worker died, and clean up after it."""
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


def _memory(pid: int) -> int:
    """Return how many bytes of its own a process holds, or 0 if the system does not tell."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as lines:
        for line in lines:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


@functools.cache
def worker() -> Worker:
    """Return the worker that all circuits of this process share, because it takes seconds to start."""
    shared = Worker()
    atexit.register(shared.stop)
    os.register_at_fork(after_in_child=shared.abandon)
    return shared
