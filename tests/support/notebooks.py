"""Reads the notebooks, which hold the documentation."""

import json
from pathlib import Path

NOTEBOOKS = Path(__file__).parent.parent.parent / "notebooks"


def cell(notebook: str, title: str) -> str:
    """Return the text of the cell of a notebook that begins with a title."""
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    (found,) = (text for text in ("".join(cell["source"]) for cell in cells) if text.startswith(title))
    return found
