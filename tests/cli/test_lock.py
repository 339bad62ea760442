"""The lock file: what a model needs, and what a retrained one may not need more of."""

import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support import shell

LOCK = ("lock", "m.safetensors", "--calibration", "x.npy", "--evaluation", "x.npy", "--labels", "y.npy")
NARROW = ("--weight-bits", "3", "--activation-bits", "2", "--input-bits", "3")


@pytest.fixture
def command(tmp_path, monkeypatch, ran):
    """Run the command in a folder with a model and data: its exit status and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    shell.write_network(tmp_path)
    np.save("y.npy", np.zeros(30, int))
    np.save("x.npy", np.random.default_rng(0).random((30, 1, 3, 3)))

    def run(*arguments):
        status, printed, said = ran(*arguments)
        return status, printed + said

    return run


def locked():
    return tomllib.loads(Path("fheconv.lock").read_text())


def test_the_same_model_passes(command):
    assert command(*LOCK)[0] == 0
    found = locked()
    assert found["circuit"]["lookups"] == 8
    assert found["layers"][0]["looked_up"] == 5
    assert 0 <= found["circuit"]["accuracy"] <= 1
    status, printed = command("lock", "--check")
    assert status == 0
    assert "as in" in printed


def test_more_lookups_fail(command):
    command(*LOCK, *NARROW)
    shell.write_network(Path(), filters=3)
    status, printed = command("lock", "--check")
    assert status == 1
    (line,) = (line for line in printed.splitlines() if " lookups " in line and "layer" not in line)
    assert "FAILS" in line
    assert " 8 " in line
    assert " 12 " in line


@pytest.mark.slow
def test_a_wider_layer_fails_and_a_narrower_one_does_not(command):
    command(*LOCK, *NARROW)
    text, found = Path("fheconv.lock").read_text(), locked()
    bits = found["layers"][0]["bits"]
    for stored, status in ((bits - 1, 1), (bits + 1, 0)):
        Path("fheconv.lock").write_text(text.replace(f"\nbits = {bits}\n", f"\nbits = {stored}\n", 1))
        ended, printed = command("lock", "--check")
        assert ended == status
        assert "bits of layer c" in printed


def test_lost_accuracy_fails(command):
    rng = np.random.default_rng(3)
    command(*LOCK)
    accuracy = locked()["circuit"]["accuracy"]
    tensors = load_file("m.safetensors")
    for _ in range(100):
        tensors["fc.bias"] = torch.tensor(rng.normal(size=3) * 5)
        save_file(tensors, "m.safetensors")
        status, printed = command("lock", "--check")
        if "accuracy" in printed and float(printed.split("accuracy")[1].split("│")[2]) < accuracy - 0.01:
            break
    else:
        pytest.fail("no model became worse")
    assert status == 1
    assert "sha256 of model" in printed


def test_other_test_images_fail(command):
    command(*LOCK)
    np.save("y.npy", np.ones(30, int))
    assert command("lock", "--check")[0] == 1


def test_arguments_that_do_not_go_together(command):
    assert command("lock", "m.safetensors")[0] == 2
    assert command(*LOCK[:-2])[0] == 2
    assert command(*LOCK, "--check")[0] == 2
    status, printed = command("lock", "--check")
    assert status == 2
    assert "cannot be read as a lock file" in printed
    Path("fheconv.lock").write_text("format = 2\n")
    assert command("lock", "--check")[0] == 2


@pytest.mark.slow
def test_a_folder_of_pictures_is_locked_like_their_array(command):
    """Calibration and evaluation images may be PNG files, whose order is that of their names."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 1, 3, 3), np.uint8)
    Path("pictures").mkdir()
    for number, picture in enumerate(pixels):
        Image.fromarray(picture[0]).save(f"pictures/{number:02}.png")
    np.save("pixels.npy", pixels)
    np.save("y.npy", np.arange(12) % 3)
    circuits = []
    for images in ("pixels.npy", "pictures"):
        data = ("--calibration", images, "--evaluation", images, "--labels", "y.npy")
        assert command("lock", "m.safetensors", *data)[0] == 0
        circuits.append(locked()["circuit"])
    assert circuits[0] == circuits[1]
    assert command("lock", "--check")[0] == 0
    Image.fromarray(255 - pixels[0, 0]).save("pictures/00.png")
    status, printed = command("lock", "--check")
    assert status == 1
    assert "sha256 of evaluation" in printed
