"""What a cluster of N cores would give, on paper: `python tests/benchmarks/cluster.py [--cores 16 64 …]`.

TinyCNN of `models/`, or the circuit in `--folder`, which `circuit.save` wrote. Measured here: seconds of an
image on a worker of one core and of all cores, the memory that a worker takes, and how fast one process hands
images out and takes results back. The rest is arithmetic: workers do not wait for each other, and each holds
the keys. At last Dask runs a batch on this machine, which is what the arithmetic is held against.

Then the latency of one image, spread over N cores in stages (`latency.py`): of TinyCNN and LeNet-5, whose
blocks are measured, and of VGG-11 for images of 32x32, of which one block is.
"""

import argparse
import logging
import math
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
from dask.distributed import Client, LocalCluster
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

import fheconv
import latency
from fheconv.circuits.native.process import memory
from fheconv.circuits.native.worker import Worker
from fheconv.serving import distributed

MODELS = Path(__file__).parents[2] / "models"


def tinycnn(folder: Path) -> None:
    """Save the circuit of TinyCNN, rounded to 6 bits."""
    sys.path.insert(0, str(MODELS))
    import digits
    from train_tinycnn_digits import shipped

    images = digits.digits().train_images
    network = fheconv.quantize(shipped(), images, fheconv.QuantConfig(rounding_bits=6))
    fheconv.compile(network, fheconv.CompileConfig(p_error=0.05)).save(folder)


def one_worker(server, encrypted, keys, cores: int, runs: int) -> tuple[float, int]:
    """The median seconds of an image on so many cores, and the bytes of the process that ran it."""
    os.environ["OMP_NUM_THREADS"] = str(cores)
    session = Worker()
    beside = server.beside(session)
    seconds = []
    for _ in range(runs + 1):
        start = perf_counter()
        beside.run(encrypted, keys)
        seconds.append(perf_counter() - start)
    held = memory(session.pid)
    session.stop()
    del os.environ["OMP_NUM_THREADS"]
    return median(seconds[1:]), held


def timed(function, *arguments):
    start = perf_counter()
    result = function(*arguments)
    return perf_counter() - start, result


def through_dask(dask, server, keys, encrypted) -> float:
    """The seconds between two results of a batch, once all workers are at it."""
    started = len(dask.nthreads())
    done = [perf_counter() for _ in distributed.stream(server, keys, encrypted, client=dask)]
    return (done[-1] - done[started - 1]) / (len(done) - started)


def computing_nothing(size: int):
    """What a worker does with an image, but for the circuit: its result is so many bytes of nothing."""

    def run(job, ciphertext: bytes) -> bytes:
        received = fheconv.Ciphertext.from_bytes(ciphertext)
        return replace(received, kind="output", values=(bytes(size),)).to_bytes()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="What a cluster of N cores would give, on paper.")
    parser.add_argument("--cores", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--folder", type=Path, help="with client.zip and server.zip; TinyCNN without it")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each kind of worker")
    parser.add_argument("--images", type=int, default=12, help="in the batch that Dask runs here")
    parser.add_argument(
        "--spread", type=int, nargs="+", default=[2, 4, 16, 64, 256], help="cores, for latency"
    )
    parser.add_argument("--gigabits", type=float, default=10, help="a second, between two machines")
    arguments = parser.parse_args()
    here = os.cpu_count() or 1

    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder or Path(made)
        if arguments.folder is None:
            tinycnn(folder)
        client = fheconv.load_client(folder / "client.zip")
        server = fheconv.load_server(folder / "server.zip")
    client.keygen()
    keys = client.evaluation_keys
    images = np.zeros((arguments.images, *client.manifest.input_shape))
    encrypting, encrypted = timed(client.encrypt, images)
    one = client.encrypt(images[:1])

    kinds = {cores: one_worker(server, one, keys, cores, arguments.runs) for cores in sorted({1, here})}
    result = server.run(one, keys)
    decrypting, _ = timed(client.decrypt, result)
    options = {"dashboard_address": None, "silence_logs": logging.CRITICAL}
    with LocalCluster(n_workers=here, threads_per_worker=1, **options) as cluster, Client(cluster) as dask:
        real = through_dask(dask, server, keys, encrypted)
        distributed.run_job = computing_nothing(result.nbytes)
        handing = through_dask(dask, server, keys, [one] * 300)

    # A key set goes from worker to worker, each of which passes it on.
    bits = 8 * len(keys.payload) / (arguments.gigabits * 1e9)
    table = Table(title="A cluster on paper", title_justify="left")
    for heading in ("cores", "workers", "images/s", "memory, each", "memory, all", "keys there", "network"):
        table.add_column(heading, justify="right")
    for cores in arguments.cores:
        for each, (seconds, bytes_held) in kinds.items():
            workers = cores // each
            rate = workers / seconds
            bytes_held += len(keys.payload)  # which its Dask process holds, for workers that come later
            table.add_row(
                f"{cores:,}",
                f"{workers:,} of {each}",
                f"{rate:,.2f}",
                decimal(bytes_held),
                decimal(workers * bytes_held),
                f"{bits * (1 + math.ceil(math.log2(workers))):.1f} s",
                f"{decimal(int(rate * (one.nbytes + result.nbytes)))}/s",
            )
    times = ", ".join(f"{seconds:.2f} s on {cores}" for cores, (seconds, _) in kinds.items())
    encrypting /= arguments.images
    Console(width=100).print(
        f"An image: {times} cores; {decimal(one.nbytes)} to a worker, {decimal(result.nbytes)} back. Keys: "
        f"{decimal(len(keys.payload))}.",
        table,
        f"The process with the keys encrypts an image in {encrypting * 1e3:.1f} ms and decrypts it in "
        f"{decrypting * 1e3:.1f} ms; through Dask goes one in {handing * 1e3:.1f} ms. So one such process "
        f"serves at most {1 / (encrypting + decrypting + handing):,.0f} images/s.",
        f"Dask with {here} workers of 1 core on this machine: {1 / real:.2f} images/s; on paper "
        f"{here / kinds[1][0]:.2f}.",
    )
    for table in latency.tables(arguments.spread, arguments.gigabits * 1e9):
        Console(width=100).print(table)


if __name__ == "__main__":
    main()
