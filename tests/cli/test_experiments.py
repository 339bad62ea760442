"""Models that are tried before they are used: simulated, verified, tuned and fine-tuned."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

import fheconv
from fheconv.capture.checkpoint import load_model
from fheconv.tuning import trying
from tests.support import shell

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
MODEL = ("m.safetensors", "--calibration", "x.npy")
TESTED = ("--evaluation", "t.npy", "--labels", "y.npy")
BITS = {"weight_bits": 3, "activation_bits": 2, "input_bits": 3}
OPTIONS = [word for name, bits in BITS.items() for word in (f"--{name.replace('_', '-')}", str(bits))]


@pytest.fixture
def run(tmp_path, monkeypatch, ran):
    """Run the command in a folder with a model and data: its exit status and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    shell.write_network(tmp_path)
    rng = np.random.default_rng(0)
    np.save("x.npy", rng.random((30, 1, 3, 3)))
    np.save("t.npy", tested := rng.random((50, 1, 3, 3)))
    network = fheconv.quantize(load_model(Path("m.safetensors")), tested)
    np.save("y.npy", network.source(tested).argmax(axis=1))
    return ran


def in_python(p_error):
    network = fheconv.quantize(
        load_model(Path("m.safetensors")), np.load("x.npy"), fheconv.QuantConfig(**BITS)
    )
    return fheconv.compile(network, fheconv.CompileConfig(p_error=p_error))


def test_simulate_tells_the_accuracies_of_python(run):
    arguments = ["simulate", *MODEL, *TESTED, *OPTIONS, "--p-error", "1e-9"]
    status, printed, said = run(*arguments, "--json")
    assert (status, said) == (0, "")
    found, circuit = json.loads(printed), in_python(1e-9)
    x, y = np.load("t.npy"), np.load("y.npy")
    assert found["images"] == 50
    assert found["float"] == 1.0
    assert found["clear_integers"] == circuit.score(x, y) < 1
    assert found["simulated"] == circuit.score(x, y, fhe="simulate")
    for name in ("lookups", "p_error", "complexity"):
        assert found["cost"][name] == getattr(circuit.cost, name)
    status, printed, _ = run(*arguments)
    assert status == 0
    for share in (found["float"], found["clear_integers"], found["simulated"]):
        assert f"{share:.1%}" in printed
    assert circuit.cost.failures in printed


def test_verify_runs_images_encrypted(run):
    shell.write_model(Path())  # without lookups, whose keys take long
    arguments = ["verify", *MODEL, "--input", "x.npy", *OPTIONS]
    status, printed, _ = run(*arguments, "--json")
    found = json.loads(printed)
    assert (status, found["ok"], found["wrong"], found["values"]) == (0, True, 0, 6)
    status, printed, _ = run(*arguments, "--runs", "2")
    assert status == 0
    assert "12 of 12 encrypted results equal the clear integers" in printed


@pytest.mark.slow
def test_verify_fails_if_more_differs_than_the_promise_explains(run, monkeypatch):
    right = fheconv.FheCircuit.accumulate

    def wrong(self, q, fhe="disable"):
        return right(self, q, "disable") + (fhe == "execute")

    monkeypatch.setattr(fheconv.FheCircuit, "accumulate", wrong)
    shell.write_model(Path())
    status, printed, _ = run("verify", *MODEL, "--input", "x.npy", *OPTIONS)
    assert status == 1
    assert "MORE than" in printed


@pytest.mark.slow
def test_tune_prints_the_front_and_writes_the_cheapest(run):
    asked = "--max-drop", "0.2", "--objective", "complexity"  # seconds need not follow complexity
    status, printed, _ = run("tune", *MODEL, *TESTED, *asked, "-o", "out", "--json")
    assert status == 0
    found = json.loads(printed)
    assert found["float_accuracy"] == 1.0
    assert all(point["accuracy"] >= 0.8 and point["kind"] == "model" for point in found["front"])
    assert (found["controls"], found["beaten"]) == ([], 0)
    saved = fheconv.load_client("out/client.zip").cost
    assert saved.complexity == min(point["cost"]["complexity"] for point in found["front"])
    status, _, said = run("tune", *MODEL, *TESTED, "-o", "out")
    assert status == 2
    assert "--force" in said


@pytest.mark.slow
def test_tune_tries_students_and_trains_controls(run):
    training = "--training", "t.npy", "--training-labels", "y.npy", "--epochs", "1"
    asked = "--lookup-budget", "2", "--students", "--max-drop", "0.9"
    status, printed, _ = run("tune", *MODEL, *TESTED, *training, *asked, "--json")
    assert status == 0
    found = json.loads(printed)
    assert {point["kind"] for point in found["controls"]} == {"control"}
    assert found["controls"][0]["cost"]["lookups"] == 0
    assert {point["kind"] for point in found["front"]} <= {"model", "student"}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("calls", [1, 3])
def test_a_signal_ends_tune_with_what_it_has_found(run, monkeypatch, number, calls):
    right, called = trying.accuracies, []

    def interrupted(*arguments, **options):
        called.append(1)
        if len(called) == calls:
            os.kill(os.getpid(), number)
        return right(*arguments, **options)

    monkeypatch.setattr(trying, "accuracies", interrupted)
    before = {one: signal.signal(one, signal.default_int_handler) for one in SIGNALS}
    try:
        ended, printed, _ = run("tune", *MODEL, *TESTED, "--max-drop", "0.2", "-o", "out")
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert ended == 128 + number
    assert "Interrupted: not everything was tried." in printed
    assert Path("out/server.zip").exists() == (calls > 1)


def test_training_data_come_with_their_classes(run):
    status, _, said = run("tune", *MODEL, *TESTED, "--training", "x.npy")
    assert status == 2
    assert "--training-labels" in said


@pytest.mark.slow
def test_what_tune_found_is_written_when_nobody_reads_it(run, monkeypatch):
    def gone(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("fheconv.cli.experiments.out.print", gone)
    status, *_ = run("tune", *MODEL, *TESTED, "-o", "out")
    assert status == 1
    assert Path("out/server.zip").exists()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("labels", [True, False])
def test_finetune_writes_a_circuit(run, labels):
    arguments = ["finetune", *MODEL, "--training", "t.npy", "--epochs", "2", "-o", "out", *OPTIONS]
    arguments += ["--labels", "y.npy"] if labels else []
    status, printed, _ = run(*arguments, "--lookup-budget", "4", "--p-error", "1e-3")
    assert status == 0
    assert fheconv.load_server("out/server.zip").cost.lookups <= 4
    assert "Wrote out/client.zip and out/server.zip." in printed
    assert run(*arguments)[0] == 2
