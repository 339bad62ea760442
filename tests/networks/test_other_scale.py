"""Images on another scale than the calibration images': a warning, on every way into a circuit."""

import warnings

import numpy as np
import pytest
import torch

import fheconv

RNG = np.random.default_rng(0)
PHOTOGRAPHS = RNG.integers(0, 256, (4, 1, 6, 6)).astype(np.float64)
KERNEL = np.array([[1.0, 0.0, -1.0]])


def network(**options):
    return fheconv.quantize(KERNEL, PHOTOGRAPHS, fheconv.QuantConfig(**options))


def warned(call, *arguments):
    """The warnings that a call makes, without any that Python would leave out the second time."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call(*arguments)
    return [one for one in seen if issubclass(one.category, fheconv.InputScaleWarning)]


@pytest.mark.parametrize("bits", [1, 4, 8, 16])
@pytest.mark.parametrize("divisor", [16, 255, 25_500])
def test_a_batch_on_another_scale_is_warned_of_whatever_the_width(bits, divisor):
    made = network(input_bits=bits)
    (warning,) = warned(made, PHOTOGRAPHS / divisor)
    assert "[0, 255]" in str(warning.message)
    assert warning.filename == __file__
    assert warned(made, PHOTOGRAPHS[0] / divisor)


def test_images_of_16_grey_levels_as_0_to_1():
    digits = RNG.integers(0, 17, (5, 1, 6, 6)).astype(np.float32)
    made = fheconv.quantize(KERNEL, torch.tensor(digits))
    assert not warned(made, digits)
    assert warned(made, digits / 16)


def test_signed_images_are_measured_on_both_sides_of_zero():
    images = RNG.normal(0, 1, (4, 1, 6, 6))
    for signed in (False, True):
        made = fheconv.quantize(KERNEL, images, fheconv.QuantConfig(input_signed=signed))
        assert not warned(made, -np.abs(images) * 0.2)
        assert warned(made, images / 30)


@pytest.mark.parametrize(
    "images",
    [
        PHOTOGRAPHS,
        PHOTOGRAPHS / 4,
        np.zeros((1, 6, 6)),
        np.zeros((0, 1, 6, 6)),
        np.concatenate([PHOTOGRAPHS / 255, PHOTOGRAPHS[:1]]),
        np.where(np.arange(36).reshape(1, 6, 6) == 7, 40.0, 3.0),
    ],
    ids=["the same", "darker", "black", "none", "one bright image", "one bright pixel"],
)
def test_dark_images_are_no_false_alarm(images):
    assert not warned(network(), images)


def test_integers_that_fit_may_need_a_small_part_of_their_type():
    made = fheconv.quantize(KERNEL, np.arange(36).reshape(1, 6, 6) % 3, fheconv.QuantConfig(input_bits=8))
    assert made.input.integral
    assert not warned(made, np.ones((1, 6, 6), np.uint8))
    with pytest.raises(fheconv.InputRangeError, match="fraction"):
        made(PHOTOGRAPHS[0] / 255)


def test_calibration_images_are_held_against_the_range_that_was_given():
    images = PHOTOGRAPHS / 255
    config = fheconv.QuantConfig(input_range=(0, 255))
    assert warned(fheconv.quantize, KERNEL, images, config)
    assert not warned(fheconv.quantize, KERNEL, images)


def test_it_is_said_once_for_a_line_and_not_at_all_when_silenced():
    made = network()
    for action, times in (("default", 1), ("ignore", 0)):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter(action, fheconv.InputScaleWarning)
            for image in PHOTOGRAPHS:
                made(image / 255)
        assert len(seen) == times


@pytest.fixture(scope="module")
def circuit():
    made = fheconv.compile(network(), fheconv.CompileConfig(p_error=0.01))
    made.keygen()
    return made


@pytest.mark.parametrize("fhe", ["disable", "simulate", "execute"])
def test_predict_warns(circuit, fhe):
    assert len(warned(lambda: circuit.predict(PHOTOGRAPHS[0] / 255, fhe=fhe))) == 1


def test_encrypt_and_verify_warn(circuit):
    assert len(warned(circuit.encrypt, PHOTOGRAPHS[0] / 255)) == 1
    assert len(warned(circuit.verify, PHOTOGRAPHS[0] / 255)) == 1


def test_the_client_warns(circuit, tmp_path):
    client_file, _ = circuit.save(tmp_path)
    client = fheconv.load_client(client_file)
    client.keygen()
    assert len(warned(client.encrypt, PHOTOGRAPHS[0] / 255)) == 1


def test_tiles_of_an_image_warn_once():
    tiled = fheconv.compile_tiled(network(), 4)
    assert len(warned(tiled.predict, PHOTOGRAPHS[0] / 255)) == 1
    assert not warned(tiled.predict, PHOTOGRAPHS[0])
