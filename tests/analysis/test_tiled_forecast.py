"""What is forecast of an image that runs tile by tile is what compiling and running say."""

import os
import threading

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image
from torch import nn

import fheconv
from fheconv.circuits.native.process import memory
from fheconv.circuits.native.worker import worker

PHOTOGRAPH = load_sample_image("flower.jpg")[100:148, 200:248].transpose(2, 0, 1) / 255


def first_layer(channels):
    """The first convolution of a ResNet, with random weights."""
    torch.manual_seed(0)
    return fheconv.quantize(nn.Conv2d(3, channels, 7, 2, 3, bias=False), PHOTOGRAPH[None])


@pytest.mark.slow
@pytest.mark.parametrize("config", [fheconv.CompileConfig(), fheconv.CompileConfig(lanes=2, p_error=1e-9)])
@pytest.mark.parametrize("tile", [4, (8, 3)])
def test_the_costs_are_those_that_compiling_tells(tile, config):
    network = first_layer(4)
    forecast, tiled = network.forecast(config, tile=tile), fheconv.compile_tiled(network, tile, config)
    assert (forecast.tiles, forecast.ciphertexts) == (tiled.cost.tiles, tiled.cost.ciphertexts)
    assert forecast.lanes == tiled.cost.tile.lanes
    assert forecast.complexity == pytest.approx(tiled.cost.complexity, rel=0.01)


@pytest.mark.slow
def test_a_photograph_runs_within_the_memory_that_was_forecast():
    network = first_layer(64)
    forecast, tiled = network.forecast(tile=8), fheconv.compile_tiled(network, 8)
    tiled.keygen()
    process = worker()
    before, held, done = memory(os.getpid()) + memory(process.pid), [], threading.Event()

    def watch():
        while not done.wait(0.02):
            held.append(memory(os.getpid()) + memory(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        results = tiled.predict(PHOTOGRAPH, fhe="execute")
    finally:
        done.set()
        watcher.join()
    np.testing.assert_array_equal(results, network(PHOTOGRAPH[None])[0])
    # What earlier tests needed, both processes keep, and use again.
    assert max(held) - before <= 1.25 * forecast.memory


def test_it_says_all_of_the_image():
    network = fheconv.quantize(np.ones((3, 3)), np.arange(35).reshape(1, 5, 7) % 16)
    forecast = network.forecast(tile=2)
    assert forecast.tiles == 2 * 3
    assert f"6 in {forecast.ciphertexts} ciphertexts" in str(forecast)
    assert forecast.complexity == 6 * forecast.tile.complexity
    assert forecast.to_dict()["tile"] == forecast.tile.to_dict()
    assert forecast.to_dict()["complexity"] == forecast.complexity


def test_networks_of_several_layers_have_no_tiles():
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Conv2d(2, 1, 2))
    network = fheconv.quantize(net, np.random.default_rng(0).uniform(size=(8, 1, 5, 5)))
    with pytest.raises(fheconv.InvalidArgumentError, match="single convolution"):
        network.forecast(tile=2)
