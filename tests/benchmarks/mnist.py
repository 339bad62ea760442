"""Print LeNet-5 on MNIST beside its students and controls: `python tests/benchmarks/mnist.py`.

LeNet-5 and its students are those of `models/`, one of each for each split of `models/train_mnist.py`, which
says where the images come from. They are quantized as they are: students were trained with rounded lookups.
Controls are trained here, as students are, but on the right classes: a linear model, and one hidden layer of
as many ReLUs as a student takes lookups (`fheconv.training.controls`). The settings of lookups were chosen on
the validation images of split 0. The test images only measure; of LeNet-5, the first 100 of them are
simulated. Figures are means over the splits, with the range.

With `--encrypted N` a student takes N test images of one split encrypted, in turn with Concrete ML, which
gets the same weights and is calibrated on the same images (see `concrete_ml.py`; `--alone` leaves it out).
"""

import argparse
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from rich.console import Console
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))

import digits
import fheconv
import train_mnist
from concrete_ml import Ours, Theirs, measure, positive, ratios, table
from concrete_ml_peer import RELEASE, Images, Peer, PeerError, add_environment, add_settings, peer_python
from fheconv.basics.samples import Samples
from fheconv.training.controls import control
from students import LINEAR, Figures, add_and_say
from students import measure as figures_of
from students import table as table_of_rows
from train_mnist import TEACHER, shipped

STUDENTS = "student-128", "student-1238"
# The lookups of controls: none, or as many as those of a student.
CONTROLS = 0, 128, 1238
QUANTIZE = fheconv.QuantConfig(overflow="defined", rounding_bits=5, weight_bits=6, input_bits=4)
COMPILE = fheconv.CompileConfig(p_error=0.05)
# How often the test images are simulated, and how many of them. Each lookup of an image takes about 0.05 ms.
SIMULATIONS = {TEACHER: (1, 100), "student-1238": (1, None)}


def quantized(model: nn.Module, parts: train_mnist.Parts) -> fheconv.QuantizedNetwork:
    return fheconv.quantize(model, parts.train.images, QUANTIZE)


def rows(split: int, models: list[str], controls: list[int], epochs: int) -> dict[str, Figures]:
    """Measure every row on one split."""
    found: dict[str, Figures] = {}
    parts = train_mnist.parts(split)
    for name in models:
        model = shipped(name, split)
        circuit = fheconv.compile(quantized(model, parts), COMPILE)
        figures = figures_of(model, circuit, parts.test, *SIMULATIONS.get(name, ()))
        add_and_say(found, name, figures)
    for lookups in controls:
        model = control(
            Samples(*parts.train),
            lookups=lookups,
            classes=10,
            epochs=epochs,
            validation=Samples(*parts.validation),
            augment=train_mnist.augmented,
        )
        if lookups:
            name, circuit = (
                f"hidden layer of {lookups} ReLUs",
                fheconv.compile(quantized(model, parts), COMPILE),
            )
        else:
            name, circuit = "linear model", fheconv.compile(fheconv.quantize(model, parts.train, LINEAR))
        add_and_say(found, name, figures_of(model, circuit, parts.test))
    return found


def encrypted(arguments: argparse.Namespace, console: Console) -> None:
    """Run one student encrypted, in turn with Concrete ML."""
    name, split = arguments.student, arguments.split
    parts, model = train_mnist.parts(split), shipped(name, split)
    data = Images(parts.train.images, *parts.test)
    mine = Ours(partial(quantized, model, parts), COMPILE, data, tuned=False)
    mine.compile()
    sides = {f"fheconv {version('fheconv')}": mine.figures}
    if arguments.alone:
        measure([mine], arguments.encrypted, data)
    else:
        python = peer_python(arguments.environment, console)
        settings = arguments.n_bits, arguments.rounding_bits, arguments.p_error
        try:
            with Peer(python, train_mnist.__name__, (name, split), data) as peer:
                theirs = Theirs(peer, settings)
                theirs.compile()
                measure([theirs, mine], arguments.encrypted, data)
        except PeerError as error:
            raise SystemExit(f"FAILED: Concrete ML: {error}") from error
        console.print(
            f"Concrete ML: n_bits={settings[0]}, {settings[1]} rounding bits, p_error={settings[2]}"
        )
        sides = {f"Concrete ML {RELEASE}": theirs.figures, **sides}
    console.print(f"{name}, split {split}: {digits.accuracy(model, *parts.test):.1%} right in float")
    console.print(f"fheconv: {QUANTIZE}, p_error={COMPILE.p_error}")
    console.print(table(sides, arguments.encrypted, data, tuned=False))
    if arguments.alone:
        console.print(f"Done: {median(mine.figures.seconds):.2f} s an encrypted image (median).")
    else:
        words = ratios(theirs.figures, mine.figures, tuned=False)
        console.print(f"Done: Concrete ML by fheconv: {words}.", soft_wrap=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Print LeNet-5 on MNIST beside its students and controls.")
    parser.add_argument("--splits", type=int, nargs="+", choices=digits.SPLITS, default=digits.SPLITS)
    parser.add_argument("--models", nargs="+", choices=train_mnist.MODELS, default=list(train_mnist.MODELS))
    parser.add_argument(
        "--controls", type=int, nargs="*", default=CONTROLS, help="their lookups (default: 0 128 1238)"
    )
    parser.add_argument("--epochs", type=positive, default=100, help="of controls (default: 100)")
    runs = parser.add_argument_group("encrypted")
    runs.add_argument("--encrypted", type=positive, metavar="N", help="run N test images encrypted instead")
    runs.add_argument("--student", choices=STUDENTS, default=STUDENTS[0])
    runs.add_argument("--split", type=int, choices=digits.SPLITS, default=0, help="default: 0")
    runs.add_argument("--alone", action="store_true", help="without Concrete ML")
    add_environment(parser)
    add_settings(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    console = Console(width=200)
    torch.set_num_threads(1)  # as in concrete_ml_worker.py
    started = perf_counter()
    try:
        if arguments.encrypted:
            encrypted(arguments, console)
        else:
            found = [
                rows(split, arguments.models, arguments.controls, arguments.epochs)
                for split in arguments.splits
            ]
            right = [
                digits.accuracy(shipped(TEACHER, split), *train_mnist.parts(split).test)
                for split in arguments.splits
            ]
            console.print(table_of_rows(found, right, "LeNet-5 on MNIST"))
    except train_mnist.MissingPackageError as error:
        raise SystemExit(str(error)) from error
    print(f"It took {(perf_counter() - started) / 60:.0f} minutes.")


if __name__ == "__main__":
    main()
