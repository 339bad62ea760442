"""Runs the command in the process of the tests, which saves the seconds of its imports."""

import pytest

from tests.support import shell


@pytest.fixture
def ran(monkeypatch, capsys):
    """Run the command with arguments: its exit status, standard output and standard error."""

    def run(*arguments):
        return shell.here(monkeypatch, *arguments), *capsys.readouterr()

    return run
