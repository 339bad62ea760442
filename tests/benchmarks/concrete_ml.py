"""Time Concrete ML and fheconv on a trained model: `python tests/benchmarks/concrete_ml.py [--model rescnn]`.

Both libraries take float images to float logits, encryption and decryption included, and take turns image
by image, so that whatever else the machine does hits both; which of them begins alternates too. A ratio is
Concrete ML's figure divided by fheconv's: above 1, fheconv needs less.

With `--tuned SPLIT` both get the model that was trained without a validation split, and fheconv's circuit is
what `fheconv.tune` finds: it trains on the split's training images, on which Concrete ML is calibrated, and
chooses on its validation images. The 450 test images only measure.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))

import torch

import digits
import fheconv
from concrete_ml_peer import (
    RELEASE,
    Images,
    Peer,
    PeerError,
    PeerRefusal,
    add_environment,
    add_settings,
    images_of_digits,
    peer_python,
)
from fheconv.circuits.circuit import Fhe
from fheconv.circuits.native.worker import worker as fheconv_worker
from fheconv.tuning.search import WIDTHS

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


@dataclass(kw_only=True)
class Figures:
    """What one library makes of the model. `compile` has the times with everything imported."""

    quantize: list[float] = field(default_factory=list)  # empty: a part of compiling, or of tuning
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
    agreed: int | None = None  # with the class that the clear integers give

    def from_float(self, choose: Callable[[list[float]], float]) -> float:
        """Return the seconds from the float model to the circuit, everything imported."""
        return choose(self.quantize or [0.0]) + choose(self.compile)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = perf_counter()
    result = function()
    return perf_counter() - start, result


class Ours:
    """The model through fheconv; a network that was tuned is not quantized again."""

    def __init__(
        self,
        quantize: Callable[[], fheconv.QuantizedNetwork],
        compile_config: fheconv.CompileConfig,
        data: Images,
        *,
        tuned: bool,
    ) -> None:
        self.quantize, self.compile_config, self.tuned = quantize, compile_config, tuned
        self.data = data
        self.figures = Figures(agreed=0)
        self.circuit: fheconv.FheCircuit
        fheconv_worker().stop()
        self.figures.cold = self._compile()

    def compile(self) -> None:
        self.figures.compile.append(self._compile())

    def _compile(self) -> float:
        seconds, network = timed(self.quantize)
        if not self.tuned:
            self.figures.quantize.append(seconds)
        seconds, self.circuit = timed(lambda: fheconv.compile(network, self.compile_config))
        return seconds

    def keygen(self) -> None:
        figures, cost = self.figures, self.circuit.cost
        figures.lookups, figures.complexity, figures.key_bytes = cost.lookups, cost.complexity, cost.key_bytes
        figures.clear, figures.simulated = self._accuracy("disable"), self._accuracy("simulate")
        figures.keygen, _ = timed(self.circuit.keygen)
        self.classes = self.circuit.network(self.data.test_images).argmax(1)

    def run(self, image: int) -> tuple[float, int]:
        one = self.data.test_images[image : image + 1]
        seconds, logits = timed(lambda: self.circuit.predict(one, fhe="execute"))
        return seconds, int(logits.argmax())

    def _accuracy(self, fhe: Fhe) -> float:
        predicted = self.circuit.predict(self.data.test_images, fhe=fhe).argmax(1)
        return float((predicted == self.data.test_labels.numpy()).mean())


class Theirs:
    """The model through Concrete ML, in the process of `peer`."""

    def __init__(self, peer: Peer, settings: tuple[int, int, float]) -> None:
        self.peer, self.settings = peer, settings
        self.figures = Figures()

    def compile(self) -> None:
        answer = self.peer.request("compile", *self.settings)
        figures = self.figures
        figures.compile.append(answer["seconds"])
        figures.cold = self.peer.imports + figures.compile[0]
        figures.lookups, figures.complexity = answer["lookups"], answer["complexity"]
        figures.key_bytes = answer["key_bytes"]

    def keygen(self) -> None:
        accuracy = self.peer.request("accuracy")
        self.figures.clear, self.figures.simulated = accuracy["disable"], accuracy["simulate"]
        self.figures.keygen = self.peer.request("keygen")["seconds"]

    def run(self, image: int) -> tuple[float, int]:
        answer = self.peer.request("run", image)
        return answer["seconds"], answer["class"]


def first(times: list[float]) -> float:
    return times[0]


def table(sides: dict[str, Figures], images: int, data: Images, *, tuned: bool) -> Table:
    seconds = "{:.2f} s".format
    compiling: list[tuple[str, Callable[[Figures], float], Callable[[float], str], bool]] = [
        ("quantize and compile, cold", lambda f: f.cold + first(f.quantize or [0.0]), seconds, True),
        ("quantize and compile, first", lambda f: f.from_float(first), seconds, True),
        ("quantize and compile, least", lambda f: f.from_float(min), seconds, True),
        ("compile alone, cold", lambda f: f.cold, seconds, True),
        ("compile alone, first", lambda f: first(f.compile), seconds, True),
        ("compile alone, least", lambda f: min(f.compile), seconds, True),
    ]
    rows: list[tuple[str, Callable[[Figures], float | None], Callable[[float], str], bool]] = [
        (f"right of {len(data.test_labels)}, clear integers", lambda f: f.clear, "{:.1%}".format, False),
        (f"right of {len(data.test_labels)}, simulated", lambda f: f.simulated, "{:.1%}".format, False),
        ("lookups", lambda f: f.lookups, "{:,}".format, True),
        ("complexity", lambda f: f.complexity, "{:.3g}".format, True),
        ("keys", lambda f: f.key_bytes, lambda size: decimal(int(size)), True),
        *([] if tuned else compiling),
        ("generate keys", lambda f: f.keygen, seconds, True),
        ("first encrypted image", lambda f: f.first, seconds, True),
        ("encrypted image, least", lambda f: min(f.seconds), seconds, True),
        ("encrypted image, median", lambda f: median(f.seconds), seconds, True),
        (f"right of {images}, encrypted", lambda f: f.right, "{:.0f}".format, False),
        (f"of {images} as the clear integers", lambda f: f.agreed, "{:.0f}".format, False),
    ]
    result = Table()
    for heading in ("", *sides, *(["ratio"] if len(sides) > 1 else [])):
        result.add_column(heading, justify="right" if heading else "left")
    for name, figure, text, compared in rows:
        values = [figure(figures) for figures in sides.values()]
        cells = [
            "–"
            if value is None or (name.startswith("compile alone") and not figures.quantize)
            else text(value)
            for figures, value in zip(sides.values(), values, strict=True)
        ]
        if len(sides) > 1:
            cells.append(f"{values[0] / values[1]:.2f}" if compared and "–" not in cells else "")
        result.add_row(name, *cells)
    return result


def measure(sides: list[Theirs | Ours], images: int, data: Images) -> None:
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
            if isinstance(side, Ours) and side.figures.agreed is not None:
                side.figures.agreed += predicted == int(side.classes[image])


def ratios(theirs: Figures, own: Figures, *, tuned: bool) -> str:
    """Say Concrete ML's figures by fheconv's."""
    figures = {
        "time of an encrypted image (median)": median(theirs.seconds) / median(own.seconds),
        "of the least": min(theirs.seconds) / min(own.seconds),
        "complexity": theirs.complexity / own.complexity,
        "keys": theirs.key_bytes / own.key_bytes,
        "to generate keys": theirs.keygen / own.keygen,
    }
    if not tuned:
        figures["to quantize and compile (least)"] = theirs.from_float(min) / own.from_float(min)
    return ", ".join(f"{name} {ratio:.2f}" for name, ratio in figures.items())


def tune(module: ModuleType, arguments: argparse.Namespace, console: Console) -> fheconv.TunePoint:
    """Return the cheapest circuit on the model of a split that loses no more than was asked for."""
    parts = digits.validation_split(arguments.tuned)
    started = perf_counter()
    result = fheconv.tune(
        module.shipped(arguments.tuned),
        parts.train_images,
        evaluation=(parts.validation_images, parts.validation_labels),
        training=(parts.train_images, parts.train_labels),
        augment=partial(digits.warped, warp=module.RECIPE.warp, noise=module.RECIPE.noise),
        epochs=arguments.epochs,
        lookup_budgets=arguments.lookup_budget,
        widths=arguments.widths,
        measure=arguments.measure,
        compile_config=arguments.compile_config,
    )
    console.print(f"Tuned on split {arguments.tuned} in {(perf_counter() - started) / 60:.0f} minutes:")
    console.print(result)
    return result.best(max_drop=arguments.max_drop)


def configured(kind: type[Any]) -> Callable[[str], Any]:
    """Return a reader of a configuration that is given as JSON."""

    def read(text: str) -> Any:
        try:
            return kind(**json.loads(text))
        except (ValueError, TypeError, fheconv.FheConvError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def width(text: str) -> tuple[int, int | None]:
    bits, _, kept = text.partition(":")
    return int(bits), int(kept) if kept else None


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return number


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time Concrete ML and fheconv on one trained model.")
    parser.add_argument("--model", choices=("tinycnn", "rescnn"), default="tinycnn")
    parser.add_argument("--images", type=positive, default=4, help="timed images, after one to warm up")
    parser.add_argument("--compiles", type=positive, default=3, help="how often each compiles")
    add_environment(parser)
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
    tuning = parser.add_argument_group("fheconv, tuned")
    tuning.add_argument(
        "--tuned",
        type=int,
        choices=digits.SPLITS,
        metavar="SPLIT",
        help="take the model of this split (0, 1, 2), and what fheconv.tune finds for it",
    )
    tuning.add_argument("--max-drop", type=float, default=0.01, help="of accuracy (default: 0.01, a point)")
    tuning.add_argument("--epochs", type=positive, default=400, help="of fine-tuning (default: 400)")
    tuning.add_argument("--lookup-budget", type=positive, nargs="*", default=[], help="lookups to try, too")
    tuning.add_argument(
        "--widths",
        type=width,
        nargs="+",
        default=WIDTHS,
        help="accumulator widths to try, as 6, or as 8:5 for 8 bits rounded to 5 (default: those of tune)",
    )
    tuning.add_argument("--measure", action="store_true", help="let tune time circuits on this machine")
    add_settings(parser)
    arguments = parser.parse_args()
    if arguments.tuned is not None and arguments.quant_config:
        parser.error("--tuned chooses what --quant-config would give; leave out one of them")
    return arguments


def main() -> None:
    arguments = parse()
    console = Console(width=120)  # what tune found fits, in a file too
    say = Console(highlight=False, markup=False, soft_wrap=True).print
    torch.set_num_threads(1)  # as in concrete_ml_worker.py
    module = importlib.import_module(f"train_{arguments.model}_digits")
    tuned = arguments.tuned is not None
    settings = arguments.n_bits, arguments.rounding_bits, arguments.p_error
    python, data = peer_python(arguments.environment, console), images_of_digits(arguments.tuned)
    try:
        if tuned:
            point = tune(module, arguments, console)
            mine = Ours(lambda: point.network, point.config, data, tuned=True)
            words = f"tuned, {point.setting}, predicted {point.accuracy:.1%} of the validation images right"
        else:
            config = arguments.quant_config or fheconv.QuantConfig(**QUANTIZE[arguments.model])
            mine = Ours(
                partial(fheconv.quantize, module.shipped(), data.calibration, config),
                arguments.compile_config,
                data,
                tuned=False,
            )
            words = str(config)
        with Peer(python, module.__name__, (arguments.tuned,), data) as peer:
            theirs, refusal = Theirs(peer, settings), ""
            for _ in range(arguments.compiles):
                if not refusal:
                    try:
                        theirs.compile()
                    except PeerRefusal as error:
                        refusal = str(error)
                mine.compile()
            measure([mine] if refusal else [theirs, mine], arguments.images, data)
    except PeerError as error:
        raise SystemExit(f"FAILED: Concrete ML: {error}") from error
    except fheconv.FheConvError as error:
        raise SystemExit(f"FAILED: fheconv: {error}") from error

    right = digits.evaluate(module.shipped(arguments.tuned))
    say(f"{arguments.model}: {right:.1%} of 450 right in float")
    say(f"fheconv: {words}, p_error={mine.compile_config.p_error}")
    sides = {f"fheconv {version('fheconv')}": mine.figures}
    if refusal:
        say("Concrete ML cannot compile this model. It says:", refusal, sep="\n")
    else:
        bits, rounding, p_error = settings
        say(f"Concrete ML: n_bits={bits}, {rounding} rounding bits (approximate), p_error={p_error}")
        sides = {f"Concrete ML {RELEASE}": theirs.figures, **sides}
    console.print(table(sides, arguments.images, data, tuned=tuned))
    if not tuned:
        say(
            "cold: with the start of the process that holds the native library, and its imports (Concrete "
            f"ML's torch too); first, and least of {arguments.compiles}: with that done. Concrete ML "
            "quantizes as it compiles: compile_torch_model does both."
        )
    if refusal:
        say(f"Done: fheconv alone, {median(mine.figures.seconds):.2f} s an encrypted image (median).")
    else:
        say(f"Done: Concrete ML by fheconv: {ratios(theirs.figures, mine.figures, tuned=tuned)}.")


if __name__ == "__main__":
    main()
