"""Compiling, running and dropping circuits leaves no folder, no process and no growth behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fheconv.circuits.native import folders

SCRIPT = """
import os, sys
from pathlib import Path
import numpy as np, fheconv, fheconv.circuits.circuit
from fheconv.circuits.native.worker import worker

temporary, files, mode, times = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
image = np.arange(9).reshape(1, 3, 3)
network = fheconv.quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), image)
config = fheconv.CompileConfig(in_process=mode == "in_process")


def compile_and_run():
    circuit = fheconv.compile(network, config)
    circuit.keygen()
    assert circuit.verify(image).ok
    circuit.predict(image, fhe="simulate")


def save_and_load():
    circuit = fheconv.compile(network, config)
    client_file, server_file = circuit.save(files)
    client, server = fheconv.load_client(client_file), fheconv.load_server(server_file)
    client.keygen()
    client.decrypt(server.run(client.encrypt(image), client.evaluation_keys))


def fail():
    fheconv.lowering.together.LINEAR_LIMIT = 1000  # so that it is left to Concrete to refuse the lanes
    try:
        fheconv.compile(network, fheconv.CompileConfig(lanes=12))
    except fheconv.CompilationError:
        return
    raise AssertionError("it compiles")


def count():
    return len(list(temporary.rglob("*")))


work = {"files": save_and_load, "failing": fail}.get(mode, compile_and_run)
work()
work()
before, descriptors = count(), len(os.listdir("/proc/self/fd"))
for _ in range(times):
    work()
assert count() <= before, sorted(temporary.rglob("*"))
assert len(os.listdir("/proc/self/fd")) <= descriptors
print(worker().pid, flush=True)
"""


def run(tmp_path, mode, times):
    temporary, files = tmp_path / "temporary", tmp_path / "files"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, temporary, files, mode, str(times)],
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list(temporary.iterdir()) == []
    pid = done.stdout.strip()
    assert pid == "None" or not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("mode", ["worker", "files", "failing", "in_process"])
@pytest.mark.slow
def test_a_few_circuits_leave_nothing(tmp_path, mode):
    run(tmp_path, mode, 3)


@pytest.mark.slow
def test_a_hundred_circuits_leave_nothing(tmp_path):
    run(tmp_path, "worker", 100)


REPEATED = """
import sys
import numpy as np, fheconv
from fheconv.circuits.native.process import memory
from fheconv.circuits.native.worker import worker

engine, everything = sys.argv[1], sys.argv[2] == "everything"
if engine == "lookups":
    from torch import nn

    images = np.random.default_rng(0).random((2, 1, 8, 8))
    image, model = images[0], nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Conv2d(1, 2, 3))
    network = fheconv.quantize(model, images, fheconv.QuantConfig(accumulator_bits=4))
    config = fheconv.CompileConfig(p_error=0.01)
else:
    image = np.arange(256).reshape(1, 16, 16) % 16
    network, config = fheconv.quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), image), None


def make():
    circuit = fheconv.compile(network, config)
    circuit.keygen()
    return circuit


def work():
    circuit = make() if everything else one
    encrypted = circuit.encrypt(image)
    result = circuit.run(encrypted)
    circuit.decrypt(result)
    handled = sum(map(len, (*encrypted.values, *result.values)))
    return handled + (len(circuit.evaluation_keys.payload) if everything else 0)


one = None if everything else make()
for _ in range(10):
    work()
pid, before = worker().pid, memory(worker().pid)
handled = sum(work() for _ in range(int(sys.argv[3])))
assert worker().pid == pid
print(before, handled, memory(pid))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, /proc does not tell the memory")
@pytest.mark.parametrize(("what", "times"), [("runs", 100), ("everything", 40)])
@pytest.mark.parametrize("engine", ["linear", "lookups"])
def test_a_hundred_more_runs_or_forty_circuits_leave_the_worker_its_size(engine, what, times):
    """Ciphertexts and keys that stayed would be ten times what is allowed here."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REPEATED, engine, what, str(times)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    before, handled, after = map(int, done.stdout.split())
    assert before > 2**25  # so it is told at all
    assert after - before < handled / 10


KILLED = """
import os, signal
from fheconv.circuits.native.process import Process
process = Process()
print(process.folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(folders.tempfile, "tempdir", str(tmp_path))
    return tmp_path


def old(path):
    """Make a folder look as if it was made some minutes ago."""
    then = time.time() - 10 * folders.YOUNG
    os.utime(path, (then, then))


@pytest.mark.slow
def test_the_folder_of_a_caller_that_was_killed_is_removed_by_the_next_worker(temporary):
    killed = subprocess.run(
        [sys.executable, "-c", KILLED],
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
    )
    folder = Path(killed.stdout.strip())
    assert folder.parent == temporary
    assert folder.is_dir()
    old(folder)
    _, lock = folders.make_folder()
    os.close(lock)
    assert not folder.exists()


def test_folders_of_living_callers_and_those_of_others_stay(temporary):
    living, lock = folders.make_folder()
    new = temporary / f"{folders.PREFIX}new"
    others = temporary / "fheconv-notes"
    target = temporary / "target"
    link = temporary / f"{folders.PREFIX}link"
    for folder in (new, others, target):
        folder.mkdir()
    link.symlink_to(target)
    for folder in (living, others, target):
        old(folder)
    os.close(folders.make_folder()[1])
    assert all(path.exists() for path in (Path(living), new, others, target, link))
    os.close(lock)
    os.close(folders.make_folder()[1])
    assert not Path(living).exists()
