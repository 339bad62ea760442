"""The native library dies, hangs and is interrupted in its own process; the user's goes on."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import fheconv
from fheconv.circuits.native.worker import Worker, worker
from tests.support.layers import random_network, unlike_calibration, with_weight


@pytest.fixture
def circuit():
    network, _, _ = random_network(7)
    circuit = fheconv.compile(network)
    circuit.keygen()
    return circuit


def test_a_death_of_the_library_is_an_execution_error_and_the_circuit_stays_usable(circuit):
    x = unlike_calibration(circuit.network, 0)
    encrypted = circuit.encrypt(x)
    os.kill(worker().pid, signal.SIGKILL)
    with pytest.raises(fheconv.ExecutionError, match="SIGKILL during run"):
        circuit.run(encrypted)
    # A new worker, the same keys: what was encrypted before the death still decrypts.
    np.testing.assert_array_equal(circuit.decrypt(circuit.run(encrypted)), circuit.network(x))


class Abort:
    """An argument on which whoever receives it aborts, after words on standard error."""

    def __reduce__(self):
        return exec, ("import os; os.write(2, b'LLVM ERROR: no such width\\n'); os.abort()",)


@pytest.mark.slow
def test_an_abort_in_compile_is_a_compilation_error_with_the_librarys_last_words():
    """No network within int64 was found on which the native compiler still aborts: it is made to."""
    dying = Worker()
    with pytest.raises(fheconv.CompilationError, match=r"(?s)SIGABRT during compile.*: LLVM ERROR: no such"):
        dying.request(fheconv.CompilationError, "compile", Abort())
    network, _, _ = random_network(7)
    dying.request(fheconv.CompilationError, "compile", 0, network, fheconv.CompileConfig(), 1)
    dying.stop()


@pytest.mark.slow
def test_without_a_linker_it_is_said_what_to_install(monkeypatch, tmp_path, circuit):
    """Slim images for containers have none, and Concrete only says that a command failed."""
    _, server_file = circuit.save(tmp_path / "saved")
    monkeypatch.setenv("PATH", str(tmp_path))
    without = Worker()
    with pytest.raises(fheconv.CompilationError, match=r"no ld and no ar.*apt-get install binutils"):
        fheconv.load_server(server_file, session=without)
    arguments = circuit.network, circuit.config, 1
    for method in ("compile", "compile_stages"):
        with pytest.raises(fheconv.CompilationError, match="no ld and no ar"):
            without.request(fheconv.CompilationError, method, 0, *arguments)
    without.stop()


@pytest.mark.sampled(5)
@pytest.mark.parametrize("bits", [50, 59, 62])
@pytest.mark.parametrize("engine", ["conv", "matrix", "shifts"])
def test_weights_far_past_what_concrete_holds_are_an_error_without_the_guard_too(monkeypatch, bits, engine):
    monkeypatch.setattr("fheconv.lowering.together.LINEAR_LIMIT", 1000)
    network = fheconv.quantize(
        np.ones((1, 1, 1, 1)), np.array([[[0, 1], [1, 0]]]), fheconv.QuantConfig(input_bits=1)
    )
    with pytest.raises(fheconv.CompilationError):
        fheconv.compile(with_weight(network, 2**bits), fheconv.CompileConfig(engine=engine))


def test_a_failure_in_compile_leaves_other_networks_to_compile(monkeypatch):
    network, _, _ = random_network(7)
    monkeypatch.setattr("fheconv.lowering.together.LINEAR_LIMIT", 1000)
    with pytest.raises(fheconv.CompilationError):
        fheconv.compile(with_weight(network, 2**52))
    fresh = fheconv.compile(network)
    fresh.keygen()
    assert fresh.verify(unlike_calibration(network, 1)).ok


@pytest.mark.slow
def test_every_circuit_is_restored_in_a_new_worker(circuit):
    network, _, _ = random_network(8)
    other = fheconv.compile(network)
    other.keygen()
    worker().stop()
    for each in (other, circuit):
        assert each.verify(unlike_calibration(each.network, 2)).ok


@pytest.mark.slow
def test_an_interruption_ends_the_worker_and_the_next_call_goes_on(circuit):
    """Ctrl-C while the worker is busy: KeyboardInterrupt comes at once, not when the call ends."""
    pid = worker().pid
    os.kill(pid, signal.SIGSTOP)  # a worker that never answers
    # Whoever starts pytest in the background has it ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            circuit.keygen()
    finally:
        signal.signal(signal.SIGINT, before)
    assert worker().pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert circuit.verify(unlike_calibration(circuit.network, 3)).ok


CHILD = """
import os, signal, sys, numpy as np, fheconv
from fheconv.circuits.native.worker import worker
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts it may have it ignored
rng = np.random.default_rng(0)
step = sys.argv[1]
x = rng.random((1, 1, 40, 40))
config = fheconv.QuantConfig(weight_bits=3, input_bits=3)
network = fheconv.quantize(rng.normal(size=(1, 1, 3, 3)), x, config)
circuit = fheconv.compile(network, fheconv.CompileConfig(engine="matrix" if step == "run" else "conv"))
circuit.keygen()
encrypted = circuit.encrypt(x)
if step == "keygen":  # it takes no time without lookups
    os.kill(worker().pid, signal.SIGSTOP)
print("now", flush=True)
try:
    circuit.run(encrypted) if step == "run" else circuit.keygen()
