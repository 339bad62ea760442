"""Saved circuits from the shell: files in, files out, exit statuses, and secrets that stay where they are."""

import contextlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import fheconv
from fheconv.capture.checkpoint import load_model
from fheconv.cli.bench import Measurement
from fheconv.cli.main import app
from tests.support import onnx_files, shell
from tests.support.files import secret_rows

CONFIG = fheconv.QuantConfig(accumulator_bits=4)
COMPILE = ("compile", "m.safetensors", "--calibration", "x.npy", "-o", "out", "--accumulator-bits", "4")
KEYGEN = ("keygen", "out/client.zip", "--keys", "keys.secret", "--evaluation-keys", "keys.eval")
ENCRYPT = ("encrypt", "out/client.zip", "--keys", "keys.secret", "--input", "one.npy", "--output", "x.ct")
RUN = ("run", "out/server.zip", "--evaluation-keys", "keys.eval", "--input", "x.ct", "--output", "y.ct")
DECRYPT = ("decrypt", "out/client.zip", "--keys", "keys.secret", "--input", "y.ct")


def write_model(folder: Path) -> None:
    """Weights, card and images (8, 1, 3, 3) of a network with four lookups and three results."""
    rng = np.random.default_rng(1)
    tensors = {
        "c.weight": torch.tensor([[[[1.0, -1.0], [0.5, 1.0]]]]),
        "c.bias": torch.tensor([-0.5]),
        "fc.weight": torch.tensor(rng.normal(size=(3, 4))),
        "fc.bias": torch.tensor(rng.normal(size=3)),
    }
    save_file(tensors, folder / "m.safetensors")
    (folder / "m.json").write_text(json.dumps({"architecture": shell.CARD}))
    x = rng.random((8, 1, 3, 3))
    np.save(folder / "x.npy", x)
    np.save(folder / "one.npy", x[0])


