"""Makes the tables of the benchmarks that measure several seeds."""

from collections.abc import Callable, Sequence

from rich.box import MARKDOWN
from rich.table import Table


def spread(values: Sequence[float], text: Callable[[float], str]) -> str:
    """Write the mean, and the range if there is one."""
    mean, low, high = text(sum(values) / len(values)), text(min(values)), text(max(values))
    return mean if low == high else f"{mean} ({low}–{high})"


def markdown(title: str, first: str, *others: str) -> Table:
    """Make a table in Markdown. Its first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left", box=MARKDOWN)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
