"""Prints reports as tables and objects in a few lines, in a terminal and in a notebook."""

import html
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from rich.console import Console, RenderableType

# What Python's prompt shows of an object has at most this many lines.
MOST_LINES = 10
# A word in it has at most this many letters.
MOST_LETTERS = 100


class Report(ABC):
    """A report with a rich rendering; its text and HTML forms are made from that rendering."""

    @abstractmethod
    def __rich__(self) -> RenderableType: ...

    def __repr__(self) -> str:
        """Return the beginning of the report, as Python's prompt shows it; notebooks use HTML."""
        lines = str(self).splitlines()
        if len(lines) > MOST_LINES:
            lines[MOST_LINES - 1 :] = [f"… print() shows all {len(lines)} lines."]
        return "\n".join(lines)

    def __str__(self) -> str:
        console = _console(color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def _repr_html_(self) -> str:
        console = _console(record=True)
        console.print(self)
        return console.export_html(
            inline_styles=True, code_format='<pre style="line-height:1.2">{code}</pre>'
        )


class Brief(ABC):
    """An object that shows itself as a title and a few rows of words, as text and as an HTML table."""

    @abstractmethod
    def _summary(self) -> tuple[str, Sequence[tuple[str, ...]]]:
        """Return the title and the rows, all of one length."""

    def _shown(self) -> tuple[str, list[tuple[str, ...]]]:
        """Return the title and as many rows as are shown, without line breaks and long words."""
        title, rows = self._summary()
        kept = list(rows)
        if len(kept) >= MOST_LINES:
            more = f"… and {len(kept) - MOST_LINES + 2} more"
            kept[MOST_LINES - 2 :] = [(more, *[""] * (len(kept[0]) - 1))]
        return _one_line(title), [tuple(map(_one_line, row)) for row in kept]

    def __repr__(self) -> str:
        title, rows = self._shown()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join([title, *(f"  {line}" for line in lines)])

    def _repr_html_(self) -> str:
        title, rows = self._shown()
        cells = ("".join(f"<td>{html.escape(word)}</td>" for word in row) for row in rows)
        body = "".join(f"<tr>{line}</tr>" for line in cells)
        return f"<table><caption>{html.escape(title)}</caption>{body}</table>"


def _one_line(word: str) -> str:
    plain = " ".join(word.split())
    return plain if len(plain) <= MOST_LETTERS else f"{plain[: MOST_LETTERS - 1]}…"


def _console(**options: Any) -> Console:
    """Return a console without a terminal. It prints text as it is, even if it looks like markup."""
    return Console(file=io.StringIO(), width=110, force_jupyter=False, markup=False, emoji=False, **options)
