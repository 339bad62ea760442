"""Time encrypted runs of the engines: `python tests/benchmarks/engines.py [--runs N]`.

A 3x3 filter on a 28x28 image. The engines run alternately in one process, so that whatever else the
machine does hits both; with `in_process=True` the time is the library's own, through the worker it is
what users see. Concrete makes the process exit with 0 whatever happened, so the exit status says
nothing.
"""

import argparse
from itertools import product
from statistics import median
from time import perf_counter

import numpy as np
from rich.console import Console
from rich.table import Table

import fheconv
from fheconv import CompileConfig, QuantConfig

ENGINES = ("conv", "matrix")


LAYERS = {  # name: (weight, image size)
    "1→1, 3×3, 28×28": (np.arange(9).reshape(1, 1, 3, 3) % 5 - 2, 28),
    "1→1, 5×5, 28×28": (np.arange(25).reshape(1, 1, 5, 5) % 7 - 3, 28),
    "1→1, 9×9 box, 28×28": (np.ones((1, 1, 9, 9), int), 28),
    "1→8, 3×3, 12×12": (np.arange(72).reshape(8, 1, 3, 3) % 5 - 2, 12),
    "8→8, 3×3, 12×12": (np.arange(576).reshape(8, 8, 3, 3) % 5 - 2, 12),
}


def unit_costs(runs: int, console: Console) -> None:
    """Print the microseconds of one multiply-add: `fheconv.lowering.engines.ENGINES`."""
    table = Table(title=f"One multiply-add, in process, median of {runs}", title_justify="left")
    for heading in ("layer", "engine", "multiply-adds", "run", "a multiply-add"):
        table.add_column(heading, justify="left" if heading in ("layer", "engine") else "right")
    for name, (weight, size) in LAYERS.items():
        image = np.zeros((weight.shape[1], size, size), np.int64)
        network = fheconv.quantize(weight, image)
        for engine in ("conv", "separable", "shifts", "matrix"):
            try:
                circuit = fheconv.compile(network, CompileConfig(engine=engine, in_process=True))
            except fheconv.InvalidArgumentError:  # not of rank one
                continue
            circuit.keygen()
            ciphertext = circuit.encrypt(image)
            times = []
            for _ in range(runs + 1):
                start = perf_counter()
                circuit.run(ciphertext)
                times.append(perf_counter() - start)
            seconds, count = median(times[1:]), circuit.cost.multiply_adds
            table.add_row(
                name, engine, f"{count:,}", f"{seconds * 1e3:.1f} ms", f"{seconds / count * 1e6:.2f} µs"
            )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time encrypted runs of the engines conv and matrix.")
    parser.add_argument("--runs", type=int, default=15, help="timed runs of each, after one to warm up")
    parser.add_argument("--size", type=int, default=28, help="the image is size x size")
    arguments = parser.parse_args()

    rng = np.random.default_rng(0)
    image = rng.uniform(size=(1, arguments.size, arguments.size))
    network = fheconv.quantize(rng.normal(size=(3, 3)), image, QuantConfig(weight_bits=4, input_bits=4))
    cases = {}
    for engine, in_process in product(ENGINES, (True, False)):
        circuit = fheconv.compile(network, CompileConfig(engine=engine, in_process=in_process))
        circuit.keygen()
        assert circuit.verify(image).ok  # which also warms up
        cases[engine, in_process] = (circuit, circuit.encrypt(image), [])
    for _ in range(arguments.runs):
        for circuit, ciphertext, times in cases.values():
            start = perf_counter()
            circuit.run(ciphertext)
            times.append(perf_counter() - start)

    table = Table(
        title=f"Encrypted run, {arguments.size}x{arguments.size} by 3x3, median of {arguments.runs}",
        title_justify="left",
    )
    for heading in ("", *ENGINES, "matrix / conv"):
        table.add_column(heading, justify="right" if heading else "left")
    seconds = {case: median(times) for case, (_, _, times) in cases.items()}
    for in_process, name in ((True, "in process"), (False, "through the worker")):
        conv, matrix = (seconds[engine, in_process] for engine in ENGINES)
        table.add_row(name, f"{conv * 1e3:.1f} ms", f"{matrix * 1e3:.1f} ms", f"{matrix / conv:.2f}")
    ratios = (f"{seconds[engine, False] / seconds[engine, True]:.2f}" for engine in ENGINES)
    table.add_row("worker / in process", *ratios, "")
    console = Console()
    console.print(table)
    unit_costs(arguments.runs, console)


if __name__ == "__main__":
    main()
