import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import fheconv
from fheconv.basics.compile_config import Engine
from fheconv.cli.main import app

MODELS = Path(__file__).parents[2] / "models"
TINYCNN = str(MODELS / "tinycnn-digits.safetensors")
CLASSIC = str(MODELS / "classic-filters.safetensors")


def fheconv_command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command as a shell runs it, with its exit status."""
    code = "import sys; from fheconv.cli.main import main; sys.argv[0] = 'fheconv'; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd)


CHECK = ["check", TINYCNN, "--layer", "conv1", "--input-shape", "1,28,28"]


@pytest.mark.slow
def test_check_says_that_a_layer_fits():
    done = fheconv_command(*CHECK, "--weight-bits", "2", "--input-bits", "2", "--accumulator-bits", "7")
    assert done.returncode == 0
    assert "fits 7 bits" in done.stdout


@pytest.mark.slow
def test_check_says_that_a_layer_does_not_fit_and_its_advice_makes_it_fit():
    def check(weight_bits, input_bits):
        return fheconv_command(
            *CHECK,
            *("--weight-bits", str(weight_bits), "--input-bits", str(input_bits), "--accumulator-bits", "6"),
            "--json",
        )

    done = check(8, 8)
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert not report["fits"]
    advice = re.search(r"weight_bits=(\d), input_bits=(\d)", report["remedy"])
    again = check(*advice.groups())
    assert again.returncode == 0
    assert json.loads(again.stdout)["accumulator_bits"] <= 6


def test_check_takes_stride_and_padding_from_the_card_unless_told():
    runner = CliRunner()
    check = ["check", TINYCNN, "--layer", "conv2", "--accumulator-bits", "16", "--json"]

    def position(*options):
        done = runner.invoke(app, [*check, "--input-shape", "8,6,6", *options])
        assert done.exit_code == 0
        return {tuple(channel["position"]) for channel in json.loads(done.stdout)["layers"][0]["channels"]}

    assert position() == {(0, 0)}
    assert position("--padding", "1,2", "--stride", "1") == {(1, 2)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "nothing.safetensors", *CHECK[2:], "--accumulator-bits", "7"], "nothing.safetensors"),
        ([*CHECK[:3], "conv9", *CHECK[4:], "--accumulator-bits", "7"], "conv1, conv2"),
        ([*CHECK[:3], "fc1", *CHECK[4:], "--accumulator-bits", "7"], "convolution's is"),
        ([*CHECK[:5], "3,28,28", "--accumulator-bits", "7"], "takes images"),
        ([*CHECK[:5], "big", "--accumulator-bits", "7"], "--input-shape"),
        ([*CHECK, "--accumulator-bits", "7", "--weight-bits", "9"], "weight_bits=9"),
        (["run", TINYCNN, "--layer", "conv1", "--input", "none.npy", "--output", "y.npy"], "none.npy"),
        (["run", TINYCNN, "--layer", "conv1", "--input", "none.png", "--output", "y.npy"], "none.png"),
        (["run", TINYCNN, "--layer", "conv2", "--input", "none.png", "--output", "y.npy"], "8 channels"),
        (["run", TINYCNN, "--layer", "conv1", "--input", "none.npy", "--output", "y.txt"], "y.txt"),
        (
            [*CHECK[:5], "1,1000000,1000000", "--accumulator-bits", "7"],
            "the result would have 7,999,968,000,032",
        ),
        ([*CHECK, "--padding", "1000000", "--accumulator-bits", "7"], "at most 134,217,728"),
        ([*CHECK, "--padding", "some", "--accumulator-bits", "7"], "or same, or valid"),
        ([*CHECK, "--padding-mode", "mirror", "--accumulator-bits", "7"], "padding_mode='mirror'"),
        ([*CHECK, "--output-padding", "1", "--accumulator-bits", "7"], "output_padding"),
        ([*CHECK, "--accumulator-bits", "100000000000"], "'--accumulator-bits'"),
        (["run", TINYCNN, "--layer", "conv1", "--input", "none.npy", "--output", "/nodir/y.npy"], "/nodir;"),
        (["demo", "--output", "/nodir/y.png"], "no folder /nodir"),
        (["demo", "--output", "y.foo"], ".png"),
        (["demo", "--output", "y"], ".png"),
    ],
)
@pytest.mark.sampled(13)
def test_an_error_is_one_message_on_standard_error_and_status_2(arguments, words):
    done = fheconv_command(*arguments)
    assert done.returncode == 2
    assert words in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("content", ["nothing", "a zip archive", "half a zip archive", "noise"])
@pytest.mark.parametrize("name", ["image.npy", "image.png"])
@pytest.mark.sampled(8)
def test_an_image_that_cannot_be_read_is_an_error_and_no_answer(tmp_path, name, content):
    buffer = io.BytesIO()
    np.savez(buffer, np.ones((8, 8)))
    archive = buffer.getvalue()
    contents = {
        "nothing": b"",
        "a zip archive": archive,
        "half a zip archive": archive[:50],
        "noise": b"GIF8",
    }
    (tmp_path / name).write_bytes(contents[content])
    done = fheconv_command(
        *("run", TINYCNN, "--layer", "conv1", "--input", name, "--output", "y.npy"), cwd=tmp_path
    )
    assert done.returncode == 2
    assert f"--input={name} cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_result_is_not_written_over_a_folder(tmp_path):
    (tmp_path / "y.npy").mkdir()
    done = fheconv_command(
        *("run", TINYCNN, "--layer", "conv1", "--input", "none.npy", "--output", "y.npy"), cwd=tmp_path
    )
    assert done.returncode == 2
    assert "--output=y.npy cannot be written" in done.stderr


@pytest.mark.parametrize(
    ("raised", "status", "words"),
    [
        ("KeyError('x')", 3, "internal error: KeyError: 'x', please report"),
        ("MemoryError()", 2, "Out of memory"),
        ("KeyboardInterrupt()", 130, ""),
    ],
)
def test_status_1_is_kept_for_answers(raised, status, words):
    code = (
        "import sys, fheconv.capture.checkpoint as c\n"
        f"def fail(*_, **__): raise {raised}\n"
        "c.load_layer = fail\n"
        "from fheconv.cli.main import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *CHECK, "--accumulator-bits", "7"], capture_output=True, text=True
    )
    assert done.returncode == status
    assert words in done.stderr
    assert ("Traceback" in done.stderr) is (status == 3)
    assert done.stdout == ""


def test_check_knows_every_option_of_a_layer(tmp_path):
    save_file({"c.weight": np.ones((2, 3, 3, 3), np.float32)}, tmp_path / "m.safetensors")
    check = [
        *("check", str(tmp_path / "m.safetensors"), "--layer", "c", "--accumulator-bits", "20", "--json"),
    ]

    def channels(*options):
        done = CliRunner().invoke(app, [*check, *options])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)["layers"][0]["channels"]

    assert len(channels("--input-shape", "3,5,5", "--direct")) == 2
    transposed = ("--input-shape", "2,5,5", "--transposed")
    assert len(channels(*transposed)) == 3
    assert len(channels(*transposed, "--stride", "2,2", "--padding", "1", "--output-padding", "1,0")) == 3
    # In a picture as small as the filter, only a border without zeros lets every output see all taps.
    inside, around = (
        channels("--input-shape", "3,3,3", "--padding", "same", "--padding-mode", mode)[0]["position"]
        for mode in ("zeros", "circular")
    )
    assert (inside, around) == ([1, 1], [0, 0])
    assert len(channels("--input-shape", "3,3,3", "--padding", "valid")) == 2


@pytest.mark.slow
def test_run_filters_a_transposed_layer(tmp_path):
    weight = np.random.default_rng(1).normal(size=(1, 2, 2, 2)).astype(np.float32)
    save_file({"c.weight": weight}, tmp_path / "m.safetensors")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 16, (1, 3, 3)))
    done = fheconv_command(
        *("run", "m.safetensors", "--layer", "c", "--input", "x.npy", "--output", "y.npy"),
        *("--transposed", "--stride", "2", "--output-padding", "1"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "y.npy").shape == (2, 7, 7)


@pytest.mark.slow
def test_run_takes_one_signal_as_one_channel(tmp_path):
    save_file({"c.weight": np.ones((2, 1, 3), np.float32)}, tmp_path / "m.safetensors")
    np.save(tmp_path / "x.npy", np.arange(9))
    run = ("run", "m.safetensors", "--layer", "c", "--force", "--output", "y.npy", "--input")
    done = fheconv_command(*run, "x.npy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "y.npy").shape == (2, 7)
    done = fheconv_command(*run, "x.png", cwd=tmp_path)
    assert done.returncode == 2
    assert "1 spatial axes" in done.stderr


def test_help_lists_every_engine():
    done = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "300"})
    assert ", ".join(get_args(Engine)) in done.stdout


def test_run_filters_an_encrypted_image_file(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (9, 8), dtype=np.uint8)).save(tmp_path / "photo.png")
    done = fheconv_command(
        *("run", CLASSIC, "--layer", "filters3", "--input", "photo.png", "--output", "edges.npy"),
        *("--weight-bits", "8", "--input-bits", "8"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "equal to the clear result" in done.stdout
    edges = np.load(tmp_path / "edges.npy")
    pixels = np.asarray(Image.open(tmp_path / "photo.png")).astype(float)[None, None]
    exact = fheconv.conv(pixels, load_file(CLASSIC)["filters3.weight"].astype(float), padding=1)[0]
    assert edges.shape == (5, 9, 8)
    # 8-bit pixels are exact; each of 9 weights is at most half of a 127th of the largest, 8, off.
    assert np.abs(edges - exact).max() <= 9 * 255 * 0.5 * 8 / 127


@pytest.mark.slow
def test_run_takes_arrays_and_both_engines(tmp_path):
    np.save(tmp_path / "digit.npy", np.random.default_rng(0).random((8, 8)) * 16)
    results = []
    for engine in ("conv", "matrix"):
        done = fheconv_command(
            *("run", TINYCNN, "--layer", "conv1", "--input", "digit.npy", "--output", f"{engine}.npy"),
            *("--engine", engine),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        results.append(np.load(tmp_path / f"{engine}.npy"))
    assert results[0].shape == (8, 6, 6)
    np.testing.assert_array_equal(*results)


def test_run_exits_with_1_when_a_result_differs(tmp_path, monkeypatch):
    np.save(tmp_path / "digit.npy", np.ones((1, 8, 8)))
    right = fheconv.QuantizedNetwork.__call__
    monkeypatch.setattr(fheconv.QuantizedNetwork, "__call__", lambda self, x: right(self, x) + 1)
    done = CliRunner().invoke(
        app,
        [
            *("run", TINYCNN, "--layer", "conv1", "--input", str(tmp_path / "digit.npy")),
            *("--output", str(tmp_path / "y.npy")),
        ],
    )
    assert done.exit_code == 1
    assert "DIFFERENT" in done.stdout


@pytest.mark.slow
def test_npy_files_with_pickles_are_refused(tmp_path):
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    done = fheconv_command(
        *("run", TINYCNN, "--layer", "conv1", "--input", "evil.npy", "--output", "y.npy"), cwd=tmp_path
    )
    assert done.returncode == 2
    assert "allow_pickle" in done.stderr


@pytest.mark.slow
def test_a_damaged_card_is_named(tmp_path):
    save_file({"a.weight": np.ones((1, 1, 2, 2), np.float32)}, tmp_path / "m.safetensors")
    (tmp_path / "m.json").write_text('{"architecture": 3}')
    done = fheconv_command(
        *("check", "m.safetensors", "--layer", "a", "--input-shape", "1,4,4", "--accumulator-bits", "7"),
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "m.json" in done.stderr


@pytest.mark.slow
def test_demo_runs_encrypted_and_writes_the_picture(tmp_path):
    done = fheconv_command("demo", "--size", "24", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Equal to the exact integers in clear: yes" in done.stdout
    with Image.open(tmp_path / "fheconv-demo.png") as picture:
        assert picture.width > 600
    assert done.stderr == ""  # no progress where there is no terminal


@pytest.mark.parametrize("command", ["demo", "check", "run"])
@pytest.mark.sampled(3)
def test_help_shows_every_command(command):
    done = fheconv_command(command, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout
