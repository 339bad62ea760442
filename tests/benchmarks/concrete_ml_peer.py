"""Concrete ML in an environment and a process of its own, for the scripts that compare with it.

It needs other versions of torch and Concrete than fheconv. So it gets an environment, made on the first run
(a download of gigabytes), and runs there through concrete_ml_worker.py.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import platformdirs
from rich.console import Console
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))

import digits

RELEASE = "1.9.0"
PACKAGES = (f"concrete-ml=={RELEASE}", "setuptools<81", "scikit-learn", "safetensors")
WORKER = Path(__file__).with_name("concrete_ml_worker.py")
CHECK = f"""
from importlib.metadata import version
assert version("concrete-ml") == "{RELEASE}" and version("scikit-learn") and version("safetensors")
"""


class PeerError(Exception):
    """Concrete ML raised, or its process ended."""


class PeerRefusal(PeerError):
    """Concrete ML raised; its process lives."""


class Images(NamedTuple):
    """The images that calibrate a model, and those that only measure, with their classes."""

    calibration: Tensor
    test_images: Tensor
    test_labels: Tensor


def images_of_digits(split: int | None) -> Images:
    """Return the images that a model of digits was trained on, and the test images."""
    data = digits.digits()
    return Images(digits.parts(split).train_images, data.test_images, data.test_labels)


class Peer:
    """A process in which Concrete ML has a model: what `shipped(*arguments)` of a script of models/ returns.

    The images are handed over in a file: another scikit-learn might split them differently.
    """

    def __init__(
        self, python: Path, script: str, arguments: tuple[str | int | None, ...], data: Images
    ) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        with tempfile.TemporaryDirectory() as folder:
            images = Path(folder) / "images.npz"
            np.savez(images, **{name: values.numpy() for name, values in data._asdict().items()})
            start = perf_counter()
            # -I: without this environment's PYTHONPATH.
            self._process = subprocess.Popen(
                [python, "-I", WORKER, script, json.dumps(arguments), images],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                cwd=tempfile.gettempdir(),
                text=True,
            )
            self._answer()  # it has read the images
            self.imports = perf_counter() - start

    def __enter__(self) -> "Peer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._stderr.close()

    def request(self, method: str, *arguments: object) -> dict[str, Any]:
        """Return what a method of the worker answers."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps([method, *arguments]), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            self._process.wait()
            self._stderr.seek(0)
            words = self._stderr.read().decode(errors="replace").split("\n")
            last = next((word for word in reversed(words) if word.strip()), "nothing")
            raise PeerError(f"Its process ended without an answer. Its last words: {last}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerRefusal(answer["error"])
        return answer


def add_environment(parser: argparse.ArgumentParser) -> None:
    """Add the option that says where Concrete ML's environment is."""
    parser.add_argument(
        "--environment",
        type=Path,
        default=Path(platformdirs.user_cache_dir("fheconv")) / f"concrete-ml-{RELEASE}",
        help="folder of Concrete ML's environment, made if it is not there (default: in the user's cache)",
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how Concrete ML compiles."""
    peers = parser.add_argument_group("Concrete ML")
    peers.add_argument("--n-bits", type=int, default=6, help="of weights and activations (default: 6)")
    peers.add_argument("--rounding-bits", type=int, default=6, help="left for a lookup (default: 6)")
    peers.add_argument("--p-error", type=float, default=0.3, help="of a lookup (default: 0.3)")


def peer_python(environment: Path, console: Console) -> Path:
    """Return the interpreter of the environment with Concrete ML, which is made unless it is there."""
    python = environment / "bin" / "python"
    if _works(python):
        return python
    if environment.exists() and any(environment.iterdir()) and not (environment / "pyvenv.cfg").exists():
        raise SystemExit("--environment is a folder with something else in it.")
    console.print(f"Installing Concrete ML {RELEASE} into an environment of its own: gigabytes, once…")
    try:
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit("The environment for Concrete ML could not be made.") from error
    if not _works(python):
        raise SystemExit("The new environment for Concrete ML does not work.")
    return python


def _works(python: Path) -> bool:
    try:
        return subprocess.run([python, "-I", "-c", CHECK], capture_output=True).returncode == 0
    except OSError:
        return False
