"""Batches and tiles over Dask's worker processes, some of which are killed."""

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import psutil
import pytest
from dask.distributed import Client, LocalCluster
from distributed import Future, KilledWorker

import fheconv
from fheconv.circuits.keys import StoredKeys
from fheconv.serving import distributed, jobs
from tests.support.nets import integer_images, quantized, real_images

WITHOUT_DASK = """
import sys
sys.modules["dask"] = None
import fheconv
try:
    from fheconv.serving import distributed
except fheconv.MissingExtraError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def cluster():
    options = {"dashboard_address": ":0", "silence_logs": logging.CRITICAL}
    with LocalCluster(processes=True, n_workers=2, threads_per_worker=1, **options) as made:
        yield made


@pytest.fixture(scope="module")
def dask(cluster):
    with Client(cluster) as made:
        yield made


@pytest.fixture
def opened(dask):
    """What tells how often each worker has opened a circuit since the test began, with none open then."""
    dask.run(jobs.let_go)
    before = len(dask.get_events(jobs.TOPIC))
    return lambda: Counter(event["worker"] for _, event in dask.get_events(jobs.TOPIC)[before:])


@pytest.fixture(scope="module")
def network():
    return quantized(3, depth=1, size=(1, 4, 4), accumulator_bits=4)


@pytest.fixture(scope="module")
def circuit(network):
    made = fheconv.compile(network, fheconv.CompileConfig(p_error=1e-9))
    made.keygen()
    return made


@pytest.fixture(scope="module")
def file(circuit, tmp_path_factory):
    return circuit.save(tmp_path_factory.mktemp("saved"))[1]


@pytest.fixture(scope="module")
def tiled():
    """A filter without lookups: its keys are small, and it runs fast."""
    network = fheconv.quantize(np.array([[1, -2], [0, 1]]), np.arange(64).reshape(1, 8, 8) % 4)
    made = fheconv.compile_tiled(network, 4)
    made.keygen()
    return made


@pytest.fixture(scope="module")
def tile_file(tiled, tmp_path_factory):
    return tiled.circuit.save(tmp_path_factory.mktemp("tiled"))[1]


def images(network, count):
    return real_images(network, integer_images(network, 0, count)[:count])


def kill(dask, count):
    """Kill so many of the workers, and return all their addresses."""
    pids = dask.run(os.getpid)
    for pid in list(pids.values())[:count]:
        os.kill(pid, signal.SIGKILL)
    return set(pids)


def native_pids():
    """On a worker: its processes of the native library."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "fheconv.circuits.native.start" in child.cmdline():
                found.append(child.pid)
    return found


def expire_soon():
    """On a worker: keep no job open for long."""
    jobs.KEPT_SECONDS = 0.1


