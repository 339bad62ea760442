"""Concrete ML's process: `concrete_ml_peer.py` runs this with the interpreter of another environment.

Requests come as lines of JSON on stdin, a method of `Worker` and its arguments, and each is answered by a
line of JSON on stdout: {"error": …} where Concrete ML raised. A process that ran Concrete exits with 0
whatever happened, so this one leaves by `os._exit`, and the caller takes a missing answer for a failure.
"""

import argparse
import importlib
import json
import os
import sys
import warnings
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
warnings.simplefilter("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from concrete.ml.torch.compile import compile_torch_model  # noqa: E402


class Worker:
    """A trained model, compiled and run by Concrete ML; calibrated on what it was trained on.

    The model is what `shipped(*arguments)` of a script of models/ returns.
    """

    def __init__(self, script: str, arguments: list[Any], images: Path) -> None:
        with np.load(images) as data:
            self.calibration = data["calibration"]
            self.test_images, self.test_labels = data["test_images"], data["test_labels"]
        self.model = importlib.import_module(script).shipped(*arguments)
        self.module: Any = None

    def compile(self, n_bits: int, rounding_bits: int | None, p_error: float | None) -> dict[str, Any]:
        """Quantize and compile, in one step as Concrete ML does. None: no rounding, its own p_error."""
        rounding = None if rounding_bits is None else {"n_bits": rounding_bits, "method": "APPROXIMATE"}
        start = perf_counter()
        self.module = compile_torch_model(
            self.model, self.calibration, n_bits=n_bits, rounding_threshold_bits=rounding, p_error=p_error
        )
        seconds = perf_counter() - start
        circuit = self.module.fhe_circuit
        return {
            "seconds": seconds,
            "lookups": circuit.programmable_bootstrap_count,
            "complexity": circuit.complexity,
            "key_bytes": circuit.size_of_bootstrap_keys + circuit.size_of_keyswitch_keys,
            "p_error": circuit.p_error,
        }

    def accuracy(self) -> dict[str, float]:
        """Return the share of the held-out images that are classified rightly, clear and simulated."""
        return {
            fhe: float((self._classes(self.test_images, fhe) == self.test_labels).mean())
            for fhe in ("disable", "simulate")
        }

    def keygen(self) -> dict[str, float]:
        """Make new keys."""
        start = perf_counter()
        self.module.fhe_circuit.keygen(force=True)
        return {"seconds": perf_counter() - start}

    def run(self, image: int) -> dict[str, float]:
        """Encrypt a held-out image, run and decrypt."""
        start = perf_counter()
        (predicted,) = self._classes(self.test_images[image : image + 1], "execute")
        return {"seconds": perf_counter() - start, "class": int(predicted)}

    def _classes(self, images: np.ndarray, fhe: str) -> Any:
        return self.module.forward(images, fhe=fhe).argmax(1)


def serve(worker: Worker) -> None:
    """Say that the worker is ready, and answer requests until there are no more."""
    # Libraries that print must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=answers, flush=True)

    answer({"ready": True})
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        try:
            answer(getattr(worker, method)(*arguments))
        except Exception as error:  # whatever Concrete ML raises is news for the caller
            answer({"error": f"{type(error).__name__}: {error}"})


def main() -> None:
    # torch's threads spin while they wait, and on a busy machine compiling takes ten times as long for it.
    # Concrete has threads of its own.
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description="Serve Concrete ML to concrete_ml_peer.py.")
    parser.add_argument("script", help="of models/, such as train_tinycnn_digits")
    parser.add_argument("arguments", type=json.loads, help="of its function `shipped`, as JSON")
    parser.add_argument("images", type=Path, help="a file of `concrete_ml_peer.Images`")
    arguments = parser.parse_args()
    serve(Worker(arguments.script, arguments.arguments, arguments.images))


if __name__ == "__main__":
    status = 1
    try:
        main()
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(status)
