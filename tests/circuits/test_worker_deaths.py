"""The worker dies amid a reply, its caller dies or forks, or it cannot start at all."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

import fheconv
from fheconv.circuits.native import process
from fheconv.circuits.native.process import Process
from fheconv.circuits.native.worker import Worker, worker

IMAGE = np.arange(64).reshape(1, 8, 8) % 9


def network(image=IMAGE):
    return fheconv.quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), image)


@pytest.fixture
def circuit():
    made = fheconv.compile(network(), fheconv.CompileConfig(lanes=1))
    made.keygen()
    return made


def is_there(pid):
    """A process that has ended and that nobody has waited for yet does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def folder_of(pid):
    """The folder in which a process works."""
    return os.readlink(f"/proc/{pid}/cwd")


def wait_for_the_end_of(pid, seconds):
    end = time.monotonic() + seconds
    while is_there(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_there(pid)


def run(script, *arguments, **environment):
    """Run a script in a process of its own. It must end, with status 0 or an assertion of its own."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# ------------------------------------------------------------------------------- it dies amid a reply


@pytest.mark.slow
def test_a_death_amid_a_reply_is_an_error_of_fheconv_and_the_next_call_works(circuit, monkeypatch):
    receive, pid = Connection.recv, worker().pid

    def killed_amid_the_reply(self):
        # The reply is larger than what the socket holds: a part of it is there, the rest never comes.
        assert self.poll(60)
        os.kill(pid, signal.SIGKILL)
        assert wait_for_the_end_of(pid, 10)
        return receive(self)

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "recv", killed_amid_the_reply)
        with pytest.raises(fheconv.ExecutionError, match="SIGKILL during encrypt; the next call starts"):
            circuit.encrypt(np.stack([IMAGE] * 4))
    assert circuit.verify(IMAGE).ok


@pytest.mark.parametrize("error", [OSError("got end of file during message"), ConnectionResetError, EOFError])
@pytest.mark.slow
def test_however_the_pipe_fails_the_error_is_typed(circuit, monkeypatch, error):
    def broken(self, *request):
        self.kill()
        raise error

    for step in ("send", "receive"):
        with monkeypatch.context() as patch:
            patch.setattr(Process, step, broken)
            with pytest.raises(fheconv.ExecutionError, match="SIGKILL during keygen"):
                circuit.keygen()


@pytest.mark.slow
def test_a_worker_whose_folder_somebody_removed_is_replaced():
    fheconv.compile(network())
    shutil.rmtree(folder_of(worker().pid))
    fheconv.compile(network())


# ------------------------------------------------------------------------------- its caller dies

# Each step takes many seconds, so that a worker that goes on until its reply is seen.
KILLED = """
import sys, numpy as np, torch, fheconv
from dataclasses import replace
from fheconv.circuits.native.worker import worker
step = sys.argv[1]
rng = np.random.default_rng(0)
torch.manual_seed(0)

def looking_up(size, bits, p_error):
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 1, 2))
    config = fheconv.QuantConfig(weight_bits=2, input_bits=2, activation_bits=2, accumulator_bits=bits)
    network = fheconv.quantize(module, rng.random((20, 1, size, size)), config)
    return fheconv.compile(network, fheconv.CompileConfig(p_error=p_error))

def linear(size):
    config = fheconv.QuantConfig(weight_bits=3, input_bits=3)
    return fheconv.quantize(rng.normal(size=(1, 1, 3, 3)), rng.random((1, 1, size, size)), config)

fheconv.compile(linear(4))
print(worker().pid, flush=True)
if step == "compile":
    network = linear(56)
    print("now", flush=True)
    fheconv.compile(network, fheconv.CompileConfig(engine="matrix"))
elif step == "keygen":  # it holds the GIL throughout
    circuit = looking_up(5, 7, 1e-6)
    print("now", flush=True)
    circuit.keygen()
elif step == "run":
    circuit = looking_up(40, 4, 0.01)
    circuit.keygen()
    encrypted = circuit.encrypt(np.zeros((1, 40, 40)))
    print("now", flush=True)
    circuit.run(encrypted)
else:
    network = linear(32)
    circuit = fheconv.compile(network, fheconv.CompileConfig(lanes=1))
    circuit.keygen()
    encrypted = circuit.encrypt(np.zeros((1, 32, 32)))
    result = circuit.run(encrypted)
    print("now", flush=True)
    if step == "encrypt":
        circuit.encrypt(np.zeros((200, 1, 32, 32)))
    else:
        circuit.decrypt(replace(result, images=2000, batched=True, values=result.values * 2000))