def until(true, seconds=30):
    """Wait until something holds; fail if it does not."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_nothing_is_lost_or_done_twice(
    network, circuit, file, dask, cluster, opened
):
    x = images(network, 10)
    results = {}
    for index, result in distributed.stream(file, circuit.evaluation_keys, circuit.encrypt(x), client=dask):
        assert index not in results
        results[index] = circuit.decrypt(result)[0]
        if len(results) == 1:
            first = kill(dask, 1)
    np.testing.assert_array_equal([results[index] for index in range(10)], network(x))
    assert set(opened().values()) == {1}
    dask.wait_for_workers(2)
    assert len(first & set(cluster.scheduler.workers)) == 1


@pytest.mark.slow
def test_images_that_share_a_ciphertext_travel_together(tiled, dask, tmp_path):
    lanes = tiled.circuit.cost.lanes
    client_file, server_file = tiled.circuit.save(tmp_path, lanes=lanes)
    client = fheconv.load_client(client_file)
    client.keygen()
    x = np.random.default_rng(0).integers(0, 4, (2 * lanes + 1, 1, 5, 5))
    result = distributed.run(server_file, client.evaluation_keys, client.encrypt(x), client=dask)
    assert len(result.values) == 3
    np.testing.assert_array_equal(client.decrypt(result), tiled.circuit.predict(x))


@pytest.mark.slow
def test_results_are_in_order_and_each_worker_opens_the_circuit_once(
    tiled, tile_file, dask, cluster, opened, tmp_path
):
    x = np.random.default_rng(0).integers(0, 4, (9, 1, 5, 5))
    client = fheconv.load_client(tile_file.parent / "client.zip")
    client.keygen()
    client.evaluation_keys.save(tmp_path / "evaluation")
    keys = StoredKeys.of(tmp_path / "evaluation")
    expected = tiled.circuit.predict(x)
    encrypted = client.encrypt(x)
    result = distributed.run(tile_file, keys, encrypted, client=dask)
    np.testing.assert_array_equal(client.decrypt(result), expected)
    assert opened() == dict.fromkeys(dask.run(os.getpid), 1)
    pids = dask.run(native_pids)
    several = [client.encrypt(x[:3]), client.encrypt(x[3]), client.encrypt(x[:0])]
    results = distributed.run(tile_file, keys, several, client=dask)
    assert [result.images for result in results] == [3, 1, 0]
    assert distributed.run(tile_file, keys, several[2], client=dask).images == 0
    np.testing.assert_array_equal(client.decrypt(results[0]), expected[:3])
    np.testing.assert_array_equal(client.decrypt(results[1]), expected[3])
    assert opened() == dict.fromkeys(dask.run(os.getpid), 1)  # the calls after the first found it open
    assert dask.run(native_pids) == pids
    client.keygen()
    server = fheconv.load_server(tile_file)
    distributed.run(server, client.evaluation_keys, client.encrypt(x), client=dask)
    assert opened() == dict.fromkeys(dask.run(os.getpid), 2)  # other keys are another job
    until(lambda: {*map(len, dask.run(native_pids).values())} == {1})  # and the job before is let go
    dask.run(expire_soon)
    distributed.run(tile_file, client.evaluation_keys, client.encrypt(x), client=dask)
    until(lambda: not any(dask.run(native_pids).values()))


@pytest.mark.slow
def test_tiles_of_a_photograph_even_when_all_workers_are_killed(tiled, tile_file, dask, opened):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 4, (1, 30, 33))
    read = []

    def tiles():
        for tile in tiled.encrypt(image):
            read.append(tile)
            yield tile

    def results():
        stream = distributed.stream(tile_file, tiled.circuit.evaluation_keys, tiles(), client=dask)
        for number, result in stream:
            if not killed:
                killed.update(kill(dask, 2))
                assert len(read) < tiled.tiles(image.shape[1:])
            yield number, result

    killed = set()
    y = tiled.decrypt(results(), image.shape[1:])
    np.testing.assert_array_equal(y, tiled.predict(image))
    assert set(opened()) - killed
    assert set(opened().values()) == {1}


@pytest.mark.slow
def test_what_kills_every_worker_is_an_error(tiled, tile_file, dask, cluster, monkeypatch):
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 0)
    monkeypatch.setattr(distributed, "run_job", lambda job, ciphertext: os.kill(os.getpid(), signal.SIGKILL))
    (encrypted,) = tiled.encrypt(np.zeros((1, 5, 5)))
    with pytest.raises(fheconv.ExecutionError, match="1 workers died"):
        distributed.run(tile_file, tiled.circuit.evaluation_keys, encrypted, client=dask)


@pytest.mark.slow
def test_what_fails_on_a_worker_is_the_error_that_it_is_here(tiled, tile_file, dask):
    encrypted = next(tiled.encrypt(np.zeros((1, 5, 5))))
    damaged = replace(encrypted, values=(encrypted.values[0][:-100],))
    with pytest.raises(fheconv.ExecutionError, match="Concrete failed during run_for"):
        distributed.run(tile_file, tiled.circuit.evaluation_keys, damaged, client=dask)


def test_workers_keep_to_the_limits_of_a_loaded_server(tiled, tile_file, dask, monkeypatch):
    submitted = []

    def submit(*arguments, **_):
        submitted.append(arguments)
        raise fheconv.ExecutionError("seen")

    monkeypatch.setattr(dask, "submit", submit)
    server = fheconv.load_server(tile_file, time_limit=60, memory_limit=2**30)
    arguments = tiled.circuit.evaluation_keys, next(tiled.encrypt(np.zeros((1, 5, 5))))
    with pytest.raises(fheconv.ExecutionError, match="seen"):
        list(distributed.stream(server, *arguments, client=dask))
    (job,) = submitted
    assert {"time_limit": 60, "memory_limit": 2**30} in job
    assert tile_file.read_bytes() in job


@pytest.mark.slow
def test_what_is_left_early_is_cancelled(tiled, tile_file, dask, cluster):
    stream = distributed.stream(
        tile_file, tiled.circuit.evaluation_keys, tiled.encrypt(np.zeros((1, 40, 40))), client=dask
    )
    next(stream)
    assert cluster.scheduler.tasks
    assert any(dask.run(native_pids).values())
    stream.close()
    until(lambda: not cluster.scheduler.tasks)
    until(lambda: dask.run(jobs.let_go) and not any(dask.run(native_pids).values()))  # of what was under way


def test_what_does_not_belong_together_is_refused_before_anything_is_sent(
    circuit, network, file, tiled, tile_file, dask, monkeypatch
):
    def submit(*_, **__):
        pytest.fail("something was sent")

    monkeypatch.setattr(dask, "submit", submit)
    keys, encrypted = circuit.evaluation_keys, circuit.encrypt(images(network, 2))
    others = fheconv.load_client(file.parent / "client.zip")
    others.keygen()
    wrong = [
        (tile_file, keys, encrypted, "keys belong to another circuit"),
        (file, tiled.circuit.evaluation_keys, encrypted, "keys belong to another circuit"),
        (file, others.evaluation_keys, encrypted, "other keys"),
        (file, keys, replace(encrypted, kind="output"), "output"),
        (file, keys, [encrypted, *tiled.encrypt(np.zeros((1, 5, 5)))], "another circuit"),
        (file, keys, [encrypted, 3], "not int"),
        (file, keys, 3, "not int"),
        (file, keys, replace(encrypted, values=(b"0" * 10**6,) * 2), "at most"),
        (file, "keys", encrypted, "not str"),
        (file.parent / "client.zip", keys, encrypted, "give the server.zip"),
    ]
    for server, these, ciphertexts, words in wrong:
        with pytest.raises(fheconv.ArtifactError, match=words):
            distributed.stream(server, these, ciphertexts, client=dask)
    with pytest.raises(fheconv.InvalidArgumentError, match="client='tcp"):
        distributed.stream(file, keys, encrypted, client="tcp://scheduler:8786")


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        (KilledWorker("task", SimpleNamespace(address="there"), 3), fheconv.ExecutionError, "4 workers died"),
        (CancelledError("lost"), fheconv.ExecutionError, "cluster must be alive"),
        (ModuleNotFoundError("fheconv"), fheconv.ExecutionError, "same versions"),
        (fheconv.CompilationError("too wide"), fheconv.CompilationError, "too wide"),
    ],
)
def test_what_dask_raises_has_its_place_in_the_tree_of_errors(
    raised, kind, words, tiled, tile_file, dask, monkeypatch
):
    monkeypatch.setattr(distributed, "wait", mock.Mock(side_effect=raised))
    arguments = tiled.circuit.evaluation_keys, tiled.encrypt(np.zeros((1, 5, 5)))
    with pytest.raises(kind, match=words):
        next(distributed.stream(tile_file, *arguments, client=dask))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed", [{"key_id": "other"}, {"images": 2, "batched": True}], ids=["keys", "images"]
)
def test_a_result_that_belongs_elsewhere_is_refused(changed, tiled, tile_file, dask, monkeypatch):
    (encrypted,) = tiled.encrypt(np.zeros((1, 5, 5)))
    other = replace(encrypted, kind="output", **changed)
    monkeypatch.setattr(Future, "result", lambda future: other.to_bytes())
    with pytest.raises(fheconv.ArtifactError, match="ciphertext 0 what belongs to another"):
        list(distributed.stream(tile_file, tiled.circuit.evaluation_keys, [encrypted], client=dask))


def test_a_job_that_comes_again_is_the_one_that_is_there():
    job = jobs.named_job("name", b"file", {}, {}, "digest")
    assert pickle.loads(pickle.dumps(job)) is job
    assert jobs.named_job("other", b"file", {}, {}, "digest") is not job


def test_a_cluster_that_is_gone_is_an_error(tiled, tile_file, cluster):
    (encrypted,) = tiled.encrypt(np.zeros((1, 5, 5)))
    with Client(cluster) as dask:
        stream = distributed.stream(tile_file, tiled.circuit.evaluation_keys, encrypted, client=dask)
    with pytest.raises(fheconv.ExecutionError, match="cluster must be alive"):
        next(stream)


def test_results_for_other_tiles_are_refused(tiled):
    image = np.zeros((1, 5, 9))
    results = [(number, tiled.circuit.run(tile)) for number, tile in enumerate(tiled.encrypt(image))]
    for wrong, words in ((results[:1], "1 tiles"), ([*results, results[0]], "two results for tile 0")):
        with pytest.raises(fheconv.ArtifactError, match=words):
            tiled.decrypt(wrong, (5, 9))
    np.testing.assert_array_equal(tiled.decrypt(results[::-1], (5, 9)), tiled.predict(image))


def test_without_dask_the_error_names_the_extra():
    child = subprocess.run([sys.executable, "-c", WITHOUT_DASK], capture_output=True, text=True)
    assert 'pip install "fheconv[distributed]"' in child.stdout, child.stderr
