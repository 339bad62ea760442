"""Shows progress during long work, on a terminal only."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import DownloadColumn, Progress, SpinnerColumn, TransferSpeedColumn

T = TypeVar("T")
PIECE = 2**18


def status(message: str) -> AbstractContextManager[Any]:
    """Show `message` with a spinner on standard error while the block runs, on a terminal only."""
    console = Console(stderr=True)
    return console.status(message) if console.is_terminal else nullcontext()


def track(items: Sequence[T], message: str) -> Iterable[T]:
    """Yield `items` and show a bar on standard error until they end. Without a terminal, show no bar."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from items
        return
    with Progress(SpinnerColumn(), *Progress.get_default_columns(), console=console, transient=True) as bar:
        yield from bar.track(items, description=message)


def track_bytes(chunks: Sequence[bytes], message: str) -> Iterator[bytes]:
    """Yield the bytes of `chunks` in pieces. Show a bar on standard error, on a terminal only."""
    columns = (SpinnerColumn(), *Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(message, total=sum(map(len, chunks)))
        for chunk in chunks:
            view = memoryview(chunk)
            for start in range(0, len(chunk), PIECE):
                yield bytes(view[start : start + PIECE])
                bar.advance(task, min(PIECE, len(chunk) - start))
