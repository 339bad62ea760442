"""Forks while another thread is amid something, to see that the child does not wait for that thread."""

import os
import signal
import threading
from collections.abc import Callable


def forked_amid(work: Callable[[], object], amid: threading.Event, go_on: threading.Event) -> int:
    """Return how a forked child ends that does `work` too while a thread here is amid it: 0 if it is done.

    The number is its exit status. `work` sets `amid` and waits for `go_on`, which is set in the child.
    """
    thread = threading.Thread(target=work)
    thread.start()
    assert amid.wait(30)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(20)
            go_on.set()
            work()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    go_on.set()
    thread.join()
    return status
