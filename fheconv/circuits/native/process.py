"""Starts the native library's process, talks to it, and tells how it ended.

The process works in a private folder (`fheconv.circuits.native.folders`), where the library also leaves a log
when it aborts. Its standard input is a pipe to which nobody writes: when the caller dies, the pipe ends, and
so does the process (`fheconv.circuits.native.system`).
"""

import contextlib
import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any

from fheconv.circuits.native.folders import make_folder

LAST_WORDS = 2000
# LLVM prints the reason for an abort, and then the whole stack. Only the reason is useful.
LAST_OUTPUT = 100_000
_FRAME = re.compile(r" *#\d+ 0x")
# An interpreter that has not imported the library after so many seconds never will.
START_SECONDS = 300.0
# For glibc: keep the memory of ciphertexts (megabytes each) for the next ones. To get it again from the
# system takes as much time as a convolution of a small image.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**29)}


class CannotStart(Exception):
    """The native library's process cannot be started. The message says why, and what to do."""


class Process:
    """The native library's process, as its caller sees it. It ends when nobody holds this object.

    Raises `CannotStart` if it cannot be started.
    """

    def __init__(self) -> None:
        self._files = contextlib.ExitStack()  # closes what the caller has open
        # Here already: when another thread forks amid this, the child has to close these files too.
        _started.add(self)
        with contextlib.ExitStack() as ending:
            self._open(ending)
            self._start(ending)
            # What ends the process must not hold this object, or nobody could let go of it.
            self.end = weakref.finalize(self, ending.pop_all().close)
        self._idle_memory = memory(self.pid)

    def _open(self, ending: contextlib.ExitStack) -> None:
        """Make the process's folder, and the files that the two sides share."""
        with _explained(
            "There can be no temporary folder for the native library's process",
            "Set the environment variable TMPDIR to a folder that can be written and has room.",
        ):
            self.folder, lock = make_folder()
            ending.callback(shutil.rmtree, self.folder, ignore_errors=True)
            ending.callback(self._files.close)
            self._files.callback(os.close, lock)
            output = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - it lives as long as the process
            self._output = self._files.enter_context(output)
        with _explained("There can be no pipe to the native library's process"):
            self._connection, self._theirs = map(self._files.enter_context, Pipe())
            end, ours = os.pipe()
            self._lifeline = self._files.enter_context(os.fdopen(end, "rb", buffering=0))
            self._files.enter_context(os.fdopen(ours, "wb", buffering=0))

    def _start(self, ending: contextlib.ExitStack) -> None:
        """Start the process, and wait until it has imported the library."""
        # In a program that embeds Python, this may be None, empty, or that program.
        interpreter = sys.executable
        remedy = "Set sys.executable to the path of a Python that has fheconv."
        if not isinstance(interpreter, str) or not interpreter:
            raise CannotStart(
                f"sys.executable is {interpreter!r}, so there is no Python to run the native library with. "
                f"{remedy}"
            )
        started_with = f"sys.executable={interpreter!r}"
        with _explained(f"The native library's process cannot be started with {started_with}", remedy):
            self._popen = _spawn(interpreter, self.folder, self._lifeline, self._theirs, self._output)
        ending.callback(_kill, self._popen)
        self._lifeline.close()
        self._theirs.close()  # so that `receive` ends when the process does
        try:
            if not self._connection.poll(START_SECONDS):
                raise CannotStart(
                    f"The native library's process, started with {started_with}, did not answer within "
                    f"{START_SECONDS:.0f} seconds. {remedy}"
                )
            self._connection.recv()
        except (EOFError, OSError) as error:
            how = self.obituary("at its start")
            raise CannotStart(
                f"The native library's process, started with {started_with}, {how}\n{remedy}"
            ) from error

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._popen.pid

    @property
    def held(self) -> int:
        """The number of bytes that the process holds beyond what it had after its imports."""
        return memory(self.pid) - self._idle_memory

    def send(self, request: Any) -> None:
        """Send a request. Raises `OSError` if the process has died."""
        self._connection.send(request)

    def receive(self) -> Any:
        """Wait for the reply. Raises `EOFError` or `OSError` if the process dies first, or amid the reply."""
        return self._connection.recv()

    def kill(self) -> None:
        """Have the process die, without cleaning up after it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def obituary(self, moment: str) -> str:
        """Return how the process ended, at which moment, and its last words."""
        try:
            status = self._popen.wait(timeout=10)
            how = (
                f"was killed by {signal.Signals(-status).name}"
                if status < 0
                else f"ended with status {status}"
            )
        except subprocess.TimeoutExpired:
            how = "stopped answering"
        self._output.seek(max(0, self._output.seek(0, os.SEEK_END) - LAST_OUTPUT))
        lines = self._output.read().decode(errors="replace").splitlines()
        words = "\n".join(line for line in lines if not _FRAME.match(line)).strip()[-LAST_WORDS:]
        return f"{how} {moment}. Its last words: {words or 'nothing'}{_limit_of_addresses()}"

    def abandon(self) -> None:
        """Let go of the process in a forked child: it is the parent's."""
        self._files.close()
        if hasattr(self, "end") and self.end.detach():
            self._popen.returncode = 0  # so that nobody waits for it, or warns of it


_started: "weakref.WeakSet[Process]" = weakref.WeakSet()


def _abandon_all() -> None:
    for process in list(_started):
        process.abandon()


os.register_at_fork(after_in_child=_abandon_all)


def memory(pid: int) -> int:
    """Return how many bytes of its own a process holds, or 0 if the system does not tell."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as lines:
        for line in lines:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def _spawn(
    interpreter: str, folder: str, end: IO[Any], connection: "Connection[Any, Any]", output: IO[bytes]
) -> "subprocess.Popen[bytes]":
    # With -P and the caller's own path, the worker imports the same modules as the caller.
    environment = {**_MALLOC, **os.environ, "PYTHONPATH": _path(), "TMPDIR": folder}
    return subprocess.Popen(  # noqa: S603 - our own interpreter, our own module
        [interpreter, "-P", "-m", "fheconv.circuits.native.start", str(connection.fileno())],
        pass_fds=[connection.fileno()],
        stdin=end,
        stdout=output,
        stderr=output,
        start_new_session=True,
        cwd=folder,
        env=environment,
    )


def _path() -> str:
    """Return where the caller finds modules. Relative entries mean nothing if its folder was deleted."""
    found = []
    for entry in sys.path:
        with contextlib.suppress(FileNotFoundError):
            found.append(os.path.abspath(entry))
    return os.pathsep.join(found)


@contextlib.contextmanager
def _explained(what: str, remedy: str = "") -> Iterator[None]:
    """Raise `CannotStart` for an error of the system in this block: what cannot be, why, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE) or not _can_open():
            most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            remedy = f"All file descriptors are in use (this process may have {most}): close some, or raise "
            remedy += "`ulimit -n`."
        elif error.errno in (errno.EAGAIN, errno.ENOMEM):
            remedy = "End other processes, or raise the limits that `ulimit -a` shows."
        raise CannotStart(f"{what}: {error}. {remedy}".strip()) from error


def _can_open() -> bool:
    """Return whether a file can be opened. If not, `tempfile` says that it found no usable folder."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return False
    return True


def _kill(popen: "subprocess.Popen[bytes]") -> None:
    """End a process and its children at once, and wait until it has."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(popen.pid, signal.SIGKILL)
    popen.wait()


def _limit_of_addresses() -> str:
    """Return a sentence on the limit of address space, if there is one: the library may not fit into it."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY:
        return ""
    return f"\nIt may have at most {most:,} bytes of address space (`ulimit -v`), which may be too few."
