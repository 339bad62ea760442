"""Ordinary mistakes in the shell: no traceback, no file, a status that is not 0, and words that help."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.support import shell

LINEAR = [{"kind": "Flatten"}, {"name": "[bold]fc", "kind": "Linear"}]
# Cards that do not go with the weights.
CARDS = {
    "broken": "{architecture: ",
    "list": [1, 2],
    "empty": {},
    "unknown": {"architecture": [{"kind": "Attention"}]},
    "unnamed": {"architecture": [{"kind": "Flatten"}, {"name": "fc9", "kind": "Linear"}]},
    "option": {"architecture": [LINEAR[0], {**LINEAR[1], "stride": 2}]},
    "flat": {"architecture": LINEAR[1:]},
}
PIXELS = np.array([0.0, 255, 128, 64, 1, 2, 3, 250]).reshape(2, 1, 2, 2)
ARRAYS = {
    "nan": PIXELS * np.nan,
    "rgb": np.arange(24.0).reshape(2, 3, 2, 2),
    "nhwc": np.arange(24.0).reshape(2, 2, 2, 3),
    "large": np.arange(18.0).reshape(2, 1, 3, 3),
    "nothing": PIXELS[:0],
    "zeros": PIXELS * 0,
    "complex": PIXELS + 1j,
    "words": np.array(["a", "b"]),
    "number": np.float64(3),
    "flat": np.arange(4.0),
    "five": PIXELS[None],
    "far": PIXELS * 1000,
    "labels": np.array([0, 1]),
    "halves": np.array([0.5, 1]),
    "many": np.arange(7),
    "high": np.array([0, 99]),
}


@pytest.fixture(scope="module")
def mess(tmp_path_factory):
    """A folder with the files of a circuit, and many that are none."""
    folder = tmp_path_factory.mktemp("mess")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shell.write_model(folder)
        for step in shell.STEPS:
            assert shell.here(patch, *step) == 0
        other = [*shell.COMPILE[:2], "--calibration", "x.npy", "-o", "other"]
        save_file({"[bold]fc.weight": torch.eye(3, 4)}, "m.safetensors")
        assert shell.here(patch, *other) == 0
        arguments = ("--keys", "other.secret", "--evaluation-keys", "other.eval")
        assert shell.here(patch, "keygen", "other/client.zip", *arguments) == 0
        shell.write_model(folder)
        _write_mess()
    return folder


def _write_mess():
    for name, card in CARDS.items():
        shutil.copy("m.safetensors", f"{name}.safetensors")
        Path(f"{name}.json").write_text(card if isinstance(card, str) else json.dumps(card))
    for name, array in ARRAYS.items():
        np.save(f"{name}.npy", array)
    np.savez("several.npz", PIXELS, PIXELS)
    os.rename("several.npz", "several.npy")
    np.save("objects.npy", np.array([None]), allow_pickle=True)
    for ending in ("npy", "zip", "safetensors", "onnx", "png", "ct", "secret"):
        Path(f"none.{ending}").touch()
        Path(f"text.{ending}").write_text("hello, this is no such file\n")
    shutil.copy("m.safetensors", "cardless.safetensors")
    shutil.copy("m.safetensors", "weights.zip")
    for source, cut in (("out/client.zip", "cut.zip"), ("keys.secret", "cut.secret"), ("x.ct", "cut.ct")):
        Path(cut).write_bytes(Path(source).read_bytes()[:-30])
    for name, shape in (("rgb.png", (2, 2, 3)), ("large.png", (3, 3))):
        Image.fromarray(np.full(shape, 9, np.uint8)).save(name)
    Image.fromarray(np.full((2, 2), 40_000, np.uint16)).save("deep.png")
    torch.save(torch.nn.Linear(4, 3).state_dict(), "state.pth")
    torch.save(torch.nn.Linear(4, 3), "whole.pth")
    shutil.copy("state.pth", "state.safetensors")
    for name in ("folder", "texts"):
        Path(name).mkdir()
    shutil.copy("text.png", "texts")
    save_file({"c.weight": torch.ones(1, 1, 1, 1)}, "layer.safetensors")


def instead(step, right, wrong):
    """A step with another file in the place of the right one."""
    return [*(wrong if part == right else part for part in step), "--force"]


def of_a_layer(**options):
    given = {"layer": "c", "input-shape": "1,4,4", "accumulator-bits": "8", **options}
    words = (word for name, value in given.items() for word in (f"--{name}", value))
    return ["check", "layer.safetensors", *words]


MODEL = {
    "missing.safetensors": "missing.safetensors cannot be read: .*No such file",
    "missing.pth": "missing.pth cannot be read: .*No such file",
    "": "cannot be read: it is a folder",
    "folder": "folder cannot be read: it is a folder",
    "none.safetensors": "none.safetensors cannot be read as safetensors",
    "cardless.safetensors": "no card cardless.json.*onnx",
    "broken.safetensors": "card broken.json is not what",
    "list.safetensors": "card list.json is not what",
    "empty.safetensors": "card empty.json is not what",
    "unknown.safetensors": "unknown.json says of layer '0' kind='Attention'.*Linear.*onnx",
    "unnamed.safetensors": "layer 'fc9' kind='Linear', and the file has no such weights",
    "option.safetensors": "'stride', which fheconv does not know; what it knows is",
    "flat.safetensors": r"cannot be run on images of shape \(1, 2, 2\)",
    "state.safetensors": "state.safetensors looks like a file of torch.save",
    "state.pth": "state.pth looks like .* holds weights.*load_state_dict",
    "whole.pth": "whole.pth looks like .* whole pickled model.*weights_only=False",
    "none.onnx": "none.onnx cannot be read as an ONNX file",
    "text.onnx": "text.onnx cannot be read as an ONNX file",
    "m.json": "m.json is no model; give the .safetensors file",
    "x.npy": "x.npy is a .npy file, and no model; give an .onnx",
    "rgb.png": "rgb.png is a PNG image, and no model",
    "out/client.zip": "client.zip is a client.zip, and no model",
    "keys.secret": "keys.secret is a file of secret keys, and no model",
}
CALIBRATION = {
    "missing.npy": "--calibration=missing.npy cannot be read: .*No such file",
    "none.npy": "--calibration=none.npy cannot be read",
    "text.npy": "--calibration=text.npy cannot be read",
    "several.npy": "zip archive",
    "objects.npy": "objects.npy cannot be read",
    "nan.npy": "NaN or infinity; remove",
    "rgb.npy": r"images of shape \(3, 2, 2\)",
    "nhwc.npy": r"images of shape \(2, 2, 3\)",
    "large.npy": r"images of shape \(1, 3, 3\)",
    "nothing.npy": "calibration is empty; give",
    "zeros.npy": "not all zero",
    "complex.npy": "complex128; an array of real numbers",
    "words.npy": "an array of real numbers",
    "number.npy": r"shape \(\); a model takes a batch",
    "flat.npy": r"shape \(4,\); a model takes a batch",
    "five.npy": r"images of shape \(2, 1, 2, 2\)",
    "text.png": "text.png cannot be read: cannot identify",
    "deep.png": "more than 8 bits a value.*give it as .npy",
    "folder": "folder is a folder without image files.*png",
    "texts": "texts/text.png cannot be read",
    "m.safetensors": "cannot be read",
}
IMAGE = {
    "missing.npy": "--input=missing.npy cannot be read",
    "nan.npy": "nan; only finite",
    "far.npy": "outside the input range.*clip",
    "rgb.npy": r"takes \(n, 1, 2, 2\)",
    "large.png": r"takes \(n, 1, 2, 2\), or one image without n\. For another image size",
    "deep.png": "more than 8 bits",
    "five.npy": r"takes \(n, 1, 2, 2\)",
    "words.npy": "real numbers",
    "x.ct": "--input=x.ct cannot be read",
    "folder": "folder cannot be read: it is a folder",
}
LAYER = ["run", "layer.safetensors", "--layer", "c"]
WRONG_LABELS = (("many.npy", r"\(7,\)"), ("halves.npy", "float64"), ("high.npy", "99, and .* classes"))
STEPS = [
    (instead(shell.COMPILE, "out", "m.json"), "no folder m.json"),
    (instead(shell.COMPILE, "out", "/dev/full"), "no folder /dev/full"),
    ([*shell.COMPILE, "--force", "--rounding-bits", "9"], "rounding_bits=9 must be an integer from 2 to 8"),
    ([*shell.COMPILE, "--force", "--weight-bits", "many"], "--weight-bits='many' must be .* or auto"),
    ([*shell.COMPILE, "--force", "--p-error", "2"], "p_error=2.0 must lie between"),
    ([*shell.COMPILE, "--force", "--layer", "conv1"], r"no conv1.weight; its layers are \[bold\]fc"),
    ([*shell.COMPILE, "--force", "--keys-of", "out/server.zip"], "give the client.zip"),
    ([*shell.COMPILE[:-1], "a,b", "--force"], "2 class_names, and .* one for each score"),
    (instead(shell.KEYGEN, "out/client.zip", "missing.zip"), "missing.zip cannot be read"),
    (instead(shell.KEYGEN, "out/client.zip", "cut.zip"), "cut.zip is truncated, altered or no file"),
    (instead(shell.KEYGEN, "out/client.zip", "weights.zip"), "weights.zip is truncated, altered or no file"),
    (instead(shell.KEYGEN, "keys.secret", "missing/k"), "no folder .*missing; make it first"),
    (instead(shell.KEYGEN, "keys.secret", "keys.eval"), "are one file; secret keys need their own"),
    (instead(shell.KEYGEN, "keys.eval", "/dev/full"), "/dev/full cannot be written; choose another"),
    (instead(shell.ENCRYPT, "keys.secret", "other.secret"), "other.secret belong to another circuit"),
    (instead(shell.ENCRYPT, "keys.secret", "none.secret"), "none.secret: These bytes are no key file"),
    (instead(shell.ENCRYPT, "keys.secret", "cut.secret"), "cut.secret: The key file is truncated"),
    (instead(shell.ENCRYPT, "x.ct", "x.npy/x.ct"), "no folder .*x.npy; make it first"),
    (instead(shell.RUN, "keys.eval", "other.eval"), "evaluation keys belong to another circuit"),
    (instead(shell.RUN, "out/server.zip", "other/server.zip"), "evaluation keys belong to another circuit"),
    (instead(shell.RUN, "x.ct", "y.ct"), r"run takes what encrypt\(\) returned"),
    (instead(shell.RUN, "x.ct", "none.ct"), "none.ct: These bytes are no ciphertext"),
    (instead(shell.RUN, "x.ct", "cut.ct"), "cut.ct: .*truncated"),
    ([*shell.RUN, "--force", "--layer", "c"], "--layer: a server.zip is compiled already; leave it out"),
    (shell.RUN[:2] + shell.RUN[4:], "needs --evaluation-keys, which fheconv keygen makes"),
    (instead(shell.DECRYPT, "y.ct", "x.ct"), r"decrypt takes what run\(\) returned"),
    (instead(shell.DECRYPT, "keys.secret", "other.secret"), "other.secret belong to another circuit"),
    (instead(shell.DECRYPT, "y.npy", "y.txt"), "y.txt must end in .npy"),
    (["inspect", "folder"], "folder cannot be read: it is a folder"),
    (["inspect", "rgb.png"], "rgb.png is a PNG image"),
    (of_a_layer(layer="d"), "no d.weight; its layers are c"),
    (of_a_layer(**{"input-shape": "4"}), "--input-shape='4' must be C,M,N"),
    (of_a_layer(**{"input-shape": "1,4,x"}), "'1,4,x' must be integers"),
    (of_a_layer(**{"input-shape": "1,99999,99999"}), "check a smaller image"),
    (of_a_layer(stride="0"), "stride=0 must be an integer of at least 1"),
    (of_a_layer(padding="most"), "--padding='most' must be .* same, or valid"),
    (["run", "layer.safetensors", "--input", "rgb.png", "--output", "new.npy"], "weights with a --layer"),
    ([*LAYER, "--input", "rgb.png", "--output", "z.png"], "z.png must end in .npy"),
    ([*LAYER, "--input", "text.png", "--output", "new.npy"], "text.png cannot be read"),
    (["bench", "out/client.zip", "--client", "out/server.zip"], "is a client.zip; give the server"),
    (["demo", "--output", "z.txt"], "z.txt must end in"),
    (["serve", "missing.zip"], "missing.zip cannot be read"),
    (["serve", "out/server.zip", "--host", "0.0.0.0"], "Give a token, or allow it with --allow-remote"),
    (["compil"], "No such command 'compil'"),
    (["compile", "m.safetensors"], "Missing option '--calibration'"),
    (["compile", "m.safetensors", "--calib", "x.npy"], "No such option: --calib"),
    (["finetune", *shell.COMPILE[1:4], "--training", "rgb.npy", "-o", "new"], r"takes \(n, 1, 2, 2\)"),
    *(
        ([command, *shell.COMPILE[1:4], "--evaluation", "x.npy", "--labels", labels], words)
        for command in ("simulate", "tune")
        for labels, words in WRONG_LABELS
    ),
]  # fmt: skip
MISTAKES = [
    *((instead(shell.COMPILE, "m.safetensors", wrong), words) for wrong, words in MODEL.items()),
    *((instead(shell.COMPILE, "x.npy", wrong), words) for wrong, words in CALIBRATION.items()),
    *((instead(shell.ENCRYPT, "x.npy", wrong), words) for wrong, words in IMAGE.items()),
    *STEPS,
]


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.sampled(7)
@pytest.mark.parametrize(
    ("arguments", "words"), MISTAKES, ids=lambda part: part if isinstance(part, str) else part[0]
)
def test_a_mistake_is_answered(mess, monkeypatch, ran, arguments, words):
    monkeypatch.chdir(mess)
    before = files(mess)
    status, printed, said = ran(*arguments)
    assert status == 2
    assert printed == ""
    assert "Traceback" not in said
    assert "internal error" not in said
    flat = " ".join(said.replace("│", "").split())
    assert re.search(words, flat), flat
    assert files(mess) == before


COMMANDS = (
    "", "bench", "check", "compile", "decrypt", "demo", "encrypt", "finetune", "inspect", "keygen", "lock",
    "run", "serve", "simulate", "tune", "verify",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(ran, command):
    for option in ("--help", "-h"):
        status, printed, said = ran(*command.split(), option)
        assert (status, said) == (0, "")
        assert "Usage:" in printed


def test_whoever_stops_reading_ends_it_without_a_word_of_python(mess):
    for command in ("inspect out/server.zip", "compile --help"):
        line = f"{sys.executable} -m fheconv {command} | head -c 5"
        done = subprocess.run(line, shell=True, cwd=mess, capture_output=True, text=True, timeout=120)
        assert len(done.stdout) == 5
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
