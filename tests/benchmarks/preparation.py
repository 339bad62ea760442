"""Print what preparing a network takes: `python tests/benchmarks/preparation.py [MODEL …]`.

Each model is quantized with nothing set, and compiled if it is cheap enough, in a process of its own, after
a small one ("warm"). A model that takes long runs once. Memory is the greatest of the process, of which torch
takes about 0.4 GB. Models and images are those of `strangers.py`; ResNet-18, of the usual width, has random
weights, and so has each layer of so many taps.
"""

import argparse
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from rich.console import Console
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))

import fheconv
from strangers import MODELS, MissingPackageError, resnet18
from tables import markdown

RUNS = 3
# A model that takes more seconds than this is not run again.
LONG = 10.0


def stranger(name: str) -> tuple[nn.Module, Tensor]:
    trial = MODELS[name](0)
    return trial.model, trial.calibration


def resnet() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return resnet18(64).eval(), torch.rand(100, 1, 32, 32)


def taps(count: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = nn.Conv2d(count // 9, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)
    return nn.Sequential(*layers).eval(), torch.rand(200, count // 9, 4, 4)


PREPARED: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    **{name: partial(stranger, name) for name in ("tinycnn", "pnet", "lenet", "recognizer")},
    "resnet18": resnet,
    **{f"{count}-taps": partial(taps, count) for count in (1152, 2304, 4608)},
}


def measure(name: str) -> list[str]:
    """Return the cells of a row: seconds to quantize, to forecast and to compile, lookups, and memory."""
    module, images = PREPARED[name]()
    fheconv.compile(fheconv.quantize(nn.Conv2d(1, 1, 2), torch.rand(2, 1, 3, 3)))  # imports
    times: list[tuple[float, ...]] = []
    compiled = True
    while len(times) < RUNS and (not times or sum(times[0]) < LONG):
        started = perf_counter()
        network = fheconv.quantize(module, images)
        quantized = perf_counter()
        lookups = network.forecast().lookups
        forecast = perf_counter()
        try:
            fheconv.compile(network)
        except fheconv.CostError:
            compiled = False
        times.append((quantized - started, forecast - quantized, perf_counter() - forecast))
    seconds = [f"{median(some):.2f}" for some in zip(*times, strict=True)]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    words = "" if compiled else " (refused)"
    return [*seconds[:2], seconds[2] + words, f"{lookups:,}", f"{memory:.1f}", str(len(times))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Print what preparing a network takes.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(PREPARED))
    names = parser.parse_args().models or list(PREPARED)
    if unknown := set(names) - set(PREPARED):
        parser.error(f"there is no model {sorted(unknown)[0]!r}; the models are {', '.join(PREPARED)}")
    columns = "s to quantize", "s to forecast", "s to compile", "lookups", "GB", "runs"
    table = markdown("medians, warm", "model", *columns)
    for name in names:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            try:
                cells = process.submit(measure, name).result()
            except MissingPackageError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
        print(f"{name}: {', '.join(cells)}", file=sys.stderr, flush=True)
        table.add_row(name, *cells)
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
