"""One image over Dask's worker processes, one of which is killed."""

import contextlib
import logging
import os
import signal
import threading
from collections import Counter

import numpy as np
import pytest
from dask.distributed import Client, LocalCluster

import fheconv
from fheconv.basics import progress
from fheconv.serving import distributed, jobs, spreading
from tests.support.nets import quantized

BLOCKS = 4


@pytest.fixture(scope="module")
def dask():
    options = {"dashboard_address": ":0", "silence_logs": logging.CRITICAL}
    with (
        LocalCluster(processes=True, n_workers=2, threads_per_worker=1, **options) as cluster,
        Client(cluster) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def circuit():
    options = {"accumulator_bits": 5, "activation_bits": 2, "input_bits": 2}
    network = quantized(3, "conv", "conv", size=(1, 5, 5), **options)
    made = fheconv.compile(network, fheconv.CompileConfig(p_error=1e-6), stages="layers", blocks=BLOCKS)
    made.keygen()
    return made


@pytest.fixture(scope="module")
def file(circuit, tmp_path_factory):
    return circuit.save(tmp_path_factory.mktemp("saved"))[1]


@pytest.fixture(scope="module")
def images(circuit):
    low, high = circuit.network.input.real_range
    return np.random.default_rng(0).uniform(low, high, (2, *circuit.network.input_shape))


class Recorded(list):
    """What a fake of Dask's `submit` was given: (function, arguments, options)."""

    def submit(self, function, *arguments, **options):
        self.append((function, arguments, options))
        return len(self) - 1


def spread(circuit, ciphertext, addresses):
    recorded = Recorded()
    result, values = spreading.spread(
        recorded.submit, "runner", circuit.blocks, ciphertext, addresses, ("name", 0)
    )
    return recorded, result, values


@pytest.mark.slow
def test_a_block_is_sent_what_it_reads_and_nothing_else(circuit, images):
    addresses = ["tcp://one", "tcp://two"]
    recorded, result, values = spread(circuit, circuit.encrypt(images[0]), addresses)
    tasks = [(at, task) for at, task in enumerate(recorded) if task[0] is spreading.run_block]
    assert len(tasks) == len(circuit.blocks)
    for (at, (_, (runner, block, *read), options)), expected in zip(tasks, circuit.blocks, strict=True):
        assert (runner, block) == ("runner", expected)
        assert at == values[block.number]
        assert read == [values[number] for number in block.reads]
        assert options["workers"][0] in addresses
        assert options["allow_other_workers"]
    assert recorded[result][1][1:] == (values[len(circuit.blocks)],)


@pytest.mark.slow
def test_the_blocks_of_a_stage_are_shared_by_all_workers(circuit, images):
    addresses = [f"tcp://{number}" for number in range(BLOCKS)]
    recorded, _, _ = spread(circuit, circuit.encrypt(images[0]), addresses)
    shares = Counter(
        (arguments[1].stage, options["workers"][0])
        for function, arguments, options in recorded
        if function is spreading.run_block
    )
    assert set(shares.values()) == {1}
    assert sum(stage == 0 for stage, _ in shares) == BLOCKS


@pytest.mark.slow
def test_images_are_spread_and_come_out_as_the_clear_integers(circuit, file, images, dask):
    opened = len(dask.get_events(jobs.TOPIC))
    result = distributed.run(file, circuit.evaluation_keys, circuit.encrypt(images), client=dask)
    expected = circuit.network.integers(images)
    np.testing.assert_array_equal(circuit.decrypt(result, dequantize=False), expected)
    events = [event for _, event in dask.get_events(jobs.TOPIC)[opened:]]
    assert Counter(event["worker"] for event in events) == dict.fromkeys(dask.run(os.getpid), 1)
    server = fheconv.load_server(file)
    several = [circuit.encrypt(images), circuit.encrypt(images[0]), circuit.encrypt(images[:0])]
    results = distributed.run(server, circuit.evaluation_keys, several, client=dask)
    assert [len(one.values) for one in results] == [2, 1, 0]
    np.testing.assert_array_equal(circuit.decrypt(results[1], dequantize=False), expected[0])


@pytest.mark.slow
def test_a_run_tells_how_many_blocks_have_finished(circuit, file, images, dask, monkeypatch):
    told, all_done = [], threading.Event()

    def show(counter):
        told.append((counter.done, counter.total))
        if counter.done == counter.total:
            all_done.set()

    counting = contextlib.nullcontext(progress.Counter(show))
    monkeypatch.setattr(distributed, "counting", lambda message: counting)
    distributed.run(file, circuit.evaluation_keys, circuit.encrypt(images[0]), client=dask)
    assert all_done.wait(60)
    assert [total for _, total in told] == [len(circuit.blocks) + 1] * len(told)
    assert [done for done, _ in told] == [*range(len(circuit.blocks) + 2)]


def killing(path):
    """What runs blocks on a worker, until the one that kills it, and counts them in a file."""

    def run_block(runner, block, *values):
        with open(path, "a") as file:
            file.write(f"{os.getpid()} {block.name}\n")
        first = path.with_suffix(".killed")
        if block.stage == 1 and not first.exists():
            first.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return runner.run_block(block, values)

    return run_block


@pytest.mark.slow
def test_a_killed_worker_costs_its_blocks_and_not_the_image(
    circuit, file, images, dask, tmp_path, monkeypatch
):
    path = tmp_path / "blocks"
    monkeypatch.setattr(spreading, "run_block", killing(path))
    encrypted = circuit.encrypt(images[0])
    result = distributed.run(file, circuit.evaluation_keys, encrypted, client=dask)
    expected = circuit.network.integers(images[0])
    np.testing.assert_array_equal(circuit.decrypt(result, dequantize=False), expected)
    dead = path.with_suffix(".killed").read_text()
    begun = [line.split() for line in path.read_text().splitlines()]
    again = Counter(name for _, name in begun)
    of_the_dead = {name for pid, name in begun if pid == dead}
    assert set(again) == {block.name for block in circuit.blocks}
    assert {name for name, count in again.items() if count > 1} <= of_the_dead
    assert len(of_the_dead) < len(circuit.blocks)
