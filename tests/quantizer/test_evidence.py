"""Few calibration images, or images that are alike, do not make a network wrong for others."""

import numpy as np
import pytest
import torch
from torch import nn

import fheconv
from fheconv.networks.quantization import Quantization
from fheconv.quantizer.evidence import PRIOR_IMAGES, Mixture, beside_others, independent_images

SHAPE = (1, 8, 8)
OTHERS = np.random.default_rng(7).uniform(0, 1, (200, *SHAPE))


def poor_calibrations():
    rng = np.random.default_rng(0)
    corners = np.full((4, *SHAPE), 0.5)
    corners[0, 0, 0, 0], corners[0, 0, 7, 7] = 0, 1
    one = rng.uniform(0, 1, (1, *SHAPE))
    one[0, 0, 0, :2] = 0, 1
    pixel = np.repeat(one, 20, axis=0)
    pixel[1:, 0, 3, 3] = rng.uniform(0, 1, 19)
    dark = rng.uniform(0, 0.05, (20, *SHAPE))
    dark[0, 0, 0, 0] = 1
    return {
        "grey but two pixels": corners,
        "black and white": np.stack([np.zeros(SHAPE), np.ones(SHAPE)]),
        "shades": np.broadcast_to(np.linspace(0, 1, 20)[:, None, None, None], (20, *SHAPE)),
        "one": one,
        "one pixel differs": pixel,
        "dark": dark,
        "a ramp": np.linspace(0, 1, 64).reshape(1, *SHAPE),
    }


POOR = poor_calibrations()


def error(module, images, others, **options):
    network = fheconv.quantize(module, images, fheconv.QuantConfig(**options))
    expected = module(torch.tensor(others, dtype=torch.float32)).detach().numpy()
    return np.sqrt(np.mean((network(others) - expected) ** 2)) / expected.std()


@pytest.mark.sampled(5)
@pytest.mark.parametrize("method", ["accumulator", "gptq"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", POOR)
def test_a_convolution_is_as_accurate_as_one_rounded_by_its_weights_alone(name, bits, method):
    torch.manual_seed(3)
    module = nn.Conv2d(1, 2, 3)
    widths = {"weight_bits": bits, "input_bits": bits}
    alone = error(module, POOR[name], OTHERS, method="mse", **widths)
    assert error(module, POOR[name], OTHERS, method=method, **widths) < 1.05 * alone


@pytest.mark.parametrize("images", [1, 3])
def test_so_is_a_network_of_few_images(images):
    """Its equalized channels would saturate, where images give them greater values than these few."""
    torch.manual_seed(2)
    module = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 4)
    )
    # Images of a dark half and a bright half: each lights other channels.
    rng = np.random.default_rng(1)
    angles = rng.uniform(0, 2 * np.pi, (300, 1, 1, 1))
    y, x = np.mgrid[-1:1:8j, -1:1:8j]
    stripes = 0.5 + 0.5 * np.sin(
        4 * (x * np.cos(angles) + y * np.sin(angles)) + rng.uniform(0, 6, angles.shape)
    )
    few, others = stripes[:images], stripes[images:]
    widths = {"weight_bits": 6, "input_bits": 6, "activation_bits": 6, "input_range": (0, 1)}
    alone = error(module, few, others, method="mse", **widths)
    assert error(module, few, others, **widths) < 1.1 * alone


def test_images_count_by_what_they_tell():
    rng = np.random.default_rng(0)
    noise = rng.uniform(0, 1, (30, 3, 8, 8))
    assert independent_images(noise) == pytest.approx(30, rel=0.05)
    assert independent_images(np.concatenate([noise, noise])) == independent_images(noise)
    assert independent_images(np.full((30, 3, 8, 8), 0.7)) == 1
    assert 1 < independent_images(noise[:1] + 0.01 * noise) < 1.1
    assert independent_images(1e200 * noise) == pytest.approx(independent_images(noise))
    assert independent_images(1e-200 * noise) == pytest.approx(independent_images(noise))


def test_the_covariance_is_that_of_a_mixture():
    rng = np.random.default_rng(0)
    seen, uniform = rng.normal(2, 1, (300, 3)) @ rng.normal(size=(3, 3)), rng.uniform(0, 1, (100, 3))
    moment, other = np.cov(seen.T, bias=True), np.cov(uniform.T, bias=True)
    apart = seen.mean(axis=0) - uniform.mean(axis=0)
    mixture = Mixture(np.diag(other), apart * np.sqrt(0.25), np.full(3, 0.75))
    mixed = mixture.covariance(moment)
    weights = rng.normal(size=(2, 3))
    with_sums = mixture.with_sums(moment @ (weights * np.sqrt(0.75)).T, weights)
    np.testing.assert_allclose(with_sums, mixed @ weights.T, rtol=1e-12)
    mixed += 0.25 * (other - np.diag(np.diag(other)))  # draws of the uniform inputs correlate a little
    np.testing.assert_allclose(mixed, np.cov(np.concatenate([seen, uniform]).T, bias=True), rtol=1e-12)


def test_the_report_says_which_layers_saw_few_images():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))
    nn.init.constant_(module[0].bias, 0.5)  # so that its activations are not zero for all images
    rich = np.random.default_rng(0).uniform(0, 1, (60, *SHAPE))
    assert "Calibration was poor" not in str(fheconv.quantize(module, rich).budget())
    report = fheconv.quantize(module, rich[:2]).budget()
    assert [layer.independent_images for layer in report.layers] == pytest.approx([2, 2], abs=0.5)
    text = " ".join(str(report).split())
    for layer in report.layers:
        assert f"{layer.name} {layer.independent_images:.1f}" in text.split("Calibration was poor")[1]
    assert all(
        layer.independent_images > PRIOR_IMAGES for layer in fheconv.quantize(module, rich).budget().layers
    )
    by_weights = fheconv.quantize(module, rich[:2], fheconv.QuantConfig(method="mse"))
    assert [layer.independent_images for layer in by_weights.budget().layers] == [None, None]


BLANK = {
    "one": np.full((1, *SHAPE), 0.5),
    "black": np.zeros((5, *SHAPE)),
    "equal": np.full((30, *SHAPE), 0.5),
    "nearly equal": 0.5 + 0.01 * np.random.default_rng(1).uniform(size=(30, *SHAPE)),
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", BLANK)
def test_windows_of_blank_images_hold_the_sums_of_others(name, seed):
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)
    )
    config = fheconv.QuantConfig(overflow="defined", rounding_bits=5, input_range=(0, 1))
    network = fheconv.quantize(module, BLANK[name], config)
    expected = module(torch.tensor(OTHERS, dtype=torch.float32)).detach().numpy()
    assert np.square(network(OTHERS) - expected).mean() < 0.5 * expected.var(axis=0).mean()
    assert max(network.outside(OTHERS).values()) < 0.2
    assert "Calibration was poor" in str(network.budget())


def test_random_images_stand_beside_blank_ones_only():
    quantization = Quantization(scale=1 / 15, zero_point=0, minimum=0, maximum=15)
    assert beside_others(OTHERS, quantization) is OTHERS
    images = beside_others(BLANK["equal"], quantization)
    np.testing.assert_array_equal(images[:PRIOR_IMAGES], BLANK["equal"][:PRIOR_IMAGES])
    assert (images >= 0).all()
    assert (images <= 1).all()
    assert independent_images(images) > PRIOR_IMAGES