print("over", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, key generation ends first")
@pytest.mark.parametrize("step", ["compile", "keygen", "encrypt", "run", "decrypt"])
def test_no_worker_outlives_its_caller(step):
    caller = subprocess.Popen([sys.executable, "-c", KILLED, step], stdout=subprocess.PIPE, text=True)
    pid = int(caller.stdout.readline())
    assert caller.stdout.readline() == "now\n"
    time.sleep(0.5)  # the worker is amid the step
    assert is_there(pid)
    caller.kill()
    caller.wait()
    assert caller.stdout.read() == ""
    caller.stdout.close()
    assert wait_for_the_end_of(pid, 2)


STARTING = """
import os, signal, subprocess, sys, time
import fheconv
from fheconv.circuits.native import process
spawn = subprocess.Popen
def killed(*arguments, **options):
    pid = spawn(*arguments, **options).pid
    time.sleep(float(sys.argv[1]))
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    print(pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
subprocess.Popen = killed
process.Process()
"""


@pytest.mark.sampled(3)
@pytest.mark.parametrize("later", [0, 0.05, 0.2, 0.5, 1])
def test_a_worker_whose_caller_dies_while_it_starts_ends(later):
    """At first it has not even asked to be told of its caller's death, then it imports the library."""
    pid = int(run(STARTING, str(later)).stdout)
    assert wait_for_the_end_of(pid, 2)


@pytest.mark.slow
def test_the_end_of_the_thread_that_started_the_worker_does_not_end_the_worker():
    made = []
    alone = Worker()
    limit = fheconv.CompilationError, "compile", 0, network(), fheconv.CompileConfig(), 1
    thread = threading.Thread(target=lambda: made.append(alone.request(*limit)))
    thread.start()
    thread.join()
    pid = alone.pid
    time.sleep(0.3)
    assert is_there(pid)
    assert alone.request(*limit).fingerprint == made[0].fingerprint
    assert alone.pid == pid
    alone.stop()


@pytest.mark.slow
def test_a_worker_that_nobody_holds_ends():
    dropped = Worker()
    dropped.request(fheconv.ExecutionError, "release", [])
    pid, folder = dropped.pid, folder_of(dropped.pid)
    del dropped
    assert wait_for_the_end_of(pid, 10)
    assert not os.path.exists(folder)


# ------------------------------------------------------------------------------- its caller forks

FORKED = """
import os, signal, sys, threading, time, traceback
import numpy as np, fheconv
from fheconv.circuits.native.worker import worker

def is_waiting(thread):
    frames = traceback.walk_stack(sys._current_frames()[thread.ident])
    return any(frame.f_code.co_name == "receive" for frame, _ in frames)

image = np.arange(9).reshape(1, 3, 3)
network = fheconv.quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), image)
circuit = fheconv.compile(network)
circuit.keygen()
pid = worker().pid
busy = threading.Thread(target=circuit.keygen)
os.kill(worker().pid, signal.SIGSTOP)  # so that the thread stays in the middle of it
busy.start()
while not is_waiting(busy):
    time.sleep(0.01)
child = os.fork()
if child == 0:
    signal.alarm(60)
    assert circuit.verify(image).ok
    os._exit(3)
os.kill(worker().pid, signal.SIGCONT)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert status == 3, status
busy.join()
assert worker().pid == pid  # the child has not ended it
assert circuit.verify(image).ok
"""


@pytest.mark.slow
def test_a_fork_amid_a_call_of_another_thread_leaves_both_processes_their_circuit():
    done = run(FORKED)
    assert done.returncode == 0, done.stderr


LIVES_ON = """
import os, signal, sys, threading
import numpy as np, fheconv
from fheconv.circuits.native.worker import worker
fheconv.compile(fheconv.quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), np.arange(9).reshape(1, 3, 3)))
child = os.fork()
if child == 0:
    signal.pause()
print(worker().pid, child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_forked_child_does_not_keep_the_worker_of_its_dead_parent_alive():
    caller = subprocess.Popen([sys.executable, "-c", LIVES_ON], stdout=subprocess.PIPE, text=True)
    pid, child = map(int, caller.stdout.readline().split())
    caller.wait()
    caller.stdout.close()
    try:
        assert wait_for_the_end_of(pid, 2)
        assert is_there(child)
    finally:
        os.kill(child, signal.SIGKILL)


# ------------------------------------------------------------------------------- it cannot start


@pytest.mark.parametrize(
    ("executable", "words"),
    [
        (None, "sys.executable is None"),
        ("", "sys.executable is ''"),
        ("/nonexistent/python", "No such file"),
        ("/", "Permission denied"),
        ("/bin/true", "ended with status 0"),
        (b"/bin/true", "sys.executable is b'/bin/true'"),
    ],
)
def test_an_interpreter_that_is_none_is_named(monkeypatch, executable, words):
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(fheconv.CompilationError, match=rf"(?s){words}.*[Ss]et sys\.executable to"):
        Worker().request(fheconv.CompilationError, "compile")


def test_a_program_that_never_answers_is_given_up(monkeypatch, tmp_path):
    program = tmp_path / "embeds-python"
    program.write_text("#!/bin/sh\nsleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(process, "START_SECONDS", 0.5)
    with pytest.raises(fheconv.ExecutionError, match="did not answer within"):
        Worker().request(fheconv.ExecutionError, "keygen")


def test_without_a_temporary_folder_the_error_says_what_to_set(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    with pytest.raises(fheconv.ExecutionError, match=r"/nonexistent.*TMPDIR"):
        Worker().request(fheconv.ExecutionError, "keygen")


def test_where_no_temporary_folder_is_usable_the_error_says_what_to_set(monkeypatch):
    def none_is():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp', '/var/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none_is)
    with pytest.raises(fheconv.ExecutionError, match=r"No usable temporary directory.*TMPDIR"):
        Worker().request(fheconv.ExecutionError, "keygen")


NO_DESCRIPTORS = """
import os, resource, sys
import numpy as np, fheconv, fheconv.circuits.compiling
network = fheconv.quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), np.arange(9).reshape(1, 3, 3))
usual = resource.getrlimit(resource.RLIMIT_NOFILE)
before = sorted(os.listdir("/proc/self/fd"), key=int)
missed = 0
for more in range(12):
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(before[-1]) + more, usual[1]))
    error = None
    try:
        fheconv.compile(network)
    except fheconv.CompilationError as caught:
        error = str(caught)
    resource.setrlimit(resource.RLIMIT_NOFILE, usual)
    if error is None:
        break
    assert "ulimit -n" in error, error
    missed += 1
    assert sorted(os.listdir("/proc/self/fd"), key=int) == before  # none is left open
