"""Signals, and an output that cannot be written: the exit status, and no traceback."""

import os
import signal
import subprocess
import sys

import pytest

from tests.support import shell

# Whoever starts pytest in the background has it ignore interruptions, and so do its children.
HEEDING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
ENDING = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
# Let an import last until the signal comes, and swallow it as packages do that are optional to others.
IMPORTING = """
import sys, time

class Slow:
    def find_spec(self, name, path, target=None):
        if name == {name!r}:
            print("importing", flush=True)
            try:
                time.sleep(60)
            except BaseException as error:
                raise ImportError("no such package") from error

sys.meta_path.insert(0, Slow())
sys.argv = ["fheconv", "check", "m.safetensors", "--layer", "c", "--input-shape", "1,4,4",
            "--accumulator-bits", "8"]
from fheconv.cli.entry import main
main()
"""


def started(folder, code):
    """Start a process that heeds signals."""
    return subprocess.Popen(
        [sys.executable, "-c", HEEDING + code],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("name", ["numpy", "typer", "rich"])
def test_a_signal_in_the_middle_of_the_imports(tmp_path, name, number, status):
    child = started(tmp_path, IMPORTING.format(name=name))
    assert child.stdout.readline() == "importing\n"
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == status
    assert said == "Interrupted.\n"


WORKING = """
import sys, time
from fheconv.cli import main as commands

def work(*_, **__):
    try:
        print("working", flush=True)
        time.sleep(60)
    finally:
        print("cleaned", flush=True)

commands.app = work
from fheconv.cli.entry import main
main()
"""


@pytest.mark.parametrize(("number", "status"), ENDING)
def test_a_signal_in_the_middle_of_the_work_cleans_up(tmp_path, number, status):
    child = started(tmp_path, WORKING)
    assert child.stdout.readline() == "working\n"
    child.send_signal(number)
    printed, said = child.communicate(timeout=60)
    assert child.returncode == status
    assert printed == "cleaned\n"
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_command_in_the_background_may_ignore_interruptions(tmp_path):
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + WORKING.replace("60", "2")
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "working\n"
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=60)[0] == "cleaned\n"
    assert child.returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [["--version"], ["check", "--help"]])
def test_an_output_that_is_full(tmp_path, arguments):
    shell.write_model(tmp_path)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fheconv", *arguments],
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert done.returncode == 2
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr
