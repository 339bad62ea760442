"""A LeNet-5 as one circuit and in stages: `python tests/benchmarks/staged.py [--model tinycnn]`.

It is the LeNet-5 of `strangers.py`, trained on MNIST, with average pooling, or TinyCNN. Both circuits run the
same ciphertext under the same keys. First both run in one process, where their results must be equal, failed
lookups included. Then they run in turn: the one circuit on all cores, and the stages through Dask, with a
worker of one thread for each core. In the first call, each worker starts the native library and compiles the
blocks; these seconds are told apart. "Work of cores" counts what cores spend on it, without other programs'
share, but with all that workers do to open the circuit. In the next call a Dask worker is killed in the
middle. At last the stages run here again, and the native library is killed.

Each process of the library rounds in its own way, presumably because its FFT is chosen by what is fast at the
moment. So lookups near the edge of a step differ from process to process, of the one circuit too. "Off by" is
the root mean square of the integer results' difference from the clear ones.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from threading import Timer
from time import perf_counter, time

import numpy as np
import psutil
from dask.distributed import Client, LocalCluster

import fheconv
import strangers
from fheconv.circuits.native.worker import Worker
from fheconv.serving import distributed, jobs

MODELS = {"lenet": strangers.lenet, "tinycnn": strangers.tinycnn}


def timed(function: Callable, *arguments, **options):
    start = perf_counter()
    result = function(*arguments, **options)
    return perf_counter() - start, result


def busy() -> float:
    """The seconds that cores have spent so far on this program and those that it started."""
    own = psutil.Process()
    return sum(sum(one.cpu_times()[:4]) for one in (own, *own.children(recursive=True)))


def killed(pid: int, after: float) -> Timer:
    """Kill a process after so many seconds."""
    timer = Timer(after, os.kill, (pid, signal.SIGKILL))
    timer.start()
    return timer


def say(*words: object) -> None:
    print(*words, flush=True)


class Circuits:
    """One network as one circuit and in stages, with the servers, the keys, and an image for both."""

    def __init__(self, network: fheconv.QuantizedNetwork, image: np.ndarray, blocks: int, p_error: float):
        self.whole = fheconv.compile(network, fheconv.CompileConfig(p_error=p_error))
        self.whole.keygen()
        self.staged = fheconv.compile(network, keys_of=self.whole, stages="layers", blocks=blocks)
        self.keys = self.whole.evaluation_keys
        self.image = self.whole.encrypt(image)
        self.same = replace(self.image, fingerprint=self.staged.fingerprint)  # they differ in nothing else
        self.expected = network.integers(image)
        with tempfile.TemporaryDirectory() as folder:
            self.file = self.staged.save(folder)[1].read_bytes()
            self.session = Worker()
            self.one = fheconv.load_server(self.whole.save(folder)[1]).beside(self.session)
            self.stages = fheconv.load_server(self.file).beside(self.session)

    def off_by(self, result: fheconv.Ciphertext) -> str:
        """How far results are from the clear integers, in words."""
        off = self.decrypted(result) - self.expected
        return f"off by {np.sqrt(np.mean(off**2)):.1f}"

    def decrypted(self, result: fheconv.Ciphertext) -> np.ndarray:
        owner = self.staged if result.fingerprint == self.staged.fingerprint else self.whole
        return owner.decrypt(result, dequantize=False)


def through_dask(circuits: Circuits, dask: Client) -> tuple[float, float, fheconv.Ciphertext]:
    """The seconds of a call, those until the last worker had opened the circuit, and the result."""
    start = time()
    result = distributed.run(circuits.stages, circuits.keys, circuits.same, client=dask)
    end = time()
    opened = [when for when, _ in dask.get_events(jobs.TOPIC) if when > start]
    return end - start, max(opened, default=start) - start, result


def interrupted_here(circuits: Circuits, seconds: float) -> tuple[float, fheconv.Ciphertext]:
    """Run the stages in a process that is killed after so many seconds, and go on."""
    with tempfile.TemporaryDirectory() as folder:
        keep = Path(folder) / "kept"
        timer = killed(circuits.session.pid, seconds)
        start = perf_counter()
        try:
            circuits.stages.run(circuits.same, circuits.keys, keep=keep)
        except fheconv.ExecutionError as error:
            say(f"killed here after {perf_counter() - start:.1f} s: {str(error)[:100]}")
            say(f"kept: {len(list(keep.iterdir()))} of {len(circuits.stages.blocks)} values")
        timer.cancel()
        more, result = timed(circuits.stages.run, circuits.same, circuits.keys, keep=keep)
        return more, result


def main() -> None:
    parser = argparse.ArgumentParser(description="A LeNet-5 as one circuit and in stages.")
    parser.add_argument("--model", choices=MODELS, default="lenet")
    parser.add_argument("--blocks", type=int, default=2, help="of each stage")
    parser.add_argument("--runs", type=int, default=3, help="of each kind, in turn")
    parser.add_argument("--p-error", type=float, help="of a lookup")
    arguments = parser.parse_args()
    try:
        trial = MODELS[arguments.model](0)
    except strangers.MissingPackageError as error:
        sys.exit(str(error))
    network = fheconv.quantize(trial.model, trial.calibration)
    image = trial.test.images[:1].numpy()
    circuits = Circuits(network, image, arguments.blocks, arguments.p_error)
    cost = circuits.whole.cost
    say(f"{cost.lookups:,} lookups, complexity {circuits.whole.complexity:.4g}, in stages "
        f"{circuits.staged.complexity:.4g}; {len(circuits.staged.blocks)} blocks")  # fmt: skip
    seconds, result = timed(circuits.one.run, circuits.image, circuits.keys)
    usual, staged = timed(circuits.stages.run, circuits.same, circuits.keys)
    single, here_too = circuits.decrypted(result), circuits.decrypted(staged)
    differing = int((single != here_too).sum())
    say(f"in one process: one circuit {seconds:.1f} s, in stages {usual:.1f} s; {differing} of {single.size} "
        f"results differ; {circuits.off_by(result)} of {np.ptp(circuits.expected)}")  # fmt: skip
    compare(circuits, arguments.runs)
    seconds, result = interrupted_here(circuits, usual / 2)
    say(f"the rest took {seconds:.1f} s; {circuits.off_by(result)}")


def compare(circuits: Circuits, runs: int) -> None:
    """Run the one circuit and the stages through Dask in turn, and then with a worker that is killed."""
    options = {"dashboard_address": None, "silence_logs": logging.CRITICAL}
    workers = os.cpu_count() or 1
    whole, call, running, work = [], [], [], []
    with LocalCluster(n_workers=workers, threads_per_worker=1, **options) as cluster, Client(cluster) as dask:
        for _ in range(runs):
            begun = busy()
            whole.append(timed(circuits.one.run, circuits.image, circuits.keys)[0])
            between = busy()
            seconds, opening, result = through_dask(circuits, dask)
            call.append(seconds)
            running.append(seconds - opening)
            work.append((busy() - between) / (between - begun))
            say(f"one circuit {whole[-1]:.1f} s; through Dask {seconds:.1f} s, of which {opening:.1f} s to "
                f"open it, {work[-1]:.2f} times the work of cores; {circuits.off_by(result)}")  # fmt: skip
        usual = median(whole)
        say(f"medians: one circuit {usual:.1f} s; through Dask {median(call):.1f} s, "
            f"{median(call) / usual:.2f} times; without opening {median(running):.1f} s, "
            f"{median(running) / usual:.2f} times; {median(work):.2f} times the work of cores")  # fmt: skip
        timer = killed(next(iter(dask.run(os.getpid).values())), median(call) / 2)
        seconds, _, result = through_dask(circuits, dask)
        timer.cancel()
        say(f"a Dask worker killed in the middle: {seconds:.1f} s; {circuits.off_by(result)}")


if __name__ == "__main__":
    main()
