"""Concrete ML's side of `concrete_ml.py`, which runs this with the interpreter of another environment.

Requests come as lines of JSON on stdin, a method of `Worker` and its arguments, and each is answered by a
line of JSON on stdout: {"error": …} where Concrete ML raised. A process that ran Concrete exits with 0
whatever happened, so this one leaves by `os._exit`, and the caller takes a missing answer for a failure.
"""

import argparse
import hashlib
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

import torch  # noqa: E402
from concrete.ml.torch.compile import compile_torch_model  # noqa: E402
from torch import Tensor  # noqa: E402

import digits  # noqa: E402


def fingerprint(data: digits.Digits) -> str:
    """Tell whether two environments, with their own versions of scikit-learn, see the same split."""
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in data)).hexdigest()


class Worker:
    """A trained model, compiled and run by Concrete ML."""

    def __init__(self, model: str, n_bits: int, rounding_bits: int, p_error: float) -> None:
        self.data = digits.digits()
        self.model = importlib.import_module(f"train_{model}_digits").shipped()
        self.settings = {
            "n_bits": n_bits,
            "rounding_threshold_bits": {"n_bits": rounding_bits, "method": "APPROXIMATE"},
            "p_error": p_error,
        }
        self.module: Any = None

    def compile(self) -> dict[str, Any]:
        """Quantize and compile, which Concrete ML does in one step."""
        start = perf_counter()
        self.module = compile_torch_model(self.model, self.data.train_images.numpy(), **self.settings)
        seconds = perf_counter() - start
        circuit = self.module.fhe_circuit
        return {
            "seconds": seconds,
            "lookups": circuit.programmable_bootstrap_count,
            "complexity": circuit.complexity,
            "key_bytes": circuit.size_of_bootstrap_keys + circuit.size_of_keyswitch_keys,
        }

    def accuracy(self) -> dict[str, float]:
        """Return the share of the held-out images that are classified rightly, clear and simulated."""
        return {
            fhe: float((self._classes(self.data.test_images, fhe) == self.data.test_labels.numpy()).mean())
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
        (predicted,) = self._classes(self.data.test_images[image : image + 1], "execute")
        return {"seconds": perf_counter() - start, "class": int(predicted)}

    def _classes(self, images: Tensor, fhe: str) -> Any:
        return self.module.forward(images.numpy(), fhe=fhe).argmax(1)


def serve(worker: Worker) -> None:
    """Answer requests until there are no more."""
    # Libraries that print must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=answers, flush=True)

    answer({"ready": fingerprint(worker.data)})
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
    parser = argparse.ArgumentParser(description="Serve Concrete ML to concrete_ml.py.")
    parser.add_argument("model")
    parser.add_argument("n_bits", type=int)
    parser.add_argument("rounding_bits", type=int)
    parser.add_argument("p_error", type=float)
    serve(Worker(**vars(parser.parse_args())))


if __name__ == "__main__":
    status = 1
    try:
        main()
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(status)
