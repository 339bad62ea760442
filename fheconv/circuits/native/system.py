"""Settles with the operating system how the native library's process lives and ends."""

import contextlib
import fcntl
import os
import resource
import shutil
import signal
import threading

from fheconv.basics.errors import CompilationError, ExecutionError

# What the library's first run needs of addresses, beside its results: 3 GiB of stacks, which it gives back
# at once, and a heap for each of its threads.
STACKS = 2**32
HEAP = 2**28
# The programs with which the library makes a file of what it compiled. Slim container images have neither.
PROGRAMS = ("ld", "ar")


def end_with_caller(descriptor: int) -> None:
    """End this process and its children as soon as the caller dies and so closes its end of this pipe.

    A thread waits for that. But key generation lets no thread of Python run. So on Linux, the kernel is asked
    for a signal too, and it needs nobody's help.

    PR_SET_PDEATHSIG would be shorter. But it also ends the process when the thread that started it ends.
    """
    with contextlib.suppress(AttributeError, OSError):  # the first is for systems without F_SETSIG
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, -os.getpgrp())
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC)

    def wait() -> None:
        os.read(descriptor, 1)  # nobody ever writes
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, name="fheconv end", daemon=True).start()


def raise_address_limit() -> None:
    """Allow this process as many addresses as its caller could allow itself (`ulimit -v`)."""
    least, most = resource.getrlimit(resource.RLIMIT_AS)
    if least != most:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def require_programs() -> None:
    """Raise `CompilationError` unless the programs are there without which the library cannot compile."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise CompilationError(
            f"Concrete compiles with the programs {' and '.join(PROGRAMS)}, and PATH has no "
            f"{' and no '.join(missing)}. On Debian and Ubuntu: apt-get install binutils."
        )


def require_addresses() -> None:
    """Raise `ExecutionError` if the library's first run would not get enough addresses: it would hang."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    needed = _addresses() + STACKS + HEAP * (os.cpu_count() or 1)
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise ExecutionError(
            f"This process may have {limit:,} bytes of address space (`ulimit -v`, RLIMIT_AS), and to run a "
            f"circuit Concrete needs up to {needed:,}, most of which it never fills; without them it hangs. "
            "Raise or remove that limit. To limit memory, use CompileConfig.memory_limit."
        )


def _addresses() -> int:
    """Return how many bytes of addresses this process has, or 0 if the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as sizes:
        return int(sizes.read().split()[0]) * resource.getpagesize()
    return 0
