"""A server spreads the blocks of a staged image over its workers."""

import threading

import numpy as np
import pytest

import fheconv
from tests.support import serving
from tests.support.nets import quantized

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def network():
    return quantized(3, "conv", "conv", size=(1, 5, 5), accumulator_bits=5, activation_bits=2, input_bits=2)


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    made = tmp_path_factory.mktemp("circuit")
    circuit = fheconv.compile(network, fheconv.CompileConfig(p_error=1e-6), stages="layers", blocks=2)
    circuit.save(made)
    return made


@pytest.fixture
def images(network):
    low, high = network.input.real_range
    return np.random.default_rng(0).uniform(low, high, (2, *network.input_shape))


def test_the_blocks_of_a_stage_run_on_all_workers_at_once(network, folder, images, tmp_path, monkeypatch):
    run_block, both = fheconv.Server.run_block, threading.Barrier(2, timeout=60)
    handles = set()

    def meeting(self, keys, block, values):
        if block.stage < 2:
            both.wait()  # breaks unless the other block of the stage runs beside this one
            handles.add(id(self))
        return run_block(self, keys, block, values)

    monkeypatch.setattr(fheconv.Server, "run_block", meeting)
    server = fheconv.load_server(folder / "server.zip")
    with serving.serving(server, tmp_path, workers=2) as url:
        remote = fheconv.RemoteCircuit(url)
        remote.keygen()
        results = remote.decrypt(remote.run(remote.encrypt(images)), dequantize=False)
    np.testing.assert_array_equal(results, network.integers(images))
    assert len(handles) == 2


def test_a_block_that_fails_is_the_answer_and_the_server_goes_on(
    network, folder, images, tmp_path, monkeypatch
):
    run_block = fheconv.Server.run_block
    server = fheconv.load_server(folder / "server.zip")
    with serving.serving(server, tmp_path, workers=2) as url:
        remote = fheconv.RemoteCircuit(url)
        remote.keygen()
        encrypted = remote.encrypt(images[0])

        def failing(self, keys, block, values):
            if block.stage == 1:
                raise fheconv.ExecutionError("this block failed")
            return run_block(self, keys, block, values)

        monkeypatch.setattr(fheconv.Server, "run_block", failing)
        with pytest.raises(fheconv.ExecutionError, match="this block failed"):
            remote.run(encrypted)
        monkeypatch.undo()
        results = remote.decrypt(remote.run(encrypted), dequantize=False)
    np.testing.assert_array_equal(results, network.integers(images[0]))
