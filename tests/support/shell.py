"""A folder with the files of a tiny circuit, made by the command, and the command as a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fheconv.cli.main import main

KEYS = ("--keys", "keys.secret")
COMPILE = ("compile", "m.safetensors", "--calibration", "x.npy", "-o", "out", "--class-names", "[/red],×,ü")
KEYGEN = ("keygen", "out/client.zip", *KEYS, "--evaluation-keys", "keys.eval")
ENCRYPT = ("encrypt", "out/client.zip", *KEYS, "--input", "x.npy", "--output", "x.ct")
RUN = ("run", "out/server.zip", "--evaluation-keys", "keys.eval", "--input", "x.ct", "--output", "y.ct")
DECRYPT = ("decrypt", "out/client.zip", *KEYS, "--input", "y.ct", "--output", "y.npy")
INSPECT = ("inspect", "out/server.zip")
STEPS = (COMPILE, KEYGEN, ENCRYPT, RUN, DECRYPT, INSPECT)


def write_model(folder: Path) -> None:
    """Weights, a card and two images (1, 2, 2), grey levels, of a linear layer with three results."""
    weights = {"[bold]fc.weight": torch.tensor(np.arange(12.0).reshape(3, 4) - 5)}
    save_file(weights, folder / "m.safetensors")
    architecture = [{"kind": "Flatten"}, {"name": "[bold]fc", "kind": "Linear"}]
    (folder / "m.json").write_text(json.dumps({"architecture": architecture}))
    np.save(folder / "x.npy", np.array([0.0, 255, 128, 64, 1, 2, 3, 250]).reshape(2, 1, 2, 2))


CARD = [
    {"name": "c", "kind": "Conv2d"},
    {"kind": "ReLU"},
    {"kind": "Flatten"},
    {"name": "fc", "kind": "Linear"},
]


def write_network(folder: Path, seed: int = 1, filters: int = 2) -> None:
    """Weights and a card of a network with lookups that tells three classes of images (1, 3, 3)."""
    rng = np.random.default_rng(seed)
    weights = {
        "c.weight": torch.tensor(rng.normal(size=(filters, 1, 2, 2))),
        "c.bias": torch.tensor(rng.normal(size=filters)),
        "fc.weight": torch.tensor(rng.normal(size=(3, 4 * filters))),
        "fc.bias": torch.tensor(rng.normal(size=3)),
    }
    save_file(weights, folder / "m.safetensors")
    (folder / "m.json").write_text(json.dumps({"architecture": CARD}))


def here(patch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process, which saves the seconds of its imports, and return its status."""
    patch.setattr(sys, "argv", ["fheconv", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def command(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "fheconv", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=240,
    )
