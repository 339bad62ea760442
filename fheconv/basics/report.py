"""Prints reports as tables in a terminal and renders them in a notebook."""

import io
from abc import ABC, abstractmethod

from rich.console import Console, RenderableType


class Report(ABC):
    """A report with a rich rendering; its text and HTML forms are made from that rendering."""

    @abstractmethod
    def __rich__(self) -> RenderableType: ...

    def __repr__(self) -> str:
        return str(self)  # Python's prompt shows the repr; notebooks use HTML

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110, force_jupyter=False, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), width=110, record=True, force_jupyter=False)
        console.print(self)
        return console.export_html(
            inline_styles=True, code_format='<pre style="line-height:1.2">{code}</pre>'
        )
