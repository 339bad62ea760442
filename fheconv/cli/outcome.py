"""Runs the command, and turns what happens into messages and an exit status.

Exit status: 0 means success. 1 means that the command ran but a check failed: the widths do not fit, or a
result differs from the clear one. 2 means an error that fheconv reports, such as wrong arguments. 3 means an
error inside fheconv, printed with its traceback. 130 means that the user interrupted the command, 143 that it
was terminated, 129 that its terminal was closed.
"""

import contextlib
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

from fheconv.basics import progress
from fheconv.basics.errors import FheConvError
from fheconv.basics.warning import FheConvWarning
from fheconv.cli.arguments import print_error, print_warning


def run_to_status(app: Callable[[], Any]) -> None:
    """Run the command. An error of fheconv is printed as one line on standard error, with exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack characters, such as ×
    with _progress_lines(), warnings.catch_warnings():
        warnings.simplefilter("default", FheConvWarning)  # whatever PYTHONWARNINGS says
        warnings.showwarning = _shown(warnings.showwarning)
        try:
            try:
                app()
            finally:
                sys.stdout.flush()
        except FheConvError as error:
            _fail(f"{type(error).__name__}: {error}", 2)
        except MemoryError as error:
            _fail(f"Out of memory: {str(error) or 'no more to be had'}; take a smaller image or layer.", 2)
        except OSError as error:
            _forget_output()
            _fail(f"The system refuses to read or write: {error}.", 2)
        except KeyboardInterrupt:
            _fail("Interrupted.", 130)
        except Exception as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}"
            _fail(f"internal error: {said}, please report it with the lines above.", 3)


@contextlib.contextmanager
def _progress_lines() -> Iterator[None]:
    """Show the lines of progress of long work on standard error, where no spinner shows it."""
    handler, level = logging.StreamHandler(sys.stderr), progress.LOGGER.level
    progress.LOGGER.addHandler(handler)
    progress.LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        progress.LOGGER.removeHandler(handler)
        progress.LOGGER.setLevel(level)


def _shown(usual: Callable[..., None]) -> Callable[..., None]:
    """Return a function that shows warnings: those of fheconv without the line that led to them."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, FheConvWarning):
            print_warning(f"{category.__name__}: {message}")
        else:
            usual(message, category, filename, lineno, file, line)

    return show


def _forget_output() -> None:
    """Drop what standard output still holds, because Python would try to write it again at the end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, status: int) -> NoReturn:
    print_error(message)
    raise SystemExit(status) from None
