"""Circuits in stages: the same integers and cost, and runs that go on where they ended."""

import os
import signal
import stat
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import digits
import fheconv
import train_tinycnn_digits
from fheconv.circuits.files.security import check_security
from fheconv.circuits.native.worker import Worker
from tests.support.nets import BLOCKS, quantized

CONFIG = fheconv.CompileConfig(p_error=1e-6)


def small():
    """A network with two layers of lookups."""
    return quantized(3, "conv", "conv", size=(1, 5, 5), accumulator_bits=5, activation_bits=2, input_bits=2)


@pytest.fixture(scope="module")
def circuit():
    made = fheconv.compile(small(), CONFIG, stages="layers", blocks=2)
    made.keygen()
    return made


@pytest.fixture
def images():
    network = small()
    low, high = network.input.real_range
    return np.random.default_rng(0).uniform(low, high, (2, *network.input_shape))


@pytest.fixture
def asked(monkeypatch):
    """The blocks that have run, in their order. At the block after `asked.fatal` others, the library dies."""
    request = Worker.request

    class Asked(list):
        fatal = None

    asked = Asked()

    def counted(self, failure, method, *arguments, **options):
        if method not in ("run", "run_for"):
            return request(self, failure, method, *arguments, **options)
        if len(asked) == asked.fatal:
            asked.fatal = None
            os.kill(self.pid, signal.SIGKILL)
        result = request(self, failure, method, *arguments, **options)
        asked.append(arguments[-1])
        return result

    monkeypatch.setattr(Worker, "request", counted)
    return asked


@pytest.mark.slow
def test_a_circuit_in_stages_costs_what_the_whole_costs(circuit):
    whole = fheconv.compile(small(), CONFIG)
    assert circuit.complexity == pytest.approx(whole.complexity, rel=0.1)
    for name in ("lookups", "input_bytes", "output_bytes", "multiply_adds", "layers"):
        assert getattr(circuit.cost, name) == getattr(whole.cost, name)
    assert circuit.cost.p_error <= CONFIG.p_error
    assert {block.stage for block in circuit.blocks} == set(range(len(small().layers)))


@pytest.mark.slow
@pytest.mark.parametrize("p_error", [1e-4, 0.01, 0.05])
def test_tinycnn_costs_the_same_where_sums_are_rounded(p_error, tmp_path):
    """Concrete wants to be able to read what is between stages. At p_error 0.01 this would cost more."""
    network = fheconv.quantize(train_tinycnn_digits.shipped(), digits.digits().train_images)
    config = fheconv.CompileConfig(p_error=p_error)
    whole = fheconv.compile(network, config)
    staged = fheconv.compile(network, config, stages="layers", blocks=2)
    assert staged.complexity <= 1.1 * whole.complexity
    assert staged.cost.p_error <= p_error
    assert staged.keyset == whole.keyset
    server = fheconv.load_server(staged.save(tmp_path)[1])
    assert (server.keyset, server.blocks) == (whole.keyset, staged.blocks)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_networks_of_every_kind_compile_in_stages(name):
    network = quantized(1, name, size=(1, 5, 5), accumulator_bits=6, activation_bits=2, input_bits=2)
    whole, staged = (fheconv.compile(network, CONFIG, stages=stages) for stages in (None, "layers"))
    if staged.cost.lookups == whole.cost.lookups:  # of the whole, Concrete leaves out layers without weights
        assert staged.complexity <= 1.1 * whole.complexity
    check_security(staged.specs)


def test_lookups_fail_as_seldom_in_all_stages_together_as_is_asked():
    staged = fheconv.compile(small(), fheconv.CompileConfig(global_p_error=1e-3), stages="layers", blocks=3)
    assert staged.cost.global_p_error <= 1e-3
    assert staged.cost.p_error * staged.cost.lookups <= 1.01e-3


@pytest.mark.slow
def test_encrypted_results_are_the_clear_integers(circuit, images):
    one = images[0]
    np.testing.assert_array_equal(circuit.predict(one, fhe="execute"), circuit.network(one))


@pytest.mark.slow
def test_lookups_fail_where_those_of_the_whole_do_under_its_keys():
    """The stages do the same sums and lookups, so even what goes wrong is equal."""
    whole = fheconv.compile(small(), fheconv.CompileConfig(p_error=0.4))
    whole.keygen()
    staged = fheconv.compile(small(), keys_of=whole, stages="layers", blocks=3)
    assert staged.cost.p_error == whole.cost.p_error
    low, high = small().input.real_range
    images = np.random.default_rng(1).uniform(low, high, (8, *small().input_shape))
    encrypted = whole.encrypt(images)
    expected = whole.decrypt(whole.run(encrypted), dequantize=False)
    result = staged.run(replace(encrypted, fingerprint=staged.fingerprint))
    np.testing.assert_array_equal(staged.decrypt(result, dequantize=False), expected)
    assert (expected != small().integers(images)).any()


def test_other_modes_give_the_clear_results(circuit, images):
    for fhe in ("disable", "simulate"):
        np.testing.assert_array_equal(circuit.predict(images, fhe=fhe), circuit.network(images))


@pytest.mark.slow
def test_lookups_of_two_kinds_are_simulated_and_so_are_stages_under_given_keys(circuit, images):
    """Under given keys, Concrete finds no parameters for lookups of two kinds."""
    network = quantized(8, depth=1, size=(1, 4, 4), accumulator_bits=4)
    low, high = network.input.real_range
    image = np.linspace(low, high, 16).reshape(network.input_shape)
    staged = fheconv.compile(network, CONFIG, stages="layers")
    np.testing.assert_array_equal(staged.predict(image, fhe="simulate"), network(image))
    given = fheconv.compile(small(), keys_of=circuit, stages="layers")
    np.testing.assert_array_equal(given.predict(images, fhe="simulate"), small()(images))


