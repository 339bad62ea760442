"""Signs of life during long work, on a terminal only."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress, SpinnerColumn

T = TypeVar("T")


def status(message: str) -> AbstractContextManager[Any]:
    """Show `message` with a spinner on standard error while the block runs; nothing if it is no terminal."""
    console = Console(stderr=True)
    return console.status(message) if console.is_terminal else nullcontext()


def track(items: Sequence[T], message: str) -> Iterable[T]:
    """Go through `items` with a bar on standard error that ends with them; none if it is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from items
        return
    with Progress(SpinnerColumn(), *Progress.get_default_columns(), console=console, transient=True) as bar:
        yield from bar.track(items, description=message)
