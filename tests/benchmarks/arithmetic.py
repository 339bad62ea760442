"""Time the clear arithmetic: `python tests/benchmarks/arithmetic.py [--rounds N]`.

The formulations of `fheconv.conv` beside torch, alternately, with as many threads; then the filter
matrix, dense and sparse, with the memory that building it takes. torch's medians suffer most from other
load on the machine, so the ratios are those of the least times.
"""

import argparse
import os
import random
import resource
import subprocess
import sys

THREADS = "2"
# Read once, when numpy and torch are imported. Each library has threads of its own that spin while they
# wait, and two libraries, or another program, on as few cores then block each other for a whole time
# slice: torch looked thirty times slower than it is. It must spin a little, or it is twice as slow.
os.environ |= {
    "OMP_NUM_THREADS": THREADS,
    "OPENBLAS_NUM_THREADS": THREADS,
    "OPENBLAS_THREAD_TIMEOUT": "4",
    "GOMP_SPINCOUNT": "100000",
}

from collections.abc import Callable  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import median  # noqa: E402
from time import perf_counter  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import fheconv  # noqa: E402

DTYPES = ("int64", "float64", "float32")
# "loops" is the oracle of small sizes, not something to time on these.
METHODS = ("the default", "im2col", "tensordot", "shifts", "matrix")
TURN = 5


def seconds(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """The median and the least time of each function.

    They take turns, in a new order every round. A turn is a few calls untimed and as many timed: the
    first ones pay for the caches and the still spinning threads that another function left behind.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            function = functions[name]
            for _ in range(TURN):
                function()
            for _ in range(TURN):
                start = perf_counter()
                function()
                times[name].append(perf_counter() - start)
    return {name: (median(values), min(values)) for name, values in times.items()}


def formulations(rounds: int) -> Table:
    """NHWC 10x32x32x8 by 3x3x8x16. torch gets the same numbers in its own layout."""
    rng = np.random.default_rng(0)
    x, weight = rng.integers(-8, 8, (10, 32, 32, 8)), rng.integers(-8, 8, (3, 3, 8, 16))
    torch_x = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
    torch_weight = torch.from_numpy(weight).permute(3, 2, 0, 1).contiguous()
    expected = torch.conv2d(torch_x, torch_weight).permute(0, 2, 3, 1).numpy()

    cases: dict[str, Callable[[], object]] = {}
    for dtype in DTYPES:
        ours = partial(fheconv.conv, x.astype(dtype), weight.astype(dtype), layout="NHWC")
        for method in METHODS:
            call = ours if method == "the default" else partial(ours, method=method)
            np.testing.assert_array_equal(call(), expected)
            cases[f"{method} {dtype}"] = call
        torch_dtype = getattr(torch, dtype)
        cases[f"torch {dtype}"] = partial(torch.conv2d, torch_x.to(torch_dtype), torch_weight.to(torch_dtype))
    measured = seconds(cases, rounds)

    table = Table(
        title=f"fheconv.conv, 10x32x32x8 by 3x3x8x16: ms, median of {rounds * TURN} (least, to torch's)",
        title_justify="left",
    )
    table.add_column("")
    for dtype in DTYPES:
        table.add_column(dtype, justify="right")
    for method in (*METHODS, "torch"):
        cells = []
        for dtype in DTYPES:
            middle, least = measured[f"{method} {dtype}"]
            ratio = least / measured[f"torch {dtype}"][1]
            cells.append(f"{middle * 1e3:.2f} ({least * 1e3:.2f}, {ratio:.1f}x)")
        table.add_row(method, *cells)
    return table


def peak_mebibytes() -> float:
    """The greatest memory of this process so far."""
    # Linux counts kibibytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def present_mebibytes() -> float:
    """The memory of this process now (Linux). The peak would not do: a child inherits its parent's."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def build_large() -> None:
    """Build the csr matrix of 1024x1024 by 3x3; print seconds, and MiB of the matrix and of the peak."""
    before = present_mebibytes()
    start = perf_counter()
    matrix = fheconv.filter_matrix(np.ones((3, 3)), (1024, 1024), format="csr")
    elapsed = perf_counter() - start
    size = sum(part.nbytes for part in (matrix.data, matrix.indices, matrix.indptr)) / 2**20
    print(elapsed, size, peak_mebibytes() - before)


def matrices(rounds: int) -> Table:
    table = Table(title="fheconv.filter_matrix, 3x3 filter in float64", title_justify="left")
    for heading in ("", "time", "the matrix", "peak above start"):
        table.add_column(heading, justify="right" if heading else "left")
    small = np.ones((3, 3))
    dense = fheconv.filter_matrix(small, (28, 28))
    time, _ = seconds({"": lambda: fheconv.filter_matrix(small, (28, 28))}, rounds)[""]
    table.add_row("dense 28x28", f"{time * 1e3:.2f} ms", f"{dense.nbytes / 2**20:.1f} MiB", "")
    # A process of its own, because the peak of this one may be older.
    command = [sys.executable, __file__, "--large"]
    printed = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(5)]
    elapsed, size, peak = map(median, zip(*(map(float, line.split()) for line in printed), strict=True))
    table.add_row("csr 1024x1024", f"{elapsed * 1e3:.0f} ms", f"{size:.0f} MiB", f"{peak:.0f} MiB")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the clear arithmetic.")
    parser.add_argument("--rounds", type=int, default=20, help=f"turns of each, {TURN} timed calls a turn")
    parser.add_argument("--large", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(int(THREADS))
    if arguments.large:
        build_large()
        return
    console = Console()
    console.print(formulations(arguments.rounds))
    console.print(matrices(arguments.rounds))


if __name__ == "__main__":
    main()
