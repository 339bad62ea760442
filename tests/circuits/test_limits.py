"""Limits of time and memory: what exceeds them is ended, says so, and leaves the circuit usable."""

import os
import signal
import subprocess
import time
from unittest import mock

import numpy as np
import pytest

import fheconv
from fheconv.circuits.native.protocol import Limits
from fheconv.circuits.native.worker import worker
from tests.support.layers import random_network, unlike_calibration

MEBI = 2**20


def square(size):
    """A network of one 3×3 filter on size×size images."""
    rng = np.random.default_rng(0)
    config = fheconv.QuantConfig(weight_bits=3, input_bits=3)
    return fheconv.quantize(rng.normal(size=(1, 1, 3, 3)), rng.random((1, 1, size, size)), config)


@pytest.fixture(scope="module")
def slow():
    """A circuit whose run takes a second or more."""
    circuit = fheconv.compile(square(40), fheconv.CompileConfig(engine="matrix"))
    circuit.keygen()
    return circuit


def limited(limits):
    """Give every request these limits, in place of those that its circuit was compiled with."""
    request = worker().request
    return mock.patch.object(
        worker(), "request", lambda *a, **more: request(*a, **{**more, "limits": limits})
    )


@pytest.mark.slow
def test_a_compilation_over_its_time_is_ended():
    start = time.monotonic()
    with pytest.raises(
        fheconv.CompilationError, match=r"compile took longer than time_limit=1\.5 seconds. Raise.*smaller"
    ):
        fheconv.compile(square(48), fheconv.CompileConfig(engine="matrix", time_limit=1.5))
    assert time.monotonic() - start < 20  # with the start of a worker, and lowering
    assert worker().pid is None
    circuit = fheconv.compile(square(8), fheconv.CompileConfig(time_limit=60))
    circuit.keygen()
    assert circuit.verify(unlike_calibration(circuit.network, 0)).ok


@pytest.mark.slow
def test_a_run_over_its_time_is_ended_and_goes_through_with_more(slow):
    x = unlike_calibration(slow.network, 1)
    encrypted = slow.encrypt(x)
    with (
        limited(Limits(seconds=0.05)),
        pytest.raises(fheconv.ExecutionError, match=r"run took longer than time_limit=0\.05.*smaller"),
    ):
        slow.run(encrypted)
    np.testing.assert_array_equal(slow.decrypt(slow.run(encrypted)), slow.network(x))


@pytest.mark.slow
@pytest.mark.parametrize("images", [1, 400])
@pytest.mark.parametrize("step", ["keygen", "encrypt"])
def test_a_worker_that_never_answers_is_ended(step, images):
    """Whether the caller waits for the reply or, with a large request, still for it to be taken."""
    network, _, _ = random_network(7)
    circuit = fheconv.compile(network, fheconv.CompileConfig(time_limit=60, lanes=1))
    circuit.keygen()
    x = unlike_calibration(network, 2, images)
    os.kill(worker().pid, signal.SIGSTOP)
    with (
        limited(Limits(seconds=1)),
        pytest.raises(fheconv.ExecutionError, match=f"{step} took longer than time_limit=1 seconds"),
    ):
        circuit.keygen() if step == "keygen" else circuit.encrypt(x)
    assert circuit.verify(x[:1]).ok


@pytest.mark.slow
def test_starting_the_worker_does_not_count(monkeypatch):
    """By a clock that gains 1000 seconds while the worker starts."""
    gained, clock = [0], time.monotonic

    class SlowStart(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            gained[0] += 1000

    monkeypatch.setattr(time, "monotonic", lambda: clock() + gained[0])
    monkeypatch.setattr(subprocess, "Popen", SlowStart)
    worker().stop()
    fheconv.compile(square(5), fheconv.CompileConfig(time_limit=60))
    assert gained == [1000]


@pytest.mark.slow
def test_a_compilation_over_its_memory_is_ended():
    limit = 100 * MEBI
    with pytest.raises(
        fheconv.CompilationError, match=rf"during compile it held [\d,]+ bytes.*memory_limit={limit:,}. Raise"
    ):
        fheconv.compile(square(48), fheconv.CompileConfig(engine="matrix", memory_limit=limit))
    circuit = fheconv.compile(square(8), fheconv.CompileConfig(memory_limit=limit))
    circuit.keygen()
    assert circuit.verify(unlike_calibration(circuit.network, 3)).ok


@pytest.mark.slow
def test_an_encryption_over_its_memory_is_ended_and_fewer_images_go_through():
    # One image takes half of that, and under load a little more.
    circuit = fheconv.compile(square(64), fheconv.CompileConfig(memory_limit=600 * MEBI))
    circuit.keygen()
    one = unlike_calibration(circuit.network, 4)
    before = circuit.encrypt(one)
    with pytest.raises(fheconv.ExecutionError, match=r"during encrypt it held.*fewer images"):
        circuit.encrypt(np.repeat(one, 80, axis=0))  # of 21 MB each
    np.testing.assert_array_equal(circuit.decrypt(circuit.run(before)), circuit.network(one))


@pytest.mark.slow
def test_a_worker_that_other_circuits_filled_is_replaced(slow):
    """A limit is for the circuit that has it, not for what others left in the process."""
    slow.verify(unlike_calibration(slow.network, 5))
    full = worker().pid
    circuit = fheconv.compile(square(6), fheconv.CompileConfig(memory_limit=80 * MEBI))
    circuit.keygen()
    assert circuit.verify(unlike_calibration(circuit.network, 6)).ok
    assert worker().pid != full


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "1", True, [1]])
def test_time_limits_without_meaning_are_refused(value):
    with pytest.raises(fheconv.InvalidArgumentError, match="time_limit"):
        fheconv.CompileConfig(time_limit=value)


@pytest.mark.parametrize("value", [0, -1, 1.5, float("nan"), "1", True])
def test_memory_limits_without_meaning_are_refused(value):
    with pytest.raises(fheconv.InvalidArgumentError, match="memory_limit"):
        fheconv.CompileConfig(memory_limit=value)


@pytest.mark.parametrize("limit", [{"time_limit": 1.0}, {"memory_limit": 2**30}])
def test_limits_in_process_are_refused(limit):
    with pytest.raises(fheconv.InvalidArgumentError, match="in_process"):
        fheconv.CompileConfig(in_process=True, **limit)


def test_memory_limits_are_refused_where_nothing_can_enforce_them(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(fheconv.InvalidArgumentError, match="darwin"):
        fheconv.CompileConfig(memory_limit=2**30)
