"""Run notebooks and store them with their outputs: `python tests/benchmarks/notebooks.py 1 3`.

Numbers choose notebooks; without any, all are run. What tells of the machine is left out: warnings and
progress, and the names of folders.
"""

import argparse
import base64
import io
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
# A folder of the machine's own, in front of what is said of a file in it.
FOLDERS = (ROOT, tempfile.gettempdir(), sys.prefix, Path.home())
NAMED = re.compile("|".join(re.escape(str(folder)) + r"[/\\]?" for folder in FOLDERS))


# A picture in an animation.
PICTURE = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=\\\s]+)")
COLORS, WIDEST = 24, 600


def smaller(picture: str) -> str:
    """Return a picture (PNG in base64) of few colors, if it takes less room then."""
    made = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.thumbnail((WIDEST, 2 * WIDEST))
    image.quantize(COLORS, dither=Image.Dither.NONE).save(made, "PNG", optimize=True)
    return min(picture, base64.b64encode(made.getvalue()).decode(), key=len)


def small(output: Any) -> Any:
    """Return an output whose pictures have few colors."""
    data = output.get("data", {})
    if "image/png" in data:
        data["image/png"] = smaller(data["image/png"])
    if "text/html" in data:
        data["text/html"] = PICTURE.sub(
            lambda found: "data:image/png;base64," + smaller(re.sub(r"[\\\s]", "", found[1])),
            data["text/html"],
        )
    return output


def without_folders(value: Any) -> Any:
    """Return outputs in which no folder of this machine is named."""
    if isinstance(value, str):
        return NAMED.sub("", value)
    if isinstance(value, list):
        return [without_folders(part) for part in value]
    if isinstance(value, dict):
        return {key: part if key == "image/png" else without_folders(part) for key, part in value.items()}
    return value


def run(path: Path) -> None:
    """Run a notebook from its beginning, and write it back with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=900, record_timing=False, resources={"metadata": {"path": str(NOTEBOOKS)}}
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            kept = [one for one in cell.outputs if one.get("name") != "stderr"]
            cell.outputs = [nbformat.from_dict(small(without_folders(one))) for one in kept]
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run notebooks and store them with their outputs.")
    parser.add_argument("numbers", nargs="*", metavar="N", help="the number of a notebook, such as 3")
    numbers = parser.parse_args().numbers
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if not numbers or path.name.partition("-")[0] in numbers:
            print(path.name, flush=True)
            run(path)


if __name__ == "__main__":
    main()
