"""The rooms of fheconv/ and which way they import, read off the syntax trees: no module is imported here."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.rooms import FLOORS, PACKAGE

FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
BESIDE = {"__init__", "__main__", "quantized"}
CONCRETE = {"lowering/dialect.py", "circuits/native/binding.py"}
MOST_LINES = 350
MOST_FUNCTION_LINES = 60
MOST_PARAMETERS = 8
# What users call takes what they choose. torch's operators have the parameters that torch gives them.
PUBLIC_CALLS = {"tune", "finetune", "distill", "of", "conv", "filter_matrix", "application"}
OPERATORS = {"_batch_norm", "_conv_transpose"}


@cache
def parsed(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text())


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


@cache
def graph() -> dict[str, set[str]]:
    """Return which modules of fheconv each module imports. The package's own table of names is no import."""
    found = modules()
    trees = {name: parsed(path) for name, path in found.items() if name != "fheconv"}
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
    edges = graph() | {module: graph()[module] | {other}}
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


def test_no_module_imports_the_package_itself():
    """The package's table leads to every room, so that an import of it may point anywhere."""
    found = modules()
    for name, path in found.items():
        assert "fheconv" not in set(imported(parsed(path), set(found))), name


def test_there_is_no_circle():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_concrete_is_imported_in_two_files():
    found = set()
    for path in modules().values():
        for name in imported(parsed(path), set()):
            if name.split(".")[0] == "concrete":
                found.add(str(path.relative_to(PACKAGE)))
    assert found == CONCRETE


def test_each_room_names_its_files():
    for folder in (path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE):
        caption = ast.get_docstring(parsed(folder / "__init__.py")) or ""
        named = re.findall(r"^(\w+): .", caption, re.MULTILINE)
        inside = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
        inside += [path.name for path in folder.iterdir() if (path / "__init__.py").exists()]
        assert sorted(named) == sorted(inside), folder


def test_no_file_is_long():
    lengths = {
        str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, path in modules().items():
        for node in ast.walk(parsed(path)):
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


# The tests themselves.

TESTS = Path(__file__).resolve().parent
PRIVATE = re.compile(r"_[A-Za-z]\w*")
DISPLAY = re.compile(r"_repr_\w+_")  # IPython asks objects for it
IN_CODE = re.compile(rf"(?:\.|\bimport |, ){PRIVATE.pattern}")


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def defined(tree: ast.AST) -> set[str]:
    """Return the private names that a file defines: functions, classes, variables, attributes of `self`."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                found.add(name)
    return {name for name in found if PRIVATE.fullmatch(name) and not DISPLAY.fullmatch(name)}


def reached(tree: ast.AST, private: set[str]) -> set[str]:
    """Return the names among `private` that a file uses: attributes, imports, and in strings.

    Strings are names to patch, alone or after a module's, and programs for other processes. Attributes of
    `self` are the file's own if it defines them.
    """
    mine, found = defined(tree), set()
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=value, attr=name) if not (is_self(value) and name in mine):
                found.add(name)
            case ast.ImportFrom(names=names):
                found |= {alias.name for alias in names}
            case ast.Constant(value=str(text)) if "fheconv" in text:
                found |= set(PRIVATE.findall(" ".join(IN_CODE.findall(text))))
            case ast.Constant(value=str(text)) if id(node) not in parts:
                found.add(text)
    return found & private


def private_names() -> set[str]:
    return set().union(*(defined(parsed(path)) for path in modules().values()))


def test_tests_reach_no_private_name_of_the_library():
    private, found = private_names(), {}
    for path in {*TESTS.rglob("*.py")} - {Path(__file__).resolve()}:  # the examples below are some
        if names := reached(parsed(path), private):
            found[str(path.relative_to(TESTS))] = names
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "circuit._one.keys",
        "thing()._one = None",
        "from fheconv.circuits.circuit import _one",
        "monkeypatch.setattr(circuit, '_one', 1)",
        "getattr(circuit, '_one')",
        "mock.patch('fheconv.circuits.circuit._one')",
        "'import fheconv\\ncircuit._one'",
        "'from fheconv.circuits.circuit import compile, _one'",
        "f'import fheconv; fheconv.x._one({x})'",
        "class Mine:\n    def f(self): return self._one",
    ],
)
def test_a_private_name_in_a_test_is_seen(source):
    assert reached(ast.parse(source), {"_one"}) == {"_one"}


@pytest.mark.parametrize(
    "source",
    [
        "class Mine:\n    def f(self): self._one = 1; return self._one",
        "torch._other",
        "f'{step}_one'",
        "'import other; other._one'",
        "report._repr_html_()",
    ],
)
def test_names_of_others_are_not_private_to_the_library(source):
    assert reached(ast.parse(source), {"_one"}) == set()


def test_private_names_of_every_kind_are_known():
    inside = "    _d: int = 1\n    def g(self): self._a = 1"
    source = f"def _f(): pass\nclass _C:\n{inside}\n_V = 2\ndef _repr_html_(): pass"
    assert defined(ast.parse(source)) == {"_f", "_C", "_d", "_a", "_V"}


def imported_tests(tree: ast.AST, files: set[str]) -> set[str]:
    """Return the test modules that a file imports, and every import that is relative."""
    relative = {
        "." * node.level + (node.module or "")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    }
    names = {name for name in imported(tree, files) if name.startswith("tests.")}
    return relative | {name for name in names if name.rpartition(".")[2].startswith(("test_", "conftest"))}


def files_of_tests() -> set[str]:
    return {".".join(path.relative_to(TESTS.parent).with_suffix("").parts) for path in TESTS.rglob("*.py")}


def test_tests_import_no_other_tests():
    """What several of them need is in tests/support, or beside the files that it makes."""
    files, found = files_of_tests(), {}
    for path in TESTS.rglob("*.py"):
        if names := imported_tests(parsed(path), files):
            found[str(path.relative_to(TESTS))] = names
    assert found == {}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from tests.test_layers import graph", "tests.test_layers"),
        ("from tests import test_layers", "tests.test_layers"),
        ("def f():\n    import tests.circuits.test_circuit", "tests.circuits.test_circuit"),
        ("from tests.conftest import settings", "tests.conftest"),
        ("from . import test_layers", "."),
        ("from ..support.nets import quantize", "..support.nets"),
    ],
)
def test_an_import_of_a_test_is_seen(source, name):
    assert imported_tests(ast.parse(source), files_of_tests()) == {name}