COMPILE_CLASSES = (*COMPILE, "--p-error", "1e-5", "--class-names", "cat,dog,[red]")
STEPS = (COMPILE_CLASSES, KEYGEN, ENCRYPT, RUN, (*DECRYPT, "--json"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which every step was taken, and what they printed."""
    folder = tmp_path_factory.mktemp("shell")
    write_model(folder)
    printed = []
    with contextlib.chdir(folder):
        for arguments in STEPS:
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 0, done.output
            assert done.stderr == ""
            printed.append(done.stdout)
    for name in ("out/client.zip", "keys.eval", "keys.secret", "y.ct"):
        data = (folder / name).read_bytes()
        (folder / f"half{Path(name).suffix}").write_bytes(data[: len(data) // 2])
    with zipfile.ZipFile(folder / "bad.pt2", "w") as archive:
        archive.writestr("no.program", b"")
    return folder, printed


@pytest.fixture
def command(made, tmp_path, monkeypatch, ran):
    """Run the command in another such folder: its exit status, standard output and standard error."""
    shutil.copytree(made[0], tmp_path, copy_function=os.link, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        forced = ["--force"] if arguments[0] in ("compile", "encrypt", "run", "decrypt") else []
        return ran(*arguments, *forced)

    return run


def expected(folder: Path) -> np.ndarray:
    network = fheconv.quantize(load_model(folder / "m.safetensors"), np.load(folder / "x.npy"), CONFIG)
    return network(np.load(folder / "x.npy"))


def files() -> dict[Path, tuple[int, int]]:
    """What is in the folder, and which files have been written since."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in Path().rglob("*")}


@pytest.mark.slow
def test_the_whole_path_gives_the_right_class(tmp_path):
    """Each step is taken in a process of its own."""
    write_model(tmp_path)
    printed = []
    for arguments in STEPS:
        done = shell.command(tmp_path, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        printed.append(done.stdout)
    y = expected(tmp_path)[0]
    answer = json.loads(printed[-1])
    np.testing.assert_array_equal(answer["results"], y)
    assert answer["class_names"] == ["cat", "dog", "[red]"]
    assert answer["classes"] == [answer["class_names"][y.argmax()]]
    assert "Accumulator budget" in printed[0]
    assert "Cost of one encrypted image" in printed[0]


@pytest.mark.slow
def test_a_second_version_of_a_model_runs_under_the_keys_of_the_first(command):
    second = (*COMPILE[:5], "new", *COMPILE[6:]), ("--weight-bits", "3", "--p-error", "1e-5")
    status, _, errors = command(*second[0], *second[1], "--keys-of", "out/client.zip")
    assert (status, errors) == (0, "")
    for arguments in (ENCRYPT, RUN, (*DECRYPT, "--output", "y.npy")):
        status, _, errors = command(*(part.replace("out/", "new/") for part in arguments))
        assert (status, errors) == (0, "")
    images = np.load("x.npy")
    config = fheconv.QuantConfig(accumulator_bits=4, weight_bits=3)
    network = fheconv.quantize(load_model(Path("m.safetensors")), images, config)
    np.testing.assert_array_equal(np.load("y.npy"), network(images[0]))


@pytest.mark.slow
def test_a_circuit_in_stages_ends_in_time_and_goes_on(command):
    staged = (
        *COMPILE_CLASSES[:5],
        "new",
        *COMPILE_CLASSES[6:],
        "--keys-of",
        "out/client.zip",
        "--blocks",
        "2",
    )
    assert command(*staged)[0] == 0
    encrypt, run, decrypt = (
        [part.replace("out/", "new/") for part in one] for one in (ENCRYPT, RUN, DECRYPT)
    )
    assert command(*encrypt)[0] == 0
    status, _, errors = command(*run, "--keep", "half", "--time-limit", "1e-9")
    assert status == 2
    assert "run the same ciphertext again" in errors.replace("\n", " ")
    assert command(*run, "--keep", "half") == (0, mock.ANY, "")
    assert not Path("half").exists()
    assert command(*decrypt, "--output", "y.npy")[0] == 0
    images = np.load("x.npy")
    network = fheconv.quantize(load_model(Path("m.safetensors")), images, CONFIG)
    np.testing.assert_array_equal(np.load("y.npy"), network(images[0]))


@pytest.mark.slow
def test_a_batch_and_an_image_file(command, tmp_path):
    encrypted = [*ENCRYPT]
    encrypted[encrypted.index("one.npy")] = "x.npy"
    for arguments in (encrypted, RUN, (*DECRYPT, "--output", "y.npy")):
        status, printed, _ = command(*arguments)
        assert status == 0
    np.testing.assert_array_equal(np.load("y.npy"), expected(tmp_path))
    assert len(re.findall(r"\b(?:cat|dog|\[red\]) +│", printed)) == 8
    Image.fromarray(np.eye(3, dtype=np.uint8)).save("one.png")
    encrypted[encrypted.index("x.npy")] = "one.png"
    assert command(*encrypted)[0] == 0


def test_results_without_classes_are_printed_as_they_are(command):
    assert command(*COMPILE, "--p-error", "1e-5", "--layer", "c")[0] == 0
    assert command(*KEYGEN, "--overwrite")[0] == 0
    assert command(*ENCRYPT)[0] == 0
    assert command(*RUN)[0] == 0
    status, printed, _ = command(*DECRYPT)
    assert (status, printed[:3]) == (0, "[[[")
    status, printed, _ = command(*DECRYPT, "--json")
    assert np.array(json.loads(printed)["results"]).shape == (1, 2, 2)
    assert json.loads(printed)["classes"] is None


FILES = {
    "out/client.zip": "client",
    "out/server.zip": "server",
    "keys.secret": "secret keys",
    "keys.eval": "evaluation keys",
    "x.ct": "encrypted images",
    "y.ct": "encrypted results",
}


@pytest.mark.parametrize("name", FILES)
def test_inspect_says_what_a_file_is(command, name):
    status, printed, _ = command("inspect", name, "--json")
    seen = json.loads(printed)
    client = fheconv.load_client("out/client.zip")
    assert (status, seen["kind"], seen["fingerprint"]) == (0, FILES[name], client.fingerprint)
    assert seen["bytes"] == Path(name).stat().st_size
    assert (seen["manifest"] is None) is not name.endswith(".zip")
    assert (seen["key_id"] is None) is name.endswith(".zip")
    status, printed, _ = command("inspect", name)
    assert status == 0
    assert FILES[name] in printed
    assert client.fingerprint in printed


def test_nothing_that_is_printed_or_sent_holds_a_secret(command, made, tmp_path):
    printed = "".join(made[1]) + "".join("".join(command("inspect", name)[1:]) for name in FILES)
    key_id = json.loads(command("inspect", "keys.secret", "--json")[1])["key_id"]
    known = {key_id, fheconv.load_client("out/client.zip").fingerprint}
    assert all(any(one.startswith(word) for one in known) for word in re.findall(r"[0-9a-f]{20,}", printed))
    assert max(map(len, re.findall(r"[\w+/=]+", printed))) <= 64
    assert stat.S_IMODE(Path("keys.secret").stat().st_mode) == 0o600
    assert secret_rows(Path("keys.secret").read_bytes()) > 0
    for name in ("keys.eval", "x.ct", "y.ct"):
        assert secret_rows(Path(name).read_bytes()) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        KEYGEN,
        (*KEYGEN[:3], "new", *KEYGEN[4:]),
        (*KEYGEN[:-1], "keys.secret", "--overwrite"),
        (*KEYGEN[:2], "--keys", "new", "--evaluation-keys", "keys.secret", "--overwrite"),
        (*ENCRYPT[:-1], "keys.secret"),
        (*RUN[:-1], "keys.secret"),
        (*DECRYPT, "--output", "keys.npy"),
    ],
)
def test_no_command_writes_over_keys(command, arguments):
    Path("keys.npy").symlink_to("keys.secret")
    before = files()
    status, printed, error = command(*arguments)
    assert (status, printed) == (2, "")
    assert "keys" in error
    assert files() == before


def test_keys_made_anew_replace_the_old_ones_which_decrypt_no_more(command):
    assert command(*KEYGEN, "--overwrite")[0] == 0
    status, _, error = command(*DECRYPT)
    assert status == 2
    assert "other keys" in error
    assert command(*RUN)[0] == 2


def test_compile_says_with_status_1_that_widths_do_not_fit(command):
    status, printed, error = command(*COMPILE[:-1], "1", "--json")
    assert status == 1
    said = json.loads(printed)
    assert (said["fits"], said["layer"]) == (False, "c")
    assert said["message"] in error
    status, printed, error = command(*COMPILE[:-1], "1")
    assert (status, printed) == (1, "")
    assert "accumulator_bits=" in error


def test_compile_takes_every_option_and_prints_json(command, tmp_path):
    options = ("--weight-bits", "auto", "--activation-bits", "2", "--input-bits", "3", "--rounding-bits", "3")
    status, printed, error = command(*COMPILE, *options, "--p-error", "0.01", "--json")
    assert (status, error) == (0, "")
    said = json.loads(printed)
    assert said["fits"]
    assert said["budget"]["accumulator_bits"] == 4
    assert said["cost"]["layers"][0]["lookup_bits"] == 3
    assert json.loads(command("inspect", said["server"], "--json")[1])["fingerprint"] == said["fingerprint"]


@pytest.mark.slow
def test_a_server_runs_what_a_client_encrypts(command):
    """Over HTTP, with a server that is a process of its own."""
    arguments = "serve", "out/server.zip", "--port", "0", "--folder", "stored", "--token-file", "token"
    Path("token").write_text("a-token")
    with subprocess.Popen(
        [sys.executable, "-m", "fheconv", *arguments], stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            lines = (json.loads(line)["message"] for line in server.stderr)
            url = next(line.split()[-1] for line in lines if "http://" in line)
            remote = "run", "out/client.zip", "--url", url, "--keys", "keys.secret", "--input", "x.ct"
            status, _, error = command(*remote, "--output", "refused.ct")
            assert (status, "asks for a token" in error) == (2, True)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("FHECONV_TOKEN", "a-token")
                assert command(*remote, "--output", "remote.ct")[0] == 0
        finally:
            server.terminate()
            server.stderr.read()
    here, there = (
        json.loads(
            command("decrypt", "out/client.zip", "--keys", "keys.secret", "--input", name, "--json")[1]
        )
        for name in ("y.ct", "remote.ct")
    )
    assert here == there


def test_compile_takes_what_torch_exported(command, tmp_path):
    model = load_model(Path("m.safetensors"))
    images = torch.zeros(1, 1, 3, 3, dtype=torch.double)
    torch.export.save(torch.export.export(model, (images,)), "m.pt2")
    onnx_files.exported(model, images, Path("m.onnx"), "old, one image")
    said = [
        json.loads(command("compile", name, *COMPILE[2:], "--trusted", "--json")[1])
        for name in ("m.safetensors", "m.pt2", "m.onnx")
    ]
    assert len({one["fingerprint"] for one in said}) == 1
    assert "RUNS" in " ".join(command("compile", "--help")[1].split())


@pytest.mark.slow
def test_bench_times_every_step(command):
    status, printed, _ = command(
        "bench", "out/server.zip", "--client", "out/client.zip", "--runs", "1", "--json"
    )
    said = json.loads(printed)
    assert (status, said["runs"]) == (0, 1)
    assert all(said[f"{step}_seconds"] > 0 for step in ("keygen", "encrypt", "run", "decrypt"))
    assert said["client_bytes"] == Path("out/client.zip").stat().st_size
    assert abs(said["input_bytes"] - Path("x.ct").stat().st_size) < 16
    assert "make keys, evaluation keys" in str(Measurement(**said))


@pytest.mark.sampled(7)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compile", "none.safetensors", *COMPILE[2:]), "none.safetensors"),
        (("compile", "x.npy", *COMPILE[2:]), "x.npy is a .npy file, and no model"),
        (("compile", "none.onnx", *COMPILE[2:]), "none.onnx cannot be read"),
        (("compile", "bad.pt2", *COMPILE[2:]), "would run what is in it"),
        (("compile", "bad.pt2", *COMPILE[2:], "--trusted"), "bad.pt2 cannot be read as a program"),
        (("compile", "bad.pt2", *COMPILE[2:], "--layer", "c"), "leave 'c' out"),
        ((*COMPILE[:3], "none.npy", *COMPILE[4:]), "--calibration=none.npy"),
        ((*COMPILE, "--weight-bits", "some"), "or auto"),
        ((*COMPILE, "--weight-bits", "9"), "weight_bits=9"),
        ((*COMPILE, "--class-names", "a,b"), "2 class_names"),
        ((*COMPILE, "--p-error", "2"), "p_error=2"),
        (("keygen", "out/server.zip", *KEYGEN[2:], "--overwrite"), "server.zip"),
        ((*ENCRYPT[:3], "keys.eval", *ENCRYPT[4:]), "keys.eval is a file of evaluation keys"),
        ((*ENCRYPT[:5], "none.npy", *ENCRYPT[6:]), "none.npy"),
        ((*ENCRYPT[:5], "y.ct", *ENCRYPT[6:]), "--input=y.ct cannot be read"),
        ((*ENCRYPT[:-1], "none/x.ct"), "no folder"),
        ((*RUN[:3], "keys.secret", *RUN[4:]), "keys.secret is a file of secret keys"),
        ((*RUN[:5], "y.ct", *RUN[6:]), "what encrypt() returned"),
        ((*RUN[:5], "one.npy", *RUN[6:]), "one.npy is a .npy file"),
        ((*RUN, "--layer", "c", "--stride", "2"), "--layer, --stride"),
        (("run", "out/server.zip", *RUN[4:]), "needs --evaluation-keys"),
        (("run", "out/client.zip", "--url", "http://localhost:1", *RUN[4:]), "--url and --keys"),
        (("run", "m.safetensors", *RUN[2:]), "--layer"),
        (("run", "m.safetensors", *RUN[4:]), "--layer"),
        ((*DECRYPT[:-1], "x.ct"), "what run() returned"),
        ((*DECRYPT, "--output", "y.txt"), ".npy"),
        (("inspect", "x.npy"), "no file of fheconv's"),
        (("inspect", "none"), "none cannot be read"),
        (("inspect", "half.zip"), "half.zip"),
        (("inspect", "half.eval"), "truncated"),
        (("inspect", "half.secret"), "truncated"),
        (("inspect", "half.ct"), "truncated"),
        (("bench", "out/client.zip", "--client", "out/client.zip"), "client.zip"),
        (("bench", "out/server.zip", "--client", "out/client.zip", "--runs", "0"), "--runs"),
    ],
)
def test_what_is_asked_wrongly_is_one_message_and_status_2(command, arguments, words):
    before = files()
    status, printed, error = command(*arguments)
    assert (status, printed) == (2, "")
    assert words in " ".join(error.split())
    assert "Traceback" not in error
    assert files() == before


@pytest.mark.parametrize("name", ["compile", "keygen", "encrypt", "run", "decrypt", "inspect", "bench"])
def test_help_has_an_example(command, name):
    status, printed, _ = command(name, "--help")
    assert status == 0
    assert f"fheconv {name} " in " ".join(printed.split())
