"""The shell's manners: versions, files that are mixed up, files that are there already, and images."""

import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fheconv
from tests.support import shell


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with all files, made step by step."""
    folder = tmp_path_factory.mktemp("made")
    shell.write_model(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for step in shell.STEPS:
            assert shell.here(patch, *step) == 0
    return folder


@pytest.fixture
def run(made, tmp_path, monkeypatch, ran):
    """Run the command in a copy of the folder: its exit status, standard output and standard error."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return ran


@pytest.mark.slow
def test_every_command_prints_whatever_the_terminal_can_show(tmp_path):
    shell.write_model(tmp_path)
    for step in shell.STEPS:
        done = shell.command(tmp_path, *step, PYTHONIOENCODING="ascii")
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii()
    assert "[/red], ?, ?" in done.stdout
    assert "[bold]fc" in shell.command(tmp_path, *shell.INSPECT, "--json").stdout


@pytest.mark.sampled(3)
@pytest.mark.parametrize("encoding", ["latin-1", "cp437", "utf-8"])
def test_errors_print_too(tmp_path, encoding):
    done = shell.command(tmp_path, "inspect", "日本.zip", PYTHONIOENCODING=encoding)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_the_version(run):
    status, printed, _ = run("--version")
    assert status == 0
    assert printed == f"fheconv {version('fheconv')}, concrete-python {version('concrete-python')}\n"


# The steps, and the places of the files in them.
READ = [
    (shell.KEYGEN, "out/client.zip"),
    (shell.ENCRYPT, "out/client.zip"),
    (shell.ENCRYPT, "keys.secret"),
    (shell.RUN, "out/server.zip"),
    (shell.RUN, "keys.eval"),
    (shell.RUN, "x.ct"),
    (shell.DECRYPT, "out/client.zip"),
    (shell.DECRYPT, "keys.secret"),
    (shell.DECRYPT, "y.ct"),
]
KINDS = {
    "out/client.zip": "a client.zip",
    "out/server.zip": "a server.zip",
    "keys.secret": "a file of secret keys",
    "keys.eval": "a file of evaluation keys",
    "x.ct": "a ciphertext",
    "y.ct": "a ciphertext",
    "x.npy": "a .npy file",
    "one.png": "a PNG image",
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("step", "right"), READ, ids=lambda x: x if isinstance(x, str) else x[0])
def test_a_file_that_is_another_is_named_with_what_it_is(run, step, right):
    Image.fromarray(np.zeros((2, 2), np.uint8)).save("one.png")
    for wrong, kind in KINDS.items():
        if kind == KINDS[right]:
            continue
        arguments = [*step, "--force"]
        arguments[step.index(right)] = wrong
        status, printed, said = run(*arguments)
        assert (status, printed) == (2, "")
        assert f"{wrong} is {kind}; give the " in said


def test_python_says_so_too(made):
    out = made / "out"
    with pytest.raises(fheconv.ArtifactError, match=r"server\.zip is a server\.zip; give the client\.zip"):
        fheconv.load_client(out / "server.zip")
    with pytest.raises(fheconv.ArtifactError, match=r"client\.zip is a client\.zip; give the server\.zip"):
        fheconv.load_server(out / "client.zip")
    damaged = made / "damaged"
    for name, load in (("x.ct", fheconv.Ciphertext.load), ("keys.eval", fheconv.EvaluationKeys.load)):
        damaged.write_bytes((made / name).read_bytes()[:-1])
        with pytest.raises(fheconv.ArtifactError, match=r"damaged: .*truncated"):
            load(damaged)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("step", shell.STEPS[:-1], ids=lambda step: step[0])
def test_no_file_is_written_over_unless_that_is_forced(run, step, tmp_path):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    status, _, said = run(*step)
    assert status == 2
    assert "exists" in said
    assert "--force" in said or "--overwrite" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert run(*step, "--force")[0] == 0


def test_secret_keys_are_not_written_over_even_then(run):
    secret = Path("keys.secret").read_bytes()
    for step in (shell.ENCRYPT, shell.RUN):
        arguments = [*step[:-1], "keys.secret", "--force"]
        status, _, said = run(*arguments)
        assert status == 2
        assert "secret keys, perhaps the only copy" in said
    assert Path("keys.secret").read_bytes() == secret


@pytest.mark.parametrize("ending", [".pt", ".pth", ".ckpt"])
@pytest.mark.parametrize("step", ["compile", "run", "run a layer", "check"])
def test_a_pickle_gets_an_answer_that_says_what_to_do(run, ending, step):
    file = f"model{ending}"
    torch.save(torch.nn.Conv2d(1, 1, 2).state_dict(), file)
    arguments = {
        "compile": ["compile", file, "--calibration", "x.npy", "-o", "new"],
        "run": ["run", file, "--input", "x.npy", "--output", "new.npy"],
        "run a layer": ["run", file, "--layer", "c", "--input", "x.npy", "--output", "new.npy"],
        "check": ["check", file, "--layer", "c", "--input-shape", "1,4,4", "--accumulator-bits", "8"],
    }[step]
    status, printed, said = run(*arguments)
    assert (status, printed) == (2, "")
    for word in (file, "torch.export.save", "safetensors.torch.save_file", "fheconv.quantize"):
        assert word in said


def test_inspect_says_what_a_foreign_file_is(run):
    torch.save({}, "model.pt")
    for file, kind in (("model.pt", "torch.save"), ("x.npy", ".npy"), ("m.json", "no file of fheconv")):
        status, _, said = run("inspect", file)
        assert status == 2
        assert kind in said


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_images_calibrate_and_are_encrypted(run, ending):
    for number, grey in enumerate(np.load("x.npy").astype(np.uint8)):
        Image.fromarray(grey[0]).save(f"{number}.png")
    Path("images").mkdir()
    for number in range(2):
        with Image.open(f"{number}.png") as picture:
            picture.save(f"images/{number}.{ending}")
    (Path("images") / "notes.txt").write_text("no image")
    for given in ("images", f"images/0.{ending}"):
        compiled = [*shell.COMPILE, "--force"]
        compiled[compiled.index("x.npy")] = given
        assert run(*compiled)[0] == 0
    encrypted = [*shell.ENCRYPT, "--force"]
    encrypted[encrypted.index("x.npy")] = f"images/0.{ending}"
    assert run(*shell.KEYGEN, "--force")[0] == 0
    assert run(*encrypted)[0] == 0
    Image.fromarray(np.zeros((3, 3), np.uint8)).save("images/larger.png")
    compiled[compiled.index(f"images/0.{ending}")] = "images"
    status, _, said = run(*compiled)
    assert status == 2
    assert "2 shapes" in said


def test_images_on_another_scale_are_warned_of_in_one_line(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    np.save(tmp_path / "x.npy", np.load(tmp_path / "x.npy") / 255)
    done = shell.command(tmp_path, *shell.ENCRYPT, "--force")
    assert done.returncode == 0
    assert done.stderr.startswith("InputScaleWarning: No value of these images")
    assert done.stderr.count("\n") == 1
    assert "x.ct" in done.stdout
