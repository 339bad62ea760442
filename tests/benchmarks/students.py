"""Print students of TinyCNN on digits beside simple controls: `python tests/benchmarks/students.py`.

For each validation split of `models/digits.py` the teacher, a TinyCNN of `models/`, was trained without that
split's validation images. Controls learn the classes: a linear model, and one hidden layer of ReLUs. Students
learn the teacher's logits (`fheconv.distill`). All are trained on the split's training images, with the warps
of the teacher's training, for as many epochs. Networks with lookups are fine-tuned after quantizing.
Validation images decide what is kept, and the margins of cascades. The 450 test images only measure. Figures
are means over the splits, with the range. `--rescnn` takes ResCNN as the teacher.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))

import digits
import fheconv
import train_rescnn_digits
import train_tinycnn_digits
from tables import markdown, spread

BUDGETS = (0, 16, 32, 64, 132)
P_ERROR = 0.05
SIMULATIONS = 3
# Lookup-free circuits have bits to spare.
LINEAR = fheconv.QuantConfig(weight_bits=8, input_bits=6)
WINDOWS = fheconv.QuantConfig(overflow="defined", rounding_bits=5, weight_bits=6, input_bits=6)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One row on one split: shares of the test images that get their class, and the cost of an image."""

    floats: float
    clear: float
    simulated: float
    lookups: float
    complexity: float


TEXT: dict[str, Callable[[float], str]] = {
    "floats": "{:.1%}".format,
    "clear": "{:.1%}".format,
    "simulated": "{:.1%}".format,
    "lookups": "{:.0f}".format,
    "complexity": "{:.2g}".format,
}


def control(parts: digits.Split, hidden: int, recipe: digits.Recipe, epochs: int) -> nn.Module:
    """Train a linear model, or one hidden layer, on the classes; keep the best on validation images."""
    torch.manual_seed(0)
    scale = float(parts.train_images.max())
    layers = [nn.Linear(64, hidden), nn.ReLU()] if hidden else []
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(hidden or 64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=1e-3)
    steps = epochs * -(-len(parts.train_images) // 64)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, steps)
    best, least = {}, np.inf
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(parts.train_images)).split(64):
            images = digits.warped(parts.train_images[batch], recipe.warp, recipe.noise) / scale
            optimizer.zero_grad()
            functional.cross_entropy(model(images), parts.train_labels[batch]).backward()
            optimizer.step()
            rates.step()
        if epoch % 10 == 0 or epoch == epochs:
            with torch.no_grad():
                scores = model(parts.validation_images / scale)
                loss = float(functional.cross_entropy(scores, parts.validation_labels))
            if loss < least:
                best, least = {name: value.clone() for name, value in model.state_dict().items()}, loss
    model.load_state_dict(best)
    with torch.no_grad():
        model[1].weight /= scale
    return model.eval()


def circuit(
    model: nn.Module, parts: digits.Split, recipe: digits.Recipe, epochs: int, *, linear: bool
) -> fheconv.FheCircuit:
    """Quantize, fine-tune and compile a network."""
    if linear:
        return fheconv.compile(fheconv.quantize(model, parts.train_images, LINEAR))
    network = fheconv.finetune(
        fheconv.quantize(model, parts.train_images, WINDOWS),
        (parts.train_images, parts.train_labels),
        validation=(parts.validation_images, parts.validation_labels),
        epochs=epochs,
        augment=partial(digits.warped, warp=recipe.warp, noise=recipe.noise),
    )
    return fheconv.compile(network, fheconv.CompileConfig(p_error=P_ERROR))


def measure(model: nn.Module, made: fheconv.FheCircuit | fheconv.Cascade) -> Figures:
    """Look at the test images."""
    data = digits.digits()
    images, labels = data.test_images, data.test_labels.numpy()
    cost = made.cost(images) if isinstance(made, fheconv.Cascade) else made.cost
    return Figures(
        floats=digits.evaluate(model),
        clear=made.score(images, labels),
        simulated=float(np.mean([made.score(images, labels, fhe="simulate") for _ in range(SIMULATIONS)])),
        lookups=cost.lookups,
        complexity=cost.complexity,
    )


def rows(split: int, arguments: argparse.Namespace) -> dict[str, Figures]:
    """Measure every row on one split."""
    module = train_rescnn_digits if arguments.rescnn else train_tinycnn_digits
    teacher, recipe, parts = module.shipped(split), module.RECIPE, digits.validation_split(split)
    found, circuits = {}, {}

    def add(name: str, model: nn.Module, made: fheconv.FheCircuit | fheconv.Cascade) -> None:
        found[name] = measure(model, made)
        words = ", ".join(f"{key} {text(getattr(found[name], key))}" for key, text in TEXT.items())
        print(f"split {split}, {name}: {words}", file=sys.stderr, flush=True)

    for budget in arguments.budgets:
        name = "linear model" if not budget else f"hidden layer of {budget} ReLUs"
        model = control(parts, budget, recipe, arguments.epochs)
        add(name, model, circuit(model, parts, recipe, arguments.tuning_epochs, linear=not budget))
    for budget in arguments.budgets:
        student = fheconv.distill(
            teacher,
            parts.train_images,
            lookup_budget=budget,
            validation=parts.validation_images,
            epochs=arguments.epochs,
            augment=partial(digits.warped, warp=recipe.warp, noise=recipe.noise),
        )
        made = circuits[budget] = circuit(student, parts, recipe, arguments.tuning_epochs, linear=not budget)
        add(f"student, {budget} lookups", student, made)
        if budget and 0 in circuits:
            validation = parts.validation_images, parts.validation_labels
            cascade = fheconv.Cascade.fit(circuits[0], made, validation)
            add(f"linear student, then {budget} lookups", student, cascade)
    return found


def table(found: Sequence[dict[str, Figures]], right: Sequence[float], name: str) -> Table:
    title = f"{name} on digits, {len(right)} splits; in float {spread(right, TEXT['floats'])} are right"
    result = markdown(title, "network", *TEXT)
    for row in found[0]:
        result.add_row(
            row, *(spread([getattr(one[row], key) for one in found], text) for key, text in TEXT.items())
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Print students of TinyCNN on digits beside simple controls."
    )
    parser.add_argument("--splits", type=int, nargs="+", choices=digits.SPLITS, default=digits.SPLITS)
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--epochs", type=int, default=400, help="of training (default: 400)")
    parser.add_argument("--tuning-epochs", type=int, default=100, help="of fine-tuning (default: 100)")
    parser.add_argument("--rescnn", action="store_true", help="ResCNN is the teacher")
    arguments = parser.parse_args()

    started = perf_counter()
    found = [rows(split, arguments) for split in arguments.splits]
    module = train_rescnn_digits if arguments.rescnn else train_tinycnn_digits
    right = [digits.evaluate(module.shipped(split)) for split in arguments.splits]
    Console(width=200).print(table(found, right, "ResCNN" if arguments.rescnn else "TinyCNN"))
    print(f"It took {(perf_counter() - started) / 60:.0f} minutes.")


if __name__ == "__main__":
    main()
