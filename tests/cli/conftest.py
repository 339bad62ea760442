"""Runs the command in the process of the tests, which saves the seconds of its imports."""

import sys

import pytest

from fheconv.cli.main import main


@pytest.fixture
def ran(monkeypatch, capsys):
    """Run the command with arguments: its exit status, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fheconv", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    return run