except KeyboardInterrupt:
    assert worker().pid is None
    assert (circuit.decrypt(circuit.run(encrypted)) == network(x)).all()
    sys.exit(7)
"""


@pytest.mark.parametrize("step", ["run", "keygen"])
@pytest.mark.slow
def test_ctrl_c_in_a_script_leaves_it_its_circuit_its_keys_and_its_exit_status(step):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, step], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "now\n", child.stderr.read()
    time.sleep(0.3)  # the run takes more than a second
    child.send_signal(signal.SIGINT)
    _, words = child.communicate(timeout=120)
    assert child.returncode == 7, words


def test_keys_that_an_interrupted_keygen_had_made_are_not_used(circuit, monkeypatch):
    """The worker has new keys, the caller was interrupted before it got hold of them."""
    x = unlike_calibration(circuit.network, 5)
    encrypted = circuit.encrypt(x)
    request = Worker.request

    def interrupted(*arguments, **limits):
        request(*arguments, **limits)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "request", interrupted)
        with pytest.raises(KeyboardInterrupt):
            circuit.keygen()
    np.testing.assert_array_equal(circuit.decrypt(circuit.run(encrypted)), circuit.network(x))


@pytest.mark.slow
def test_threads_that_find_the_worker_dead_all_get_the_keys_back(circuit):
    x = unlike_calibration(circuit.network, 6, 8)
    expected = circuit.network(x)
    for _ in range(3):
        os.kill(worker().pid, signal.SIGKILL)
        worker().stop()
        right: list[bool] = []

        def predict(i, right=right):
            right.append((circuit.predict(x[i], fhe="execute") == expected[i]).all())

        threads = [threading.Thread(target=predict, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert right == [True] * 8


def test_ctrl_c_on_the_terminal_does_not_reach_the_worker(circuit):
    assert os.getsid(worker().pid) != os.getsid(0)


@pytest.mark.slow
def test_the_worker_ends_with_its_process():
    script = (
        "from tests.support.layers import random_network\n"
        "import fheconv\n"
        "from fheconv.circuits.native.worker import worker\n"
        "fheconv.compile(random_network(7)[0])\n"
        "print(worker().pid, flush=True)\n"
        "import os, signal\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    pid = int(child.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail(f"worker {pid} is still there")


def test_circuits_that_nobody_holds_are_released():
    network, _, _ = random_network(9)
    first, second = fheconv.compile(network), fheconv.compile(network)
    gc.collect()
    before = len(worker().released)
    del first
    assert len(worker().released) == before + 1
    second.keygen()
    assert not worker().released


def test_requests_from_many_threads_do_not_mix(circuit):
    x = unlike_calibration(circuit.network, 4, 6)
    expected = circuit.network(x)
    results: dict[int, np.ndarray] = {}

    def predict(i: int) -> None:
        results[i] = circuit.predict(x[i], fhe="execute")

    threads = [threading.Thread(target=predict, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(np.stack([results[i] for i in range(6)]), expected)


def test_new_keys_in_one_thread_are_never_mixed_up_with_those_of_another():
    """Either all of it was done with one key set, or it is refused."""
    network, _, _ = random_network(11)
    circuit = fheconv.compile(network)
    circuit.keygen()
    x = unlike_calibration(network, 5, 5)
    expected, outcomes = network(x), []

    def predict() -> None:
        try:
            outcomes.append(bool((circuit.predict(x, fhe="execute") == expected).all()))
        except fheconv.ArtifactError as error:
            outcomes.append("other keys" in str(error))

    threads = [threading.Thread(target=target) for target in [predict, circuit.keygen] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [True] * 4


def test_a_worker_that_cannot_start_says_why(monkeypatch, tmp_path):
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\necho the library is missing >&2\nexit 3\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    with pytest.raises(fheconv.ExecutionError, match=r"ended with status 3.*the library is missing"):
        Worker().request(fheconv.ExecutionError, "keygen", 0)


def test_the_callers_process_imports_neither_torch_nor_concrete():
    script = (
        "import sys, numpy as np, fheconv\n"
        "network = fheconv.quantize(np.ones((2, 2)), np.random.default_rng(0).random((1, 4, 4)))\n"
        "circuit = fheconv.compile(network)\n"
        "circuit.keygen()\n"
        "assert circuit.verify(np.zeros((1, 4, 4))).ok\n"
        "assert not {'torch', 'concrete'} & set(sys.modules), sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


FORKED = """
import os, sys
import numpy as np
import fheconv

network = fheconv.quantize(np.array([[1, -1], [2, 0]]), np.array([[[0, 3, 1], [2, 2, 0], [1, 1, 3]]]))
circuit = fheconv.compile(network)
circuit.keygen()
rng = np.random.default_rng(0)
circuit.predict(np.zeros((1, 3, 3), int), fhe="execute")
child = os.fork()
if child == 0:
    rng = np.random.default_rng(1)
right = True
for _ in range(10):
    x = rng.integers(0, 4, (1, 3, 3))
    right &= bool((circuit.predict(x, fhe="execute") == network(x)).all())
if child == 0:
    sys.exit(0 if right else 5)  # with its exit handlers, which must not end the parent's worker
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
x = rng.integers(0, 4, (1, 3, 3))
right &= bool((circuit.predict(x, fhe="execute") == network(x)).all())
sys.exit(status if status else 0 if right else 6)
"""


@pytest.mark.slow
def test_after_a_fork_each_process_has_a_worker_of_its_own():
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED]).returncode == 0
