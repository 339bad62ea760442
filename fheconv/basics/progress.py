"""Shows progress during long work: on a terminal a spinner or a bar, elsewhere lines of the log.

These lines have the level INFO. So only those see them who ask for them, as the shell's commands do.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import DownloadColumn, Progress, SpinnerColumn, TransferSpeedColumn

T = TypeVar("T")
PIECE = 2**18
LOGGER = logging.getLogger(__name__)
# The seconds between two lines of the log.
SECONDS = 20.0


def status(message: str) -> AbstractContextManager[Any]:
    """Show `message` with a spinner on standard error while the block runs, elsewhere lines in the log."""
    console = Console(stderr=True)
    return console.status(message) if console.is_terminal else _logged(message)


def track(items: Sequence[T], message: str) -> Iterable[T]:
    """Yield `items` and show a bar on standard error until they end. Without a terminal, log lines."""
    with counting(message) as counter:
        counter.expect(len(items))
        for item in items:
            yield item
            counter.finish()


def track_bytes(chunks: Sequence[bytes], message: str) -> Iterator[bytes]:
    """Yield the bytes of `chunks` in pieces. Show a bar on standard error. Without a terminal, log lines."""
    columns = (SpinnerColumn(), *Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    pieces = (
        bytes(memoryview(chunk)[start : start + PIECE])
        for chunk in chunks
        for start in range(0, len(chunk), PIECE)
    )
    sent, total = 0, sum(map(len, chunks))
    if not console.is_terminal:
        with _logged(message, lambda: f"{sent:,} of {total:,} bytes, "):
            for piece in pieces:
                yield piece
                sent += len(piece)
        return
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(message, total=total)
        for piece in pieces:
            yield piece
            bar.advance(task, len(piece))


class Counter:
    """Counts what is done of what there is to do, where both grow. `show` is called at each change."""

    def __init__(self, show: Callable[["Counter"], object] = lambda _: None) -> None:
        self.total = self.done = 0
        self._show = show

    def expect(self, count: int) -> None:
        """Count so many more that are to be done."""
        self.total += count
        self._show(self)

    def finish(self, _: object = None) -> None:
        """Count one more that is done."""
        self.done += 1
        self._show(self)


@contextmanager
def counting(message: str) -> Iterator[Counter]:
    """Show a bar on standard error while the block runs, of what it counts. Without a terminal, log lines."""
    console = Console(stderr=True)
    if not console.is_terminal:
        counter = Counter()
        with _logged(message, lambda: f"{counter.done} of {counter.total}, "):
            yield counter
        return
    with Progress(SpinnerColumn(), *Progress.get_default_columns(), console=console, transient=True) as bar:
        task = bar.add_task(message, total=None)
        yield Counter(show=lambda now: bar.update(task, completed=now.done, total=now.total))


@contextmanager
def _logged(message: str, done: Callable[[], str] = str) -> Iterator[None]:
    """Log `message` now and then while the block runs, with what is `done` and the seconds so far."""
    if not LOGGER.isEnabledFor(logging.INFO):
        yield
        return
    ended, started = threading.Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(SECONDS):
            LOGGER.info("%s %s%.0f s", message, done(), time.monotonic() - started)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
