import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image

import fheconv
from fheconv.circuits.native.worker import worker
from tests.support.layers import KINDS, random_network


def larger_image(network, seed, sizes):
    q = network.input
    integers = np.random.default_rng(seed).integers(
        q.minimum, q.maximum + 1, (network.input_shape[0], *sizes)
    )
    return (integers - q.zero_point) * q.scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(400, 412))
@pytest.mark.sampled(5)
def test_tiles_give_the_untiled_result_for_every_option(kind, seed):
    """In clear, through the very function that is compiled; images of another size than calibration's."""
    network, _, _ = random_network(seed, kind)
    rng = np.random.default_rng(seed)
    axes = len(network.input_shape) - 1
    tiled = fheconv.compile_tiled(network, rng.integers(1, 4, axes).tolist())
    sizes = [size + int(rng.integers(0, 6)) for size in network.input_shape[1:]]
    x = larger_image(network, seed, sizes)
    expected = network.accumulate(network.input.integers(x)[None])[0]
    np.testing.assert_array_equal(tiled.predict(x), network.dequantize(expected))
    assert tiled.tiles(sizes) >= 1


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"stride": 2, "padding": 2, "padding_mode": "reflect"},
        {"stride": (1, 3), "dilation": 2, "padding": (0, 2)},
    ],
)
def test_tiles_run_encrypted(options):
    torch.manual_seed(0)
    module = torch.nn.Conv2d(2, 2, 3, **options)
    calibration = torch.rand(2, 2, 8, 8)
    network = fheconv.quantize(module, calibration, fheconv.QuantConfig(weight_bits=3, input_bits=3))
    tiled = fheconv.compile_tiled(network, (4, 5))
    tiled.keygen()
    assert tiled.verify(larger_image(network, 0, (13, 16))).ok


@pytest.fixture
def tiled():
    network = fheconv.quantize(np.array([[1, -2], [0, 1]]), np.zeros((1, 8, 8), int))
    tiled = fheconv.compile_tiled(network, 4)
    tiled.keygen()
    return tiled


@pytest.fixture
def calls(tiled, monkeypatch):
    """The numbers of tiles in the calls of the circuit so far, the third of which is interrupted."""
    right, calls = tiled.circuit.accumulate, []

    def interrupted(q, fhe):
        calls.append(len(q))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(q, fhe)

    monkeypatch.setattr(tiled.circuit, "accumulate", interrupted)
    return calls


def test_an_interrupted_run_goes_on_where_it_stopped(tiled, calls):
    x = larger_image(tiled.network, 0, (14, 14))
    with pytest.raises(KeyboardInterrupt):
        tiled.predict(x, fhe="execute")
    assert sum(calls) == 12  # of 16 tiles, four a time, the third four without a result
    calls.extend([0] * 3)
    y = tiled.predict(x, fhe="execute")
    assert sum(calls[6:]) == 8
    np.testing.assert_array_equal(
        y, tiled.network.dequantize(tiled.network.accumulate(x.astype(int)[None])[0])
    )
    # A run that was finished starts anew, and so does one with another image.
    calls.clear()
    calls.extend([0] * 3)
    tiled.predict(x, fhe="execute")
    assert sum(calls) == 16


@pytest.mark.usefixtures("calls")
def test_what_was_interrupted_is_not_taken_for_another_image(tiled):
    x = larger_image(tiled.network, 1, (14, 14))
    with pytest.raises(KeyboardInterrupt):
        tiled.predict(x)
    other = larger_image(tiled.network, 2, (14, 14))
    expected = tiled.network.dequantize(tiled.network.accumulate(other.astype(int)[None])[0])
    np.testing.assert_array_equal(tiled.predict(other), expected)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((1, 1, 9, 9)), "one image"),
        (np.zeros((2, 9, 9)), "one image"),
        (np.full((1, 9, 9), 99), "outside the input range"),
        (np.full((1, 9, 9), np.nan), "finite"),
    ],
)
def test_images_that_cannot_be_tiled_are_refused(tiled, image, words):
    for step in (tiled.predict, tiled.verify):
        with pytest.raises(fheconv.InputRangeError, match=words):
            step(image)


def test_an_image_smaller_than_the_kernel_and_tiles_without_meaning_are_refused(tiled):
    with pytest.raises(fheconv.InvalidArgumentError, match="reaches over"):
        tiled.predict(np.zeros((1, 1, 9)))
    with pytest.raises(fheconv.InvalidArgumentError, match="tile=0"):
        fheconv.compile_tiled(tiled.network, 0)
    with pytest.raises(fheconv.InvalidArgumentError, match="Conv2d"):
        fheconv.compile_tiled(torch.nn.Conv2d(1, 1, 3))
    fresh = fheconv.compile_tiled(tiled.network, 4)
    with pytest.raises(fheconv.NotCompiledError, match="keygen"):
        fresh.predict(np.zeros((1, 9, 9)), fhe="execute")


@pytest.mark.slow
def test_a_photograph_of_512_pixels_runs_encrypted_within_4_gigabytes():
    photograph = load_sample_image("china.jpg").mean(axis=-1)
    image = np.pad(photograph[:, :512], ((0, 512 - len(photograph)), (0, 0)), mode="reflect")[None]
    torch.manual_seed(0)
    module = torch.nn.Conv2d(1, 1, 3, padding=1)
    config = fheconv.QuantConfig(weight_bits=3, input_bits=4, input_range=(0, 255))
    network = fheconv.quantize(module, image[:, :64, :64], config)
    tiled = fheconv.compile_tiled(network, 64)
    tiled.keygen()
    worker().stop()  # so that its peak is that of this run
    assert tiled.tiles(image.shape[1:]) == 64
    assert tiled.verify(image).ok
    with open(f"/proc/{worker().pid}/status") as status:
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    assert peak < 4 * 2**30 / 2  # the other half is for this process and the ciphertexts on their way