@pytest.mark.slow
def test_a_run_whose_native_process_is_killed_goes_on(circuit, images, asked):
    encrypted = circuit.encrypt(images)
    asked.fatal = len(circuit.blocks) + 2  # in mid-image, after one image
    with pytest.raises(fheconv.ExecutionError, match="next call starts a new one"):
        circuit.run(encrypted)
    result = circuit.run(encrypted)
    names = [block.name for block in circuit.blocks]
    assert asked == names + names
    expected = circuit.network.integers(images)
    np.testing.assert_array_equal(circuit.decrypt(result, dequantize=False), expected)


@pytest.mark.slow
def test_a_time_limit_ends_between_blocks_and_loses_nothing(circuit, images, asked, tmp_path):
    encrypted, keep = circuit.encrypt(images[0]), tmp_path / "kept"
    ended = 0
    while True:
        try:
            result = circuit.run(encrypted, keep=keep, time_limit=1e-9)
            break
        except fheconv.UnfinishedError:
            ended += 1
            assert stat.S_IMODE(keep.stat().st_mode) == 0o700
            assert {stat.S_IMODE(path.stat().st_mode) for path in keep.iterdir()} == {0o600}
            (keep / ".one.value.0123abcd").write_text("begun by a process that was killed")
    assert ended == len(circuit.blocks) - 1
    assert not keep.exists()
    assert asked == [block.name for block in circuit.blocks]
    expected = circuit.network.integers(images[0])
    np.testing.assert_array_equal(circuit.decrypt(result, dequantize=False), expected)


@pytest.mark.slow
def test_damaged_and_foreign_values_are_computed_anew(circuit, images, asked, tmp_path):
    keep, names = tmp_path / "kept", [block.name for block in circuit.blocks]
    one, other = circuit.encrypt(images[0]), circuit.encrypt(images[1])
    for encrypted in (one, other):
        with pytest.raises(fheconv.UnfinishedError):
            circuit.run(encrypted, keep=keep, time_limit=1e-9)
    first, second = sorted(keep.iterdir())
    first.write_bytes(second.read_bytes())  # whole, but of another image
    second.write_bytes(second.read_bytes()[:-1] + b"x")
    del asked[:]
    for encrypted, image in ((one, images[0]), (other, images[1])):
        result = circuit.run(encrypted, keep=keep)
        expected = circuit.network.integers(image)
        np.testing.assert_array_equal(circuit.decrypt(result, dequantize=False), expected)
    assert asked == names + names
    assert not keep.exists()


@pytest.mark.slow
def test_a_folder_of_others_is_refused(circuit, images, tmp_path):
    encrypted = circuit.encrypt(images[0])
    tmp_path.chmod(0o755)
    with pytest.raises(fheconv.ArtifactError, match="0755"):
        circuit.run(encrypted, keep=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(fheconv.ArtifactError, match="no folder"):
        circuit.run(encrypted, keep=tmp_path / "file")


IN_ANOTHER_PROCESS = """
import sys
import fheconv
server = fheconv.load_server(sys.argv[1])
keys, encrypted = fheconv.EvaluationKeys.load(sys.argv[2]), fheconv.Ciphertext.load(sys.argv[3])
try:
    server.run(encrypted, keys, keep=sys.argv[4], time_limit=float(sys.argv[5])).save(sys.argv[6])
except fheconv.UnfinishedError:
    print("unfinished")
"""


@pytest.mark.slow
def test_another_process_goes_on_from_a_folder_without_secret_keys(circuit, images, tmp_path):
    client_file, server_file = circuit.save(tmp_path)
    client = fheconv.load_client(client_file)
    client.keygen()
    client.evaluation_keys.save(tmp_path / "keys")
    encrypted = client.encrypt(images[0])
    encrypted.save(tmp_path / "image")
    names = (server_file, tmp_path / "keys", tmp_path / "image", tmp_path / "kept")
    for limit, said in (("1e-9", "unfinished"), ("600", "")):
        command = [sys.executable, "-c", IN_ANOTHER_PROCESS, *map(str, names), limit, tmp_path / "result"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == said
        assert (tmp_path / "kept").exists() == bool(said)
    result = fheconv.Ciphertext.load(tmp_path / "result")
    expected = circuit.network.integers(images[0])
    np.testing.assert_array_equal(client.decrypt(result, dequantize=False), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": "all"}, 'stages must be "layers"'),
        ({"blocks": 2}, 'stages must be "layers"'),
        ({"stages": "layers", "blocks": 0}, "blocks=0"),
    ],
)
def test_stages_that_there_cannot_be_are_refused(options, message):
    with pytest.raises(fheconv.InvalidArgumentError, match=message):
        fheconv.compile(small(), **options)


def test_a_network_without_lookups_has_no_stages():
    network = fheconv.quantize([[1, 2]], np.arange(16).reshape(1, 4, 4))
    with pytest.raises(fheconv.InvalidArgumentError, match="no stages"):
        fheconv.compile(network, stages="layers")


@pytest.mark.slow
@pytest.mark.parametrize("time_limit", [0, -1, float("nan"), "soon"])
def test_time_limits_that_are_none_are_refused(circuit, images, time_limit):
    with pytest.raises(fheconv.InvalidArgumentError, match="time_limit"):
        circuit.run(circuit.encrypt(images[0]), time_limit=time_limit)


def test_the_fingerprint_tells_stages_from_the_whole(circuit):
    others = fheconv.compile(small(), CONFIG), fheconv.compile(small(), CONFIG, stages="layers")
    assert len({circuit.fingerprint, *(other.fingerprint for other in others)}) == 3
