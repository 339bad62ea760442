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

from tests.support.notebooks import cell
from tests.support.rooms import FLOORS, PACKAGE
from tests.support.supported import table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


NETWORK, ENCRYPTED, CLIENT_AND_SERVER = blocks("python")


def run(program: str, folder: Path) -> str:
    """Run a Python program in a folder, and return what it prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_pth_file_leads_to_an_encrypted_result(tmp_path):
    """Numbers differ from machine to machine, and from run to run, by a little; the class is the label."""
    (tmp_path / "net.py").write_text(NETWORK)
    assert run(NETWORK, tmp_path) == ""
    (shown,) = blocks("text")
    numbers = re.compile(r"\d+(?:\.\d+)?")
    printed = run(ENCRYPTED, tmp_path)
    assert numbers.sub("#", printed) == numbers.sub("#", shown)
    for got, expected in zip(numbers.findall(printed), numbers.findall(shown), strict=True):
        assert float(got) == pytest.approx(float(expected), rel=0.2)
    assert re.search(r"class (\d) label \1$", printed)


def test_client_and_server_compute_what_the_comment_says(tmp_path):
    (said,) = re.findall(r"# (\[.*?\]), as torch", CLIENT_AND_SERVER)
    assert run(CLIENT_AND_SERVER, tmp_path).strip() == said


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
    assert table() in cell("2-every-convolution", "## 6. What is supported")


def test_it_is_short():
    assert len(README.splitlines()) <= 200


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
