"""Warnings and progress in the shell: lines on standard error, and the command goes on."""

import time

import numpy as np
import torch
from safetensors.torch import save_file

from fheconv.basics import progress
from fheconv.cli.outcome import run_to_status


def test_images_a_little_outside_are_clipped_with_a_warning(tmp_path, monkeypatch, ran):
    save_file({"c.weight": torch.ones(1, 1, 2, 2), "c.bias": torch.zeros(1)}, tmp_path / "m.safetensors")
    (tmp_path / "m.json").write_text('{"architecture": [{"name": "c", "kind": "Conv2d"}]}')
    np.save(tmp_path / "x.npy", np.linspace(0, 1, 18).reshape(2, 1, 3, 3))
    np.save(tmp_path / "one.npy", np.full((1, 3, 3), 1.04))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status, _, err = ran(*arguments)
        assert not status
        return err

    run("compile", "m.safetensors", "--calibration", "x.npy", "-o", "out")
    run("keygen", "out/client.zip", "--keys", "k", "--evaluation-keys", "e")
    err = run("encrypt", "out/client.zip", "--keys", "k", "--input", "one.npy", "--output", "x.ct")
    assert err.startswith("InputRangeWarning: 9 of 9 values are outside")
    assert len(err.splitlines()) == 1


def test_long_work_shows_lines_of_progress_when_it_is_piped(monkeypatch, capsys):
    monkeypatch.setattr("fheconv.basics.progress.SECONDS", 0.01)
    said = []

    def work():
        print("result")
        with progress.status("Working…"):
            while not said or "\n" not in said[-1]:
                time.sleep(0.01)
                said.append(capsys.readouterr().err)

    run_to_status(work)
    assert said[-1].startswith("Working… 0 s")
    assert not progress.LOGGER.handlers
