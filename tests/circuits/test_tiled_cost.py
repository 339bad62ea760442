"""What an image costs that runs tile by tile."""

from dataclasses import replace

import numpy as np
import pytest

import fheconv
from fheconv.circuits.cost import TiledCost

WEIGHT = np.array([[1.0, -1.0], [2.0, 0.0]])


@pytest.fixture(scope="module")
def tiled():
    image = np.arange(30).reshape(1, 5, 6) % 9
    network = fheconv.quantize(WEIGHT, image)
    return fheconv.compile_tiled(network, (2, 2), fheconv.CompileConfig(engine="conv"))


def test_the_cost_is_the_total_of_the_image(tiled):
    cost = tiled.cost
    assert cost == tiled.cost_of((5, 6))
    assert cost.tile == tiled.circuit.cost
    assert cost.tiles == 2 * 3  # 4 by 5 outputs
    assert cost.multiply_adds == 6 * (2 * 2) * (2 * 2)
    assert cost.complexity == 6 * cost.tile.complexity
    assert cost.key_bytes == cost.sent_key_bytes == 0


def test_the_bytes_are_those_that_are_sent(tiled):
    tiled.keygen()
    image = np.arange(63).reshape(1, 9, 7) % 9
    cost, encrypted = tiled.cost_of(image.shape[1:]), list(tiled.encrypt(image))
    results = [tiled.circuit.run(tile) for tile in encrypted]
    assert cost.tiles == len(encrypted)
    header = 4096 * len(encrypted)
    assert 0 <= sum(len(value) for tile in encrypted for value in tile.values) - cost.input_bytes < header
    assert 0 <= sum(len(value) for tile in results for value in tile.values) - cost.output_bytes < header


def test_tiles_that_share_a_ciphertext_are_counted_once(tiled):
    lanes = tiled.cost.tile.lanes
    assert lanes > 1
    for tiles, ciphertexts in ((lanes, 1), (lanes + 1, 2), (3 * lanes, 3)):
        assert TiledCost(tile=tiled.cost.tile, tiles=tiles).ciphertexts == ciphertexts


def test_seconds_are_those_of_all_tiles(tiled):
    timed = TiledCost(tile=replace(tiled.cost.tile, seconds=0.5), tiles=6)
    assert timed.seconds == 3.0
    assert "3 s" in str(timed)
    unknown = TiledCost(tile=replace(tiled.cost.tile, seconds=None), tiles=6)
    assert unknown.seconds is None
    assert unknown.to_dict()["seconds"] is None


def test_it_says_the_total_and_each_tile(tiled):
    said = str(tiled.cost)
    assert "6 in 2 ciphertexts" in said
    assert "Cost of one image, tile by tile" in said
    assert "Cost of one encrypted image" in said  # the table of the tile
    assert tiled.cost.to_dict()["tile"] == tiled.cost.tile.to_dict()
    assert tiled.cost.to_dict()["multiply_adds"] == tiled.cost.multiply_adds


@pytest.mark.parametrize("spatial", [(5,), (5, 6, 7), (5, 0), (5, -1), (5, 1), (5, 6.5), "ab", None])
def test_sizes_without_an_output_are_refused(tiled, spatial):
    with pytest.raises(fheconv.InvalidArgumentError):
        tiled.cost_of(spatial)
