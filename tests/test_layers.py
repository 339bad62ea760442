"""The rooms of fheconv/ and which way they import, read off the syntax trees: no module is imported here."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.rooms import FLOORS, PACKAGE

FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
BESIDE = {"__init__", "__main__", "quantized"}
CONCRETE = {"lowering/dialect.py", "circuits/native/library.py"}
MOST_LINES = 350
MOST_FUNCTION_LINES = 60
MOST_PARAMETERS = 8
# What users call takes what they choose. torch's operators have the parameters that torch gives them.
PUBLIC_CALLS = {"tune", "finetune", "of", "conv", "filter_matrix"}
OPERATORS = {"_batch_norm", "_conv_transpose"}


def modules() -> dict[str, Path]:
    """Return each module's file by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("fheconv", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(tree: ast.AST, names: set[str]) -> Iterator[str]:
    """Return the modules among `names` that a tree imports, inside functions and for types only too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in names else node.module


def graph() -> dict[str, set[str]]:
    """Return which modules of fheconv each module imports. The package's own table of names is no import."""
    found = modules()
    trees = {name: ast.parse(path.read_text()) for name, path in found.items() if name != "fheconv"}
    return {
        name: {other for other in imported(tree, set(found)) if other in found and other != "fheconv"}
        for name, tree in trees.items()
    }


def room(module: str) -> str:
    return module.split(".")[1]


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Return the imports that do not point down."""
    return [
        f"{name} imports {other}"
        for name, others in edges.items()
        for other in sorted(others)
        if room(name) != room(other) and room(name) != "__main__" and FLOOR[room(other)] >= FLOOR[room(name)]
    ]


def test_the_tree_is_the_rooms():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(FLOOR) - BESIDE
    assert len(folders) <= 12
    assert {path.stem for path in PACKAGE.glob("*.py")} == BESIDE


def test_imports_point_down():
    assert upward(graph()) == []


@pytest.mark.parametrize(
    ("module", "other"),
    [
        ("fheconv.basics.errors", "fheconv.arithmetic.matrix"),
        ("fheconv.quantizer.weights", "fheconv.capture.model"),
        ("fheconv.circuits.circuit", "fheconv.tuning.search"),
    ],
)
def test_an_import_that_points_up_or_across_is_seen(module, other):
    edges = graph()
    edges[module] = edges[module] | {other}
    assert upward(edges) == [f"{module} imports {other}"]


@pytest.mark.parametrize(
    "source",
    [
        "from fheconv.tuning import search",
        "def f():\n    from fheconv.tuning.search import tune",
        "if TYPE_CHECKING:\n    import fheconv.tuning.search",
    ],
)
def test_imports_anywhere_in_a_module_are_read(source):
    assert set(imported(ast.parse(source), set(modules()))) == {"fheconv.tuning.search"}


def test_there_is_no_circle():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_concrete_is_imported_in_two_files():
    found = set()
    for path in modules().values():
        for name in imported(ast.parse(path.read_text()), set()):
            if name.split(".")[0] == "concrete":
                found.add(str(path.relative_to(PACKAGE)))
    assert found == CONCRETE


def test_each_room_names_its_files():
    for folder in (path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE):
        caption = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        named = re.findall(r"^(\w+): .", caption, re.MULTILINE)
        inside = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
        inside += [path.name for path in folder.iterdir() if (path / "__init__.py").exists()]
        assert sorted(named) == sorted(inside), folder


def test_no_test_module_imports_another():
    """What tests share is in tests/support."""
    root = PACKAGE.parent
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for path in (root / "tests").rglob("test_*.py")
    }
    assert "tests.test_layers" in files
    found = {name: set(imported(ast.parse(path.read_text()), set(files))) for name, path in files.items()}
    assert {name: others for name, imports in found.items() if (others := imports & set(files))} == {}


def test_no_file_is_long():
    lengths = {
        str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}.{node.name}", node


def test_no_function_is_longer_than_a_screen():
    found = {}
    for name, node in functions():
        body = node.body[1:] if ast.get_docstring(node) else node.body
        length = node.end_lineno - body[0].lineno + 1 if body else 0
        if length > MOST_FUNCTION_LINES:
            found[name] = length
    assert found == {}


def test_no_function_takes_many_parameters():
    found = {}
    for name, node in functions():
        count = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
        if (
            count > MOST_PARAMETERS
            and node.name not in PUBLIC_CALLS | OPERATORS
            and not name.startswith("fheconv.cli.")
        ):
            found[name] = count
    assert found == {}
