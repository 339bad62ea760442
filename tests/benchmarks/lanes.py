"""Time batches with one image and with four in a ciphertext: `python tests/benchmarks/lanes.py [--runs N]`.

A 3x3 filter on 28x28 images. Encryption, run and decryption count, an image, through the worker as users
have it; the two alternate in one process, so that whatever else the machine does hits both.
"""

import argparse
from statistics import median
from time import perf_counter

import numpy as np
from rich.console import Console
from rich.table import Table

import fheconv


def main() -> None:
    parser = argparse.ArgumentParser(description="Time batches with one and with four lanes.")
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each, after one to warm up")
    parser.add_argument("--images", type=int, default=16)
    arguments = parser.parse_args()

    rng = np.random.default_rng(0)
    images = rng.uniform(size=(arguments.images, 1, 28, 28))
    config = fheconv.QuantConfig(weight_bits=3, input_bits=3)
    network = fheconv.quantize(rng.normal(size=(3, 3)), images, config)
    cases = {}
    for lanes in (1, 4):
        circuit = fheconv.compile(network, fheconv.CompileConfig(lanes=lanes))
        circuit.keygen()
        if not circuit.verify(images).ok:
            raise SystemExit("A result was wrong.")
        cases[lanes] = (circuit, [])
    for _ in range(arguments.runs):
        for circuit, times in cases.values():
            start = perf_counter()
            circuit.predict(images, fhe="execute")
            times.append((perf_counter() - start) / len(images))

    seconds = {lanes: median(times) for lanes, (_, times) in cases.items()}
    table = Table(
        title=f"An encrypted 28x28 image by 3x3, batch of {len(images)}, median", title_justify="left"
    )
    for heading in ("1 lane", "4 lanes", "1 lane / 4 lanes"):
        table.add_column(heading, justify="right")
    table.add_row(*(f"{seconds[n] * 1e3:.1f} ms" for n in (1, 4)), f"{seconds[1] / seconds[4]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
