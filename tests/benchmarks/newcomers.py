"""Print what a newcomer gets without setting any option: `python tests/benchmarks/newcomers.py [MODEL …]`.

Each model is quantized and compiled with the defaults only: `compile(quantize(model, images))`. The models,
their images and the packages that they need are those of `strangers.py`, and ResCNN of `models/`. Accuracy is
that of test images, in clear and in Concrete's simulation (with its failing lookups) of the first of them.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))

import fheconv
import train_rescnn_digits
from strangers import MODELS, SEEDS, TEXT, TITLES, MissingPackageError, Trial, compared, on_digits
from tables import markdown, spread


def rescnn(seed: int) -> Trial:
    return on_digits(train_rescnn_digits.shipped(seed), seed)


NEWCOMERS: dict[str, Callable[[int], Trial]] = {
    "tinycnn": MODELS["tinycnn"],
    "lenet": MODELS["lenet"],
    "rescnn": rescnn,
    "pnet": MODELS["pnet"],
    "recognizer": MODELS["recognizer"],
}
# What is printed of each model, and how.
COLUMNS: dict[str, Callable[[float], str]] = {
    "float": TEXT["float"],
    "clear": TEXT["right"],
    "error": TEXT["error"],
    "simulated": TEXT["right"],
    "simulated error": TEXT["error"],
    "lookups": "{:,.0f}".format,
    "1e7 operations a lookup": "{:.1f}".format,
    "MB of keys": "{:.0f}".format,
    "s an image": "{:.1f}".format,
    "s to quantize": "{:.1f}".format,
    "s to compile": "{:.1f}".format,
}


def measure(trial: Trial, simulated: int) -> dict[str, float]:
    """Quantize and compile a model with nothing set, and return what `COLUMNS` names."""
    started = perf_counter()
    network = fheconv.quantize(trial.model, trial.calibration)
    quantized = perf_counter()
    circuit = fheconv.compile(network, fheconv.CompileConfig(most_seconds=None))
    compiled = perf_counter()
    images, labels = trial.test.images, trial.test.labels
    with torch.inference_mode():
        expected = trial.model(images).numpy()
    clear = compared(np.concatenate([network(some.numpy()) for some in images.split(50)]), expected, labels)
    short = slice(0, simulated)
    results = circuit.predict(images[short].numpy(), fhe="simulate")
    shown = compared(results, expected[short], None if labels is None else labels[short])
    forecast, cost = network.forecast(), circuit.cost
    figures = {
        "error": clear["error"],
        "simulated error": shown["error"],
        "lookups": cost.lookups,
        "1e7 operations a lookup": cost.complexity / cost.lookups / 1e7,
        "MB of keys": cost.key_bytes / 1e6,
        "s an image": forecast.seconds,
        "s to quantize": quantized - started,
        "s to compile": compiled - quantized,
    }
    if labels is not None:
        figures |= {"float": clear["float"], "clear": clear["right"], "simulated": shown["right"]}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="Print what a newcomer gets without setting any option.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(NEWCOMERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--simulated", type=int, default=200, metavar="IMAGES")
    options = parser.parse_args()
    if unknown := set(options.models) - set(NEWCOMERS):
        parser.error(f"there is no model {sorted(unknown)[0]!r}; the models are {', '.join(NEWCOMERS)}")
    table = markdown("with no option set", "model", *COLUMNS)
    for name in options.models or NEWCOMERS:
        try:
            trials = [NEWCOMERS[name](seed) for seed in options.seeds]
        except MissingPackageError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        found = []
        for trial in trials:
            found.append(measure(trial, options.simulated))
            words = ", ".join(f"{key} {COLUMNS[key](value)}" for key, value in found[-1].items())
            print(f"{name}: {words}", file=sys.stderr, flush=True)
        cells = (
            spread([one[key] for one in found], text) if key in found[0] else ""
            for key, text in COLUMNS.items()
        )
        table.add_row(TITLES.get(name, "ResCNN on digits"), *cells)
    Console(width=250).print(table)


if __name__ == "__main__":
    main()
