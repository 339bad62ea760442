"""A photograph through ResNet's first convolution, tile by tile: `python tests/benchmarks/photograph.py`.

The convolution has 64 filters of 7x7, three channels and stride 2, with random weights. The photograph is one
of scikit-learn's, 512x512. Printed is the forecast, and then what compiling and the encrypted run say. A run
takes a quarter of an hour on two quiet cores; `--size 128` takes a sixteenth of it.
"""

import argparse
import os
from threading import Event, Thread
from time import perf_counter

import numpy as np
import psutil
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

import fheconv
from fheconv.circuits.native.process import memory
from fheconv.circuits.native.worker import worker


class Peak:
    """The most memory that this program and the native library's process hold while the block runs."""

    def __enter__(self) -> "Peak":
        self.bytes, self._done = 0, Event()
        self._thread = Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.bytes = max(self.bytes, held())


def held() -> int:
    return memory(os.getpid()) + memory(worker().pid or 0)


def busy() -> float:
    """The seconds that cores have spent so far on this program and the native library."""
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in (os.getpid(), worker().pid))


def main() -> None:
    parser = argparse.ArgumentParser(description="A photograph through ResNet's first convolution.")
    parser.add_argument("--size", type=int, default=512, help="pixels along each side")
    parser.add_argument("--tile", type=int, default=8, help="outputs along each side of a tile")
    arguments = parser.parse_args()
    picture = Image.fromarray(load_sample_image("flower.jpg")).resize([arguments.size] * 2)
    photograph = np.moveaxis(np.asarray(picture), -1, 0).astype(np.float64) / 255
    torch.manual_seed(0)
    network = fheconv.quantize(torch.nn.Conv2d(3, 64, 7, 2, 3, bias=False), photograph[None])

    start = perf_counter()
    forecast = network.forecast(tile=arguments.tile)
    print(f"Forecast in {perf_counter() - start:.2f} s:\n{forecast}", flush=True)
    tiled = fheconv.compile_tiled(network, arguments.tile)
    print(f"Compiled: complexity {tiled.cost.complexity:,.0f}, {tiled.cost.tiles:,} tiles in "
          f"{tiled.cost.ciphertexts:,} ciphertexts", flush=True)  # fmt: skip
    tiled.keygen()
    before = held()
    with Peak() as peak:
        begun, start = busy(), perf_counter()
        results = tiled.predict(photograph, fhe="execute")
        seconds, work = perf_counter() - start, busy() - begun
    expected = forecast.seconds + forecast.owner_seconds
    print(f"Run: {seconds:.0f} s ({work:.0f} s of cores), forecast {expected:.0f} s; at most "
          f"{peak.bytes / 1e9:.2f} GB, {(peak.bytes - before) / 1e9:.2f} GB more than before, forecast "
          f"{forecast.memory / 1e9:.2f} GB")  # fmt: skip
    print(f"{(results != network(photograph[None])[0]).sum()} of {results.size:,} results differ")


if __name__ == "__main__":
    main()
