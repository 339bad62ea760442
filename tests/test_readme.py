import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from fheconv.cli.main import app
from tests.support.rooms import FLOORS, PACKAGE
from tests.support.supported import table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


# Fewer numbers to choose from than a reader's search has.
QUICK = "from fheconv.quantizer import allocation\nallocation.LEVELS, allocation.NARROWEST = (8, 12), 8\n"
PRINTED = [
    ["Accumulator budget", "Cost of one encrypted image"],
    ["Cheapest circuits by accuracy"],
    blocks("text")[2:],  # all that it prints
    ["edges as in clear: True"],
]


EXAMPLES = [*zip(blocks("python"), PRINTED, strict=True)]
CLIENT_AND_SERVER = 2


@pytest.mark.parametrize(
    ("example", "titles"),
    [
        pytest.param(*example, marks=[] if number == CLIENT_AND_SERVER else pytest.mark.slow)
        for number, example in enumerate(EXAMPLES)
    ],
)
def test_the_python_examples_run(example, titles, tmp_path):
    (tmp_path / "models").symlink_to(ROOT / "models")
    done = subprocess.run(
        [sys.executable, "-c", QUICK + example], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert all(title in done.stdout for title in titles)


def test_the_budget_report_shown_is_the_one_printed():
    command, shown = blocks("text")[:2]
    arguments = command.removeprefix("$ fheconv ").split()
    arguments[1] = str(ROOT / arguments[1])
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert " ".join(shown.split()) in " ".join(done.stdout.split())


@pytest.mark.slow
def test_the_shell_commands_run(tmp_path):
    """With a model of four lookups by the name of the shown one."""
    (tmp_path / "models").mkdir()
    rng = np.random.default_rng(0)
    weights = {"c.weight": rng.normal(size=(1, 1, 5, 5)), "fc.weight": rng.normal(size=(10, 4))}
    save_file(weights, tmp_path / "models" / "tinycnn-digits.safetensors")
    layers = [{"name": "c", "kind": "Conv2d", "stride": 3}, {"kind": "ReLU"}, {"kind": "Flatten"}]
    card = {"architecture": [*layers, {"name": "fc", "kind": "Linear"}]}
    (tmp_path / "models" / "tinycnn-digits.json").write_text(json.dumps(card))
    (commands,) = blocks("bash")
    shell = f'fheconv() {{ "{sys.executable}" -m fheconv "$@"; }}\n' + commands.replace(
        "python -c", f'"{sys.executable}" -c'
    )
    done = subprocess.run(["bash", "-ec", shell], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Accumulator budget" in done.stdout
    assert re.search(r"│ 0 +│ \d +│", done.stdout)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.slow
def test_the_table_of_what_is_supported_is_what_was_tried():
    (shown,) = re.findall(
        r"^(?:\|.*\n)+", README.partition("## What is supported")[2].partition("\n## ")[0], re.M
    )
    assert shown == table() + "\n"


def test_the_layout_is_the_captions_in_floor_order():
    section = README.partition("## How the code is laid out\n")[2].partition("\n## ")[0].strip()
    lines = []
    for room in (room for floor in FLOORS for room in floor):
        folder = PACKAGE / room
        path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        caption = ast.get_docstring(ast.parse(path.read_text())) or ""
        lines.append(f"- `{room}{'/' if folder.is_dir() else '.py'}`: {caption.splitlines()[0]}")
    assert [line for line in section.splitlines() if line.startswith("- ")] == lines
    assert len(section.splitlines()) <= 15


def test_there_are_exactly_two_commands_and_ci_runs_them():
    assert [block.strip() for block in blocks("sh")] == re.findall(r"^pip install .*$", README, re.MULTILINE)
    assert len(blocks("sh")) == 2


def test_git_ignores_the_keys_and_ciphertexts_of_the_example():
    ignored = (ROOT / ".gitignore").read_text().split()
    (commands,) = blocks("bash")
    made = set(re.findall(r"[\w./]+\.(?:secret|eval|ct)\b", commands))
    assert {"keys.secret", "keys.eval"} < made
    for name in made:
        pattern = f"*{Path(name).suffix}"
        assert pattern in ignored
        assert f"`{pattern}`" in README


def test_what_is_said_to_install_is_here_and_not_on_an_index():
    """Nothing is published under the name of the project."""
    notebooks = [
        path.read_text().replace('\\"', '"') for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
    ]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    said = [
        what for text in (README, *notebooks) for what in re.findall(r'pip install (?:-e )?"(.*?)"', text)
    ]
    assert len(said) >= 4
    for what in said:
        assert re.fullmatch(r"\.\[(\w+)\]", what)
        assert what[2:-1] in extras
