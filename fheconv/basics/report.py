"""Prints reports as tables in a terminal and renders them in a notebook."""

import io
from abc import ABC, abstractmethod
from typing import Any

from rich.console import Console, RenderableType


class Report(ABC):
    """A report with a rich rendering; its text and HTML forms are made from that rendering."""

    @abstractmethod
    def __rich__(self) -> RenderableType: ...

    def __repr__(self) -> str:
        return str(self)  # Python's prompt shows the repr; notebooks use HTML

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


def _console(**options: Any) -> Console:
    """Return a console without a terminal. It prints text as it is, even if it looks like markup."""
    return Console(file=io.StringIO(), width=110, force_jupyter=False, markup=False, emoji=False, **options)
