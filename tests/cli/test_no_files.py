"""Paths that are of no regular file, in the place of every file that the shell reads or writes."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.support import shell

CHECK = ("check", "m.safetensors", "--layer", "c", "--input-shape", "1,4,4", "--accumulator-bits", "8")
READ = [
    ("inspect", "it"),
    ("keygen", "it", "--keys", "k", "--evaluation-keys", "e"),
    ("encrypt", "it", *shell.KEYS, "--input", "x.npy", "--output", "new"),
    ("run", "it.zip", "--evaluation-keys", "keys.eval", "--input", "x.ct", "--output", "new"),
    ("run", "out/server.zip", "--evaluation-keys", "it", "--input", "x.ct", "--output", "new"),
    ("decrypt", "out/client.zip", "--keys", "it", "--input", "x.ct"),
    ("compile", "it", "--calibration", "x.npy", "-o", "new"),
    ("compile", "it.pt2", "--trusted", "--calibration", "x.npy", "-o", "new"),
    ("compile", "m.safetensors", "--calibration", "it.npy", "-o", "new"),
    ("compile", "m.safetensors", "--calibration", "it", "-o", "new"),
    (CHECK[0], "it", *CHECK[2:]),
    ("bench", "it", "--client", "it"),
    ("serve", "it"),
]


def pipe(name):
    os.mkfifo(name)


def listening(name):
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(name)


def device(name):
    os.symlink("/dev/zero", name)


def folder(name):
    os.mkdir(name)


SCRIPT = """
import sys
from fheconv.cli.main import main
for arguments in {commands!r}:
    sys.argv = ["fheconv", *arguments]
    try:
        main()
    except SystemExit as ended:
        print(arguments[0], ended.code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("make", [pipe, listening, device, folder])
def test_what_is_no_file_is_refused_at_once(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    shell.write_model(tmp_path)
    for name in ("it", "it.zip", "it.npy", "it.pt2"):
        make(name)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(commands=READ)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines() == [f"{command[0]} 2" for command in READ], done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_nothing_but_files_is_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("new.npy")
    save_file({"c.weight": torch.ones(1, 1, 1, 1)}, "m.safetensors")
    np.save("x.npy", np.ones((1, 2, 2)))
    done = shell.command(
        tmp_path,
        *(
            "run",
            "m.safetensors",
            "--layer",
            "c",
            "--input",
            "x.npy",
            "--output",
            "new.npy",
            "--force",
        ),
    )
    assert done.returncode == 2
    assert "new.npy cannot be written" in done.stderr
    assert os.path.exists("new.npy")
    assert not os.path.isfile("new.npy")
