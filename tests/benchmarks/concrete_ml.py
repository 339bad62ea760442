"""Time Concrete ML and fheconv on a trained model: `python tests/benchmarks/concrete_ml.py [--model rescnn]`.

Concrete ML needs other versions of torch and Concrete than fheconv, so it gets an environment of its own,
made on the first run (a download of gigabytes), and runs there through concrete_ml_worker.py. Both libraries
take float images to float logits, encryption and decryption included, and take turns image by image, so
that whatever else the machine does hits both; which of them begins alternates too. A ratio is Concrete
ML's figure divided by fheconv's: above 1, fheconv needs less.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from types import TracebackType
from typing import Any

import platformdirs
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))

import torch
from torch import nn

import digits
import fheconv
from fheconv.circuit import Fhe
from fheconv.worker import worker as fheconv_worker

RELEASE = "1.9.0"
PACKAGES = (f"concrete-ml=={RELEASE}", "setuptools<81", "scikit-learn", "safetensors")
WORKER = Path(__file__).with_name("concrete_ml_worker.py")
CHECK = f"""
from importlib.metadata import version
assert version("concrete-ml") == "{RELEASE}" and version("scikit-learn") and version("safetensors")
"""
# Per model: the logits at a width that makes no ciphertext larger.
QUANTIZE: dict[str, dict[str, Any]] = {
    "tinycnn": {
        "rounding_bits": 6,
        "weight_bits": 5,
        "accumulator_bits": {"fc1": 8},
        "activation_bits": {"conv3": 3},
    },
    "rescnn": {"rounding_bits": 6, "accumulator_bits": {"fc1": 9}},
}
COMPILE = {"p_error": 0.05}

# The threads of either library spin for 0.2 s after a run, and would disturb the other's.
PAUSE = 0.3


class PeerError(Exception):
    """Concrete ML raised, or its process ended."""


class PeerRefusal(PeerError):
    """Concrete ML raised; its process lives."""


@dataclass(kw_only=True)
class Figures:
    """What one library makes of the model. `compile` has the times with everything imported."""

    quantize: list[float] = field(default_factory=list)  # empty: a part of compiling
    cold: float = 0.0  # to compile, with the start of the process and its imports
    compile: list[float] = field(default_factory=list)
    clear: float = 0.0
    simulated: float = 0.0
    lookups: int = 0
    complexity: float = 0.0
    key_bytes: int = 0
    keygen: float = 0.0
    first: float = 0.0
    seconds: list[float] = field(default_factory=list)
    right: int = 0

    def from_float(self, choose: Callable[[list[float]], float]) -> float:
        """Return the seconds from the float model to the circuit, everything imported."""
        return choose(self.quantize or [0.0]) + choose(self.compile)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = perf_counter()
    result = function()
    return perf_counter() - start, result


class Ours:
    """The model through fheconv."""

    def __init__(
        self,
        model: nn.Module,
        data: digits.Digits,
        config: fheconv.QuantConfig,
        compile_config: fheconv.CompileConfig,
    ) -> None:
        self.model, self.data, self.config, self.compile_config = model, data, config, compile_config
        self.figures = Figures()
        self.circuit: fheconv.FheCircuit
        fheconv_worker().stop()
        self._quantize()
        self.figures.cold = self._compile()

    def compile(self) -> None:
        self._quantize()
        self.figures.compile.append(self._compile())

    def _quantize(self) -> None:
        seconds, self.network = timed(
            lambda: fheconv.quantize(self.model, self.data.train_images, self.config)
        )
        self.figures.quantize.append(seconds)

    def _compile(self) -> float:
        seconds, self.circuit = timed(lambda: fheconv.compile(self.network, self.compile_config))
        return seconds

    def keygen(self) -> None:
        figures, cost = self.figures, self.circuit.cost
        figures.lookups, figures.complexity, figures.key_bytes = cost.lookups, cost.complexity, cost.key_bytes
        figures.clear, figures.simulated = self._accuracy("disable"), self._accuracy("simulate")
        figures.keygen, _ = timed(self.circuit.keygen)

    def run(self, image: int) -> tuple[float, int]:
        one = self.data.test_images[image : image + 1]
        seconds, logits = timed(lambda: self.circuit.predict(one, fhe="execute"))
        return seconds, int(logits.argmax())

    def _accuracy(self, fhe: Fhe) -> float:
        predicted = self.circuit.predict(self.data.test_images, fhe=fhe).argmax(1)
        return float((predicted == self.data.test_labels.numpy()).mean())


class Peer:
    """The model through Concrete ML, in a process of another environment."""

    def __init__(self, python: Path, data: digits.Digits, *arguments: object) -> None:
        self.figures = Figures()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        start = perf_counter()
        # -I: without this environment's PYTHONPATH.
        self._process = subprocess.Popen(
            [python, "-I", WORKER, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            cwd=tempfile.gettempdir(),
            text=True,
        )
        ready = self._answer()["ready"]
        self._imports = perf_counter() - start
        if ready != fingerprint(data):
            raise PeerError("scikit-learn splits the digits differently in the two environments.")

    def __enter__(self) -> "Peer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._stderr.close()

    def compile(self) -> None:
        answer = self._request("compile")
        figures = self.figures
        figures.compile.append(answer["seconds"])
        figures.cold = self._imports + figures.compile[0]
        figures.lookups, figures.complexity = answer["lookups"], answer["complexity"]
        figures.key_bytes = answer["key_bytes"]

    def keygen(self) -> None:
        accuracy = self._request("accuracy")
        self.figures.clear, self.figures.simulated = accuracy["disable"], accuracy["simulate"]
        self.figures.keygen = self._request("keygen")["seconds"]

    def run(self, image: int) -> tuple[float, int]:
        answer = self._request("run", image)
        return answer["seconds"], answer["class"]

    def _request(self, *request: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps(request), file=self._process.stdin, flush=True)
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


def first(times: list[float]) -> float:
    return times[0]


def fingerprint(data: digits.Digits) -> str:
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in data)).hexdigest()


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


def table(sides: dict[str, Figures], images: int, compiles: int) -> Table:
    rows: list[tuple[str, Callable[[Figures], float], Callable[[float], str], bool]] = [
        ("right of 450, clear integers", lambda f: f.clear, "{:.1%}".format, False),
        ("right of 450, simulated", lambda f: f.simulated, "{:.1%}".format, False),
        ("lookups", lambda f: f.lookups, "{:,}".format, True),
        ("complexity", lambda f: f.complexity, "{:.3g}".format, True),
        ("keys", lambda f: f.key_bytes, lambda size: decimal(int(size)), True),
        (
            "quantize and compile, cold",
            lambda f: f.cold + first(f.quantize or [0.0]),
            "{:.2f} s".format,
            True,
        ),
        ("quantize and compile, first", lambda f: f.from_float(first), "{:.2f} s".format, True),
        (f"quantize and compile, least of {compiles}", lambda f: f.from_float(min), "{:.2f} s".format, True),
        ("compile alone, cold", lambda f: f.cold, "{:.2f} s".format, True),
        ("compile alone, first", lambda f: first(f.compile), "{:.2f} s".format, True),
        (f"compile alone, least of {compiles}", lambda f: min(f.compile), "{:.2f} s".format, True),
        ("generate keys", lambda f: f.keygen, "{:.2f} s".format, True),
        ("first encrypted image", lambda f: f.first, "{:.2f} s".format, True),
        ("encrypted image, least", lambda f: min(f.seconds), "{:.2f} s".format, True),
        ("encrypted image, median", lambda f: median(f.seconds), "{:.2f} s".format, True),
        (f"right of {images}, encrypted", lambda f: f.right, "{:.0f}".format, False),
    ]
    result = Table()
    for heading in ("", *sides, *(["ratio"] if len(sides) > 1 else [])):
        result.add_column(heading, justify="right" if heading else "left")
    for name, figure, text, compared in rows:
        values = [figure(figures) for figures in sides.values()]
        cells = [
            "–" if name.startswith("compile alone") and not figures.quantize else text(value)
            for figures, value in zip(sides.values(), values, strict=True)
        ]
        if len(sides) > 1:
            cells.append(f"{values[0] / values[1]:.2f}" if compared and "–" not in cells else "")
        result.add_row(name, *cells)
    return result


def measure(sides: list[Ours | Peer], data: digits.Digits, images: int) -> None:
    """Make keys and time encrypted images, of all sides in turns."""
    for side in sides:
        side.keygen()
    for side in sides:
        side.figures.first, _ = side.run(0)
    for image in range(images):
        for side in sides if image % 2 else reversed(sides):
            sleep(PAUSE)
            seconds, predicted = side.run(image)
            side.figures.seconds.append(seconds)
            side.figures.right += predicted == int(data.test_labels[image])


def configured(kind: type[Any]) -> Callable[[str], Any]:
    """Return a reader of a configuration that is given as JSON."""

    def read(text: str) -> Any:
        try:
            return kind(**json.loads(text))
        except (ValueError, TypeError, fheconv.FheConvError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description="Time Concrete ML and fheconv on one trained model.")
    parser.add_argument("--model", choices=("tinycnn", "rescnn"), default="tinycnn")
    parser.add_argument("--images", type=positive, default=4, help="timed images, after one to warm up")
    parser.add_argument("--compiles", type=positive, default=3, help="how often each compiles")
    parser.add_argument(
        "--environment",
        type=Path,
        default=Path(platformdirs.user_cache_dir("fheconv")) / f"concrete-ml-{RELEASE}",
        help="folder of Concrete ML's environment, made if it is not there (default: in the user's cache)",
    )
    ours = parser.add_argument_group("fheconv")
    text = json.dumps(COMPILE)
    ours.add_argument(
        "--quant-config",
        type=configured(fheconv.QuantConfig),
        help=f"a QuantConfig as JSON (default: of the model, {json.dumps(QUANTIZE)})",
    )
    ours.add_argument(
        "--compile-config",
        type=configured(fheconv.CompileConfig),
        default=text,
        help=f"a CompileConfig as JSON (default: {text})",
    )
    peers = parser.add_argument_group("Concrete ML")
    peers.add_argument("--n-bits", type=int, default=6, help="of weights and activations (default: 6)")
    peers.add_argument("--rounding-bits", type=int, default=6, help="left for a lookup (default: 6)")
    peers.add_argument("--p-error", type=float, default=0.3, help="of a lookup (default: 0.3)")
    arguments = parser.parse_args()
    quant_config = arguments.quant_config or fheconv.QuantConfig(**QUANTIZE[arguments.model])

    console = Console()
    torch.set_num_threads(1)  # as in concrete_ml_worker.py
    data = digits.digits()
    model = importlib.import_module(f"train_{arguments.model}_digits").shipped()
    settings = arguments.model, arguments.n_bits, arguments.rounding_bits, arguments.p_error
    python = peer_python(arguments.environment, console)
    try:
        with Peer(python, data, *settings) as peer:
            mine = Ours(model, data, quant_config, arguments.compile_config)
            refusal = ""
            for _ in range(arguments.compiles):
                if not refusal:
                    try:
                        peer.compile()
                    except PeerRefusal as error:
                        refusal = str(error)
                mine.compile()
            measure([mine] if refusal else [peer, mine], data, arguments.images)
            sides = {f"fheconv {version('fheconv')}": mine.figures}
            if not refusal:
                sides = {f"Concrete ML {RELEASE}": peer.figures, **sides}
    except PeerError as error:
        raise SystemExit(f"FAILED: Concrete ML: {error}") from error
    except fheconv.FheConvError as error:
        raise SystemExit(f"FAILED: fheconv: {error}") from error

    say = Console(highlight=False, markup=False, soft_wrap=True).print
    say(f"{arguments.model}: {digits.evaluate(model):.1%} of 450 right in float")
    say(f"fheconv: {quant_config}, p_error={arguments.compile_config.p_error}")
    if refusal:
        say("Concrete ML cannot compile this model. It says:", refusal, sep="\n")
    else:
        _, bits, rounding, p_error = settings
        say(f"Concrete ML: n_bits={bits}, {rounding} rounding bits (approximate), p_error={p_error}")
    console.print(table(sides, arguments.images, arguments.compiles))
    say(
        "cold: with the start of the process that holds the native library, and its imports (Concrete ML's "
        "torch too); first and least: with that done. Concrete ML quantizes as it compiles: "
        "compile_torch_model does both."
    )
    if refusal:
        say(f"Done: fheconv alone, {median(mine.figures.seconds):.2f} s an encrypted image (median).")
        return
    theirs, own = peer.figures, mine.figures
    ratios = {
        "time of an encrypted image (median)": median(theirs.seconds) / median(own.seconds),
        "of the least": min(theirs.seconds) / min(own.seconds),
        "complexity": theirs.complexity / own.complexity,
        "keys": theirs.key_bytes / own.key_bytes,
        "to quantize and compile (least)": theirs.from_float(min) / own.from_float(min),
        "to generate keys": theirs.keygen / own.keygen,
    }
    words = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    say(f"Done: Concrete ML by fheconv: {words}.")


if __name__ == "__main__":
    main()
