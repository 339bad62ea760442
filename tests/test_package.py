import ast
import importlib
import json
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import fheconv

HEAVY = (
    "torch",
    "concrete",
    "matplotlib",
    "scipy",
    "sklearn",
    "typer",
    "rich",
    "numpy",
    "dask",
    "distributed",
)


def fresh(code):
    """What `code` prints as JSON in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_importing_the_package_imports_nothing_heavy():
    loaded = fresh("import json, sys, fheconv; print(json.dumps(list(sys.modules)))")
    assert "fheconv" in loaded
    assert not set(HEAVY) & {name.partition(".")[0] for name in loaded}


@pytest.mark.slow
def test_every_public_name_resolves_and_is_listed():
    code = """
import json, fheconv
import types
found = {name: getattr(fheconv, name) for name in fheconv.__all__ if name != "__version__"}
modules = [name for name, value in found.items() if isinstance(value, types.ModuleType)]
names = {name: found[name].__name__ if name in modules else found[name].__module__ for name in found}
print(json.dumps({"names": names, "dir": dir(fheconv), "all": fheconv.__all__}))
"""
    seen = fresh(code)
    assert {*seen["names"], "__version__"} == set(seen["all"]) == set(seen["dir"])
    assert all(home.startswith("fheconv.") for home in seen["names"].values())
    assert len(set(seen["all"])) == len(seen["all"])


def test_type_checkers_see_the_names_that_are_there():
    tree = ast.parse(Path(fheconv.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = set()
    for node in (*tree.body, *block.body):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("fheconv."):
            for alias in node.names:
                name = alias.asname or alias.name
                found = getattr(fheconv, name)  # a module is an attribute of its room from now on
                assert found is getattr(importlib.import_module(node.module), alias.name)
                seen.add(name)
    assert seen == {*fheconv.__all__} - {"__version__"}


def test_public_modules_are_imported_by_their_short_names():
    from fheconv import failures, plots

    assert (failures.__name__, plots.__name__) == ("fheconv.analysis.failures", "fheconv.analysis.plots")
    assert fheconv.__version__ == version("fheconv")


def test_quantizing_arrays_needs_neither_torch_nor_concrete():
    code = """
import json, sys, fheconv
network = fheconv.quantize([[1.0, 2.0], [3.0, 4.0]], [[[0, 1, 2], [3, 4, 5], [6, 7, 8]]])
network.budget(3)
print(json.dumps(list(sys.modules)))
"""
    assert not {"torch", "concrete", "matplotlib", "sklearn"} & set(fresh(code))


@pytest.mark.slow
def test_a_public_function_is_not_hidden_by_its_module():
    """Importing every module leaves each public name what it was."""
    code = """
import json, pkgutil, importlib, fheconv
before = {name: getattr(fheconv, name) for name in fheconv.__all__}
for module in pkgutil.walk_packages(fheconv.__path__, "fheconv."):
    if module.name not in ("fheconv.circuits.native.library", "fheconv.__main__"):
        importlib.import_module(module.name)
print(json.dumps([name for name in before if getattr(fheconv, name) != before[name]]))
"""
    assert fresh(code) == []


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="'fheconv' has no attribute 'convolve'"):
        fheconv.convolve  # noqa: B018
    assert not hasattr(fheconv, "__wrapped__")


def test_the_metadata_names_the_pythons_that_are_supported_and_the_types():
    file = Path(fheconv.__file__).parent.parent / "pyproject.toml"
    project = tomllib.loads(file.read_text())["project"]
    supported = SpecifierSet(project["requires-python"])
    start = "Programming Language :: Python :: 3."
    named = {int(one.removeprefix(start)) for one in project["classifiers"] if one.startswith(start)}
    assert named == {minor for minor in range(30) if f"3.{minor}" in supported}
    assert "Typing :: Typed" in project["classifiers"]
    assert (Path(fheconv.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize(
    ("name", "ours"), [("compile_torch_model", "quantize"), ("FHEModelServer", "load_server")]
)
def test_names_of_concrete_ml_are_answered(name, ours):
    with pytest.raises(AttributeError, match=rf"{name}.*here it is fheconv\..*{ours}"):
        getattr(fheconv, name)
    assert not hasattr(fheconv, name)
