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

import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

from fheconv.basics.errors import FheConvError
from fheconv.circuits.native.process import CannotStart, Process
from fheconv.circuits.native.protocol import UNLIMITED, Limits, drain

WATCH_SECONDS = 0.02
# What takes less, for each call.
_LESS = {
    "compile": "a smaller image takes",
    "encrypt": "fewer images at a time take",
    "decrypt": "fewer images at a time take",
    "run": "a smaller image takes",
}


class Worker:
    """The native library in a child process. It is started at the first request and after each death."""

    def __init__(self) -> None:
        self.released: deque[int] = deque()
        self._process: Process | None = None
        self._lock = threading.Lock()
        _workers.add(self)

    def request(
        self, failure: type[FheConvError], method: str, *arguments: Any, limits: Limits = UNLIMITED
    ) -> Any:
        """Call the method in the worker, within the time and the memory of `limits`.

        An interruption ends the worker, and so does exceeding a limit. The next request starts a new one.
        """
        exceeded: list[str] = []
        with self._lock:
            try:
                process = self._ready(limits)
                with _watched(process, method, limits, exceeded):
                    process.send((drain(self.released), failure, method, arguments))
                    succeeded, value = process.receive()
                if exceeded:  # at the moment when the reply came
                    raise EOFError
            except CannotStart as error:
                self.stop()
                raise failure(str(error)) from error
            except (EOFError, OSError) as error:
                how = process.obituary(f"during {method}; the next call starts a new one")
                self.stop()
                words = exceeded[0] if exceeded else f"The process of the native library {how}"
                raise failure(words) from error
            except BaseException:
                self.stop()
                raise
        if succeeded:
            return value
        try:
            raise value
        finally:
            del value  # with it, the error would hold this frame, and so the circuit, and itself

    def _ready(self, limits: Limits) -> Process:
        """Return the process, a new one if there is none or if it cannot take this request."""
        process, most = self._process, limits.bytes
        # Others may have filled it: in a new one, the limit counts this circuit only.
        full = process is not None and most is not None and process.held > most
        # Somebody may have removed its folder, without which it cannot compile.
        if process is not None and (full or not os.path.isdir(process.folder)):
            self.stop()
        if self._process is None:
            self._process = Process()
        return self._process

    def stop(self) -> None:
        """End the worker at once."""
        if self._process is not None:
            self._process.end()
        self._process = None

    def abandon(self) -> None:
        """Forget the worker without ending it. After a fork, it is the parent's."""
        self._process = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The worker's process number while it lives."""
        return None if self._process is None else self._process.pid


@contextlib.contextmanager
def _watched(process: Process, method: str, limits: Limits, exceeded: list[str]) -> Iterator[None]:
    """End the process if the block takes more than `limits`, and add the reason to `exceeded`."""
    seconds, most = limits.seconds, limits.bytes
    if seconds is None and most is None:
        yield
        return
    start = time.monotonic()
    done = threading.Event()
    smaller = f"; {_LESS[method]} less" if method in _LESS else ""

    def watch() -> None:
        while not done.wait(WATCH_SECONDS):
            held = process.held
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
            process.kill()
            return

    # The process is reaped after the thread has ended, so its number still belongs to it.
    watcher = threading.Thread(target=watch, name="fheconv limits", daemon=True)
    try:
        watcher.start()
    except RuntimeError as error:
        raise CannotStart(
            f"There can be no thread to watch the limits: {error}. End other threads, or raise `ulimit -u`."
        ) from error
    try:
        yield
    finally:
        done.set()
        watcher.join()


_workers: "weakref.WeakSet[Worker]" = weakref.WeakSet()
_shared = Worker()


def _abandon_all() -> None:
    for each in list(_workers):
        each.abandon()


os.register_at_fork(after_in_child=_abandon_all)


def worker() -> Worker:
    """Return the worker that all circuits of this process share, because it takes seconds to start."""
    return _shared
