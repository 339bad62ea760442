"""Print accuracy and cost of TinyCNN on digits: `python tests/benchmarks/accuracy.py [--splits 0 1 2]`.

This is the table of notebook 5. For each validation split of `models/digits.py` a model was trained
without that split's validation images. It is quantized, and in some rows trained on, with the split's own
training images, whose warps are those of its first training; what fine-tuning keeps is decided on the
validation images. The 450 test images only measure. Figures are means over the splits, with the range.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from time import perf_counter

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))

import digits
import fheconv
from fheconv.analysis.failures import accuracies
from tables import markdown, spread
from train_tinycnn_digits import RECIPE, shipped

LOOKED_UP = ("conv1", "conv2", "conv3")  # the widths of the last layer are free
EXACT, ROUNDED = 0.01, 0.05  # p_error: rounding is off by a step now and then anyway
LOOKUPS = 150, 64
SIMULATIONS = 3


@dataclass(frozen=True, kw_only=True)
class Row:
    """How the network of a row is made, and the failure probability of its lookups.

    Without `accumulator_bits`, lookups have windows where calibration leads (`overflow="defined"`). `epochs`
    are those of fine-tuning; 0: none.
    """

    accumulator_bits: int | None = None
    rounding_bits: int | None = None
    epochs: int = 0
    lookup_budget: int | None = None
    p_error: float = EXACT


ROWS = {
    **{f"windows-{bits}": Row(rounding_bits=bits, p_error=ROUNDED) for bits in (5, 4, 3)},
    **{
        f"fine-tuned-windows-{bits}": Row(rounding_bits=bits, epochs=100, p_error=ROUNDED)
        for bits in (5, 4, 3)
    },
    **{
        f"{count}-lookups-windows-5": Row(rounding_bits=5, epochs=100, lookup_budget=count, p_error=ROUNDED)
        for count in LOOKUPS
    },
    "8-rounded-to-5": Row(accumulator_bits=8, rounding_bits=5, p_error=ROUNDED),
    "6": Row(accumulator_bits=6),
    "fine-tuned-6": Row(accumulator_bits=6, epochs=400),
}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One row on one split: shares of the 450 test images that are classified rightly, and the cost.

    clear: with the exact integers; predicted: with the failure model; simulated: by Concrete, some times.
    keys: bytes.
    """

    clear: float
    predicted: float
    simulated: float
    lookups: float
    complexity: float
    keys: float


# How a figure is written.
TEXT: dict[str, Callable[[float], str]] = {
    "clear": "{:.1%}".format,
    "predicted": "{:.1%}".format,
    "simulated": "{:.1%}".format,
    "lookups": "{:.0f}".format,
    "complexity": "{:.2g}".format,
    "keys": lambda size: f"{size / 1e6:.0f} MB",
}


@cache
def quantized(
    split: int, accumulator_bits: int | None, rounding_bits: int | None
) -> fheconv.QuantizedNetwork:
    images = digits.validation_split(split).train_images
    if accumulator_bits is None:
        # Chosen on the validation images: more bits of weights or of images gain nothing there.
        config = fheconv.QuantConfig(
            weight_bits=4, input_bits=6, rounding_bits=rounding_bits, overflow="defined"
        )
        return fheconv.quantize(shipped(split), images, config)
    config = fheconv.QuantConfig(
        weight_bits="auto",
        activation_bits="auto",
        input_bits="auto",
        accumulator_bits=dict.fromkeys(LOOKED_UP, accumulator_bits),
        rounding_bits=None if rounding_bits is None else dict.fromkeys(LOOKED_UP, rounding_bits),
    )
    return fheconv.quantize(shipped(split), images, config)


def network_of(row: Row, split: int, epochs: int | None = None) -> fheconv.QuantizedNetwork:
    network = quantized(split, row.accumulator_bits, row.rounding_bits)
    if not row.epochs:
        return network
    parts = digits.validation_split(split)
    return fheconv.finetune(
        network,
        (parts.train_images, parts.train_labels),
        validation=(parts.validation_images, parts.validation_labels),
        epochs=epochs or row.epochs,
        augment=partial(digits.warped, warp=RECIPE.warp, noise=RECIPE.noise),
        lookup_budget=row.lookup_budget,
    )


def measure(network: fheconv.QuantizedNetwork, p_error: float) -> Figures:
    data = digits.digits()
    images, labels = data.test_images, data.test_labels.numpy()
    circuit = fheconv.compile(network, fheconv.CompileConfig(p_error=p_error))
    noisy = [circuit.predict(images, fhe="simulate").argmax(axis=1) for _ in range(SIMULATIONS)]
    return Figures(
        clear=float((network(images).argmax(axis=1) == labels).mean()),
        predicted=float(accuracies(network, images, labels, circuit.cost.p_error).mean()),
        simulated=float(np.mean([classes == labels for classes in noisy])),
        lookups=circuit.cost.lookups,
        complexity=circuit.cost.complexity,
        keys=circuit.cost.key_bytes,
    )


def table(found: dict[str, list[Figures]], right: Sequence[float]) -> Table:
    title = f"TinyCNN on digits, {len(right)} splits; in float {spread(right, TEXT['clear'])} are right"
    result = markdown(title, "bits of looked-up layers", "p_error", *TEXT)
    for name, figures in found.items():
        cells = (spread([getattr(one, key) for one in figures], text) for key, text in TEXT.items())
        result.add_row(name, f"{ROWS[name].p_error:g}", *cells)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Print accuracy and cost of TinyCNN on digits.")
    parser.add_argument("--splits", type=int, nargs="+", choices=digits.SPLITS, default=digits.SPLITS)
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument("--epochs", type=int, help="of fine-tuning (default: 100 with windows, else 400)")
    arguments = parser.parse_args()

    started = perf_counter()
    found: dict[str, list[Figures]] = {name: [] for name in arguments.rows}
    for split in arguments.splits:
        for name in arguments.rows:
            figures = measure(network_of(ROWS[name], split, arguments.epochs), ROWS[name].p_error)
            found[name].append(figures)
            words = ", ".join(f"{key} {text(getattr(figures, key))}" for key, text in TEXT.items())
            print(f"split {split}, {name}: {words}", file=sys.stderr, flush=True)
    right = [digits.evaluate(shipped(split)) for split in arguments.splits]
    # Wide enough for every column, whatever the terminal.
    Console(width=200).print(table(found, right))
    print(f"It all took {(perf_counter() - started) / 60:.0f} minutes.")


if __name__ == "__main__":
    main()
