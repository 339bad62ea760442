"""The examples in the docstrings print what they show."""

import doctest
import pkgutil
import tempfile
from importlib import import_module

import pytest

import fheconv

# Concrete is imported in a process of its own: after a run, it makes its process exit with status 0.
NATIVE = {f"fheconv.circuits.native.{name}" for name in ("library", "modules", "options")}
NOT_IMPORTED = {"fheconv.__main__", *NATIVE}
MODULES = {module.name for module in pkgutil.walk_packages(fheconv.__path__, "fheconv.")} - NOT_IMPORTED
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", ["fheconv", *sorted(MODULES)])
def test_the_examples_of_a_module_print_what_they_show(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    failed, _ = doctest.testmod(import_module(name), optionflags=OPTIONS, raise_on_error=False)
    assert failed == 0


def test_a_wrong_example_would_be_found(monkeypatch):
    module = import_module("fheconv.basics.arrays")
    monkeypatch.setattr(module, "__doc__", ">>> 1 + 1\n3\n")
    assert doctest.testmod(module, optionflags=OPTIONS, report=False).failed == 1
