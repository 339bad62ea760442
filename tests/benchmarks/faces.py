"""Print students of a face detector's first network: `python tests/benchmarks/faces.py [--budgets 500 250]`.

PNet of MTCNN (see `strangers.py`) scores squares of 12 pixels. Students learn its score on crops of the left
third of photographs, are chosen on the middle third, and measured on the right third. There, the crops with
PNet's highest scores are those to be found. So PNet in floats has the area 1 under the curve (AUC), and what
is lost of it says how much of PNet's ranking is lost. Figures are means over seeds, with the range.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np
import torch
from rich.console import Console
from scipy.stats import rankdata, spearmanr
from torch import Tensor, nn

import fheconv
import strangers
from tables import markdown, spread

CROPS = 4000, 1000, 2000
# The share of the crops that are to be found.
FOUND = 0.05
P_ERROR = 0.01
CONFIG = fheconv.QuantConfig(overflow="defined", rounding_bits=5, weight_bits=6, input_bits=6)


class Score(nn.Module):
    """PNet's logit of a face, (N, 1)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.difference = nn.Linear(6, 1, bias=False)
        with torch.no_grad():
            self.difference.weight[:] = torch.tensor([[-1.0, 1.0, 0, 0, 0, 0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.difference(self.model(x))


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One network on one seed. `ranks` is Spearman's correlation with PNet's scores."""

    auc: float
    ranks: float
    lookups: float
    complexity: float
    seconds: float


def auc(scores: np.ndarray, wanted: np.ndarray) -> float:
    """Return the probability that a crop to be found has a higher score than another."""
    count = wanted.sum()
    return float((rankdata(scores)[wanted].sum() - count * (count + 1) / 2) / (count * (~wanted).sum()))


def rows(seed: int, arguments: argparse.Namespace) -> dict[str, Figures]:
    """Measure PNet itself, quantized, and with each budget a student, and PNet with fewer activations."""
    rng = np.random.default_rng(seed)
    teacher = Score(strangers.pnet(seed).model).eval()
    train, validation, test = (strangers.crops(n, 12, third, rng) for third, n in enumerate(CROPS))
    with torch.inference_mode():
        meant = teacher(test)[:, 0].numpy()
    wanted = meant > np.quantile(meant, 1 - FOUND)

    def student(budget: int) -> fheconv.QuantizedNetwork:
        model = fheconv.distill(
            teacher, train, lookup_budget=budget, validation=validation, epochs=arguments.epochs, seed=seed
        )
        return finetune(fheconv.quantize(model, train[:1000], CONFIG))

    plain = fheconv.quantize(teacher, train[:1000], CONFIG)
    finetune = partial(fheconv.finetune, data=train, validation=validation, epochs=arguments.tuning_epochs)
    networks: dict[str, Callable[[], fheconv.QuantizedNetwork]] = {"PNet": lambda: plain}
    for budget in arguments.budgets:
        networks[f"PNet, at most {budget} lookups"] = partial(finetune, plain, lookup_budget=budget)
        networks[f"student, {budget} lookups"] = partial(student, budget)
    found = {}
    for name, make in networks.items():
        network = make()
        cost = network.forecast(fheconv.CompileConfig(p_error=P_ERROR))
        scores = network(test)[:, 0]
        found[name] = Figures(
            auc=auc(scores, wanted),
            ranks=float(spearmanr(scores, meant).statistic),
            lookups=cost.lookups,
            complexity=cost.complexity,
            seconds=cost.seconds,
        )
        print(f"seed {seed}, {name}: {found[name]}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Print students of a face detector's first network.")
    parser.add_argument("--seeds", type=int, nargs="+", default=strangers.SEEDS)
    parser.add_argument("--budgets", type=int, nargs="+", default=(500, 250))
    parser.add_argument("--epochs", type=int, default=100, help="of training (default: 100)")
    parser.add_argument("--tuning-epochs", type=int, default=20, help="of fine-tuning (default: 20)")
    arguments = parser.parse_args()
    started = perf_counter()
    found = [rows(seed, arguments) for seed in arguments.seeds]
    columns = "AUC", "ranks", "lookups", "complexity", "seconds"
    result = markdown("PNet of MTCNN, clear integers", "network", *columns)
    for name in found[0]:
        figures = [one[name] for one in found]
        result.add_row(
            name,
            spread([one.auc for one in figures], "{:.4f}".format),
            spread([one.ranks for one in figures], "{:.3f}".format),
            spread([one.lookups for one in figures], "{:.0f}".format),
            spread([one.complexity for one in figures], "{:.2g}".format),
            spread([one.seconds for one in figures], "{:.1f}".format),
        )
    Console(width=200).print(result)
    print(f"It took {(perf_counter() - started) / 60:.0f} minutes.")


if __name__ == "__main__":
    main()
