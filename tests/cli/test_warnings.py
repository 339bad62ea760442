"""Warnings in the shell: one line on standard error, and the command goes on."""

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fheconv.cli import main as cli


def test_images_a_little_outside_are_clipped_with_a_warning(tmp_path, monkeypatch, capsys):
    save_file({"c.weight": torch.ones(1, 1, 2, 2), "c.bias": torch.zeros(1)}, tmp_path / "m.safetensors")
    (tmp_path / "m.json").write_text('{"architecture": [{"name": "c", "kind": "Conv2d"}]}')
    np.save(tmp_path / "x.npy", np.linspace(0, 1, 18).reshape(2, 1, 3, 3))
    np.save(tmp_path / "one.npy", np.full((1, 3, 3), 1.04))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fheconv", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return capsys.readouterr().err

    run("compile", "m.safetensors", "--calibration", "x.npy", "-o", "out")
    run("keygen", "out/client.zip", "--keys", "k", "--evaluation-keys", "e")
    err = run("encrypt", "out/client.zip", "--keys", "k", "--input", "one.npy", "--output", "x.ct")
    assert err.startswith("InputRangeWarning: 9 of 9 values are outside")
    assert len(err.splitlines()) == 1
