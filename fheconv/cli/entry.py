"""Starts the command. It answers signals from the beginning, because the imports take seconds."""

import os
import signal
from types import FrameType
from typing import NoReturn

# As a shell has it: 128 and the number of the signal.
STATUS = {signal.SIGHUP: 129, signal.SIGINT: 130, signal.SIGTERM: 143}


def main() -> None:
    """Run the command `fheconv`."""
    # A shell lets processes in the background ignore Ctrl-C, and nohup a closed terminal. That is kept.
    heard = [number for number in STATUS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, _leave_at_once)
    from fheconv.cli.main import main as run

    for number in heard:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _terminate)
    run()


def _leave_at_once(number: int, _: FrameType | None) -> NoReturn:
    """Leave in the middle of an import, where an exception may be taken for a missing package."""
    os.write(2, b"Interrupted.\n")
    os._exit(STATUS[signal.Signals(number)])


def _terminate(number: int, _: FrameType | None) -> NoReturn:
    """Leave like after an error, so that half-written files and worker processes go too."""
    raise SystemExit(STATUS[signal.Signals(number)])