assert missed >= 4, missed
fheconv.compile(network)
"""


@pytest.mark.slow
def test_without_file_descriptors_the_error_says_so_however_many_are_missing():
    done = run(NO_DESCRIPTORS)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_without_threads_the_error_says_so(circuit, monkeypatch):
    def no_thread(self):
        raise RuntimeError("can't start new thread")

    limited = fheconv.compile(network(), fheconv.CompileConfig(time_limit=60))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(fheconv.ExecutionError, match="ulimit -u"):
            limited.keygen()
    limited.keygen()


GONE = """
import os, sys, tempfile
import numpy as np, fheconv
os.chdir(tempfile.mkdtemp())
os.rmdir(os.getcwd())
image = np.arange(9).reshape(1, 3, 3)
circuit = fheconv.compile(fheconv.quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), image))
circuit.keygen()
assert circuit.verify(image).ok
"""


@pytest.mark.slow
def test_a_deleted_working_folder_is_no_obstacle():
    import fheconv

    done = run(GONE, PYTHONPATH=str(Path(fheconv.__file__).parents[1]))
    assert done.returncode == 0, done.stderr


ADDRESSES = """
import resource, sys
import numpy as np, fheconv
image = np.arange(9).reshape(1, 3, 3)
network = fheconv.quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), image)
soft, hard = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (soft * 2**30, hard * 2**30 if hard else resource.RLIM_INFINITY))
try:
    circuit = fheconv.compile(network)
    circuit.keygen()
    circuit.predict(image, fhe=sys.argv[3])
except fheconv.FheConvError as error:
    print(type(error).__name__, error)
else:
    print("right")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit addresses")
@pytest.mark.parametrize("mode", ["simulate", "execute"])
@pytest.mark.parametrize("limit", [2, 3, 4])
@pytest.mark.slow
def test_a_run_without_the_addresses_it_needs_is_refused_and_does_not_hang(mode, limit):
    done = run(ADDRESSES, str(limit), str(limit), mode)
    assert done.stdout.startswith("ExecutionError"), done
    assert "ulimit -v" in done.stdout
    assert "memory_limit" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit addresses")
@pytest.mark.slow
def test_addresses_that_the_caller_may_allow_itself_are_allowed():
    assert run(ADDRESSES, "3", "0", "execute").stdout == "right\n"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit addresses")
def test_a_library_that_does_not_fit_into_the_addresses_is_named():
    done = run(ADDRESSES.replace("2**30", "2**29"), "1", "1", "execute")
    assert done.stdout.startswith("CompilationError"), done
    assert "ulimit -v" in done.stdout


def test_where_nothing_limits_addresses_nothing_is_refused():
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    assert fheconv.compile(network()).predict(IMAGE, fhe="simulate").shape == (1, 7, 7)
