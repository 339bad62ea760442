import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fheconv
from fheconv.capture.model import capture
from fheconv.networks.floats import Maximum
from fheconv.networks.quantization import CalibratedInput, Quantization
from fheconv.quantizer.activations import CLIPS, activation_quantizations, input_quantization
from tests.support.nets import quantized, random_net

IMAGE = Quantization(scale=1.0, zero_point=0, minimum=0, maximum=15, integral=True)


def chosen(module, images, **options):
    """The network of a module, its tensors in floats, and how each is quantized."""
    network = capture(module, images.shape[1:])
    tensors = network.tensors(images)
    return network, tensors, activation_quantizations(
        network, tensors, IMAGE, fheconv.QuantConfig(**options)
    )  # fmt: skip


def one_activation(activation):
    """A network whose only activation is this one, of the image itself."""
    conv = torch.nn.Conv2d(1, 1, 1, bias=False).double()
    torch.nn.init.ones_(conv.weight)
    return torch.nn.Sequential(conv, activation, torch.nn.Conv2d(1, 1, 1).double())


NETS = {
    "relu": one_activation(torch.nn.ReLU()),
    "tanh": one_activation(torch.nn.Tanh()),
    "leaky relu": one_activation(torch.nn.LeakyReLU(0.2)),
}
CAPTURED = {name: capture(module, (1, 4, 4)) for name, module in NETS.items()}


@given(
    st.sampled_from(sorted(NETS)), st.integers(0, 2**32), st.integers(1, 8), st.sampled_from([1e-6, 1.0, 1e6])
)
def test_the_scale_has_the_least_error_of_the_grid_and_zero_is_exact(name, seed, bits, unit):
    rng = np.random.default_rng(seed)
    images = rng.standard_t(2, (3, 1, 4, 4)) * unit
    network = CAPTURED[name]
    tensors = network.tensors(images)
    config = fheconv.QuantConfig(activation_bits=bits)
    _, found, last = activation_quantizations(network, tensors, IMAGE, config)
    assert last is None
    assert (found.minimum, found.maximum) == (0, 2**bits - 1)
    assert found.minimum <= found.zero_point <= found.maximum
    assert (found.nearest(np.zeros(1)) - found.zero_point) * found.scale == 0
    values = tensors[1].ravel()
    low, high = min(values.min(), 0), max(values.max(), 0)

    def error(scale):
        integers = np.clip(np.rint(values / scale + found.zero_point), 0, 2**bits - 1)
        return np.square((integers - found.zero_point) * scale - values).mean()

    grid = [error(clip * (high - low) / (2**bits - 1)) for clip in CLIPS]
    assert error(found.scale) <= min(grid) * (1 + 1e-12)


def test_activations_that_are_always_zero_get_some_scale():
    module = one_activation(torch.nn.ReLU())
    _, _, (_, found, _) = chosen(module, -np.ones((2, 1, 3, 3)))
    assert found == Quantization(scale=1.0, zero_point=0, minimum=0, maximum=15)


class Sum(torch.nn.Module):
    """Activations of different sizes, added as they are, through whatever `way` one of them takes."""

    def __init__(self, way, last=None):
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(1, 1, 1), torch.nn.Conv2d(1, 1, 1)
        with torch.no_grad():
            self.a.weight.fill_(1.0)
            self.b.weight.fill_(10.0)
            self.a.bias.zero_()
            self.b.bias.zero_()
        self.way = way
        self.last = last or torch.nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return self.last(torch.relu(torch.relu(self.a(x)) + self.way(torch.tanh(self.b(x)))))


@pytest.mark.parametrize(
    ("way", "shared"),
    [
        (torch.nn.Identity(), True),
        (torch.nn.MaxPool2d(3, stride=1, padding=1), True),
        (torch.nn.Conv2d(1, 1, 1), False),
    ],
)
def test_activations_that_are_added_as_they_are_share_a_scale(way, shared):
    images = np.random.default_rng(0).uniform(-1, 1, (4, 1, 4, 4))
    network, _, found = chosen(Sum(way).double(), images)
    a, b = (q for layer, q in zip(network.layers, found[1:], strict=True) if layer.sources == (0,))
    assert (a.scale == b.scale) == shared
    if shared:  # the greater of their own scales, at which the smaller one needs fewer integers
        assert sorted([a.maximum, b.maximum])[0] < sorted([a.maximum, b.maximum])[1] == 15


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", range(4))
def test_sums_of_activations_have_one_scale_in_every_network(seed):
    network = quantized(seed, "residual of activations", depth=1)
    found = network.quantizations
    added = [
        [term.source for term in layer.terms if term.is_plain()]
        for layer in network.source.layers
        if not isinstance(layer, Maximum)
    ]
    sums = [sources for sources in added if len(sources) > 1]
    assert sums
    for sources in sums:
        assert len({found[source].scale for source in sources}) == 1
    for quantization in found[1:]:
        assert (quantization.nearest(np.zeros(1)) == quantization.zero_point).all()
        assert 0 <= quantization.zero_point <= quantization.maximum <= 15


def test_maxima_keep_the_quantization_of_what_they_read():
    network = quantized(0, "max pool", depth=1)
    maxima = [n for n, layer in enumerate(network.layers) if isinstance(layer, Maximum)]
    assert maxima
    for number in maxima:
        assert network.quantizations[number + 1] is network.quantizations[network.layers[number].source]


def test_activations_that_are_not_finite_are_refused():
    class Reciprocal(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = torch.nn.Conv2d(1, 1, 1, bias=False), torch.nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.last(1 / self.conv(x))

    images = np.ones((1, 1, 2, 2))
    images[0, 0, 0, 0] = 0
    with pytest.raises(fheconv.CalibrationError, match="not finite"):
        chosen(Reciprocal(), images)
    with pytest.raises(fheconv.CalibrationError, match="not finite"):
        fheconv.quantize(Reciprocal(), images)


@given(
    st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.integers(2, 8), st.booleans(), st.floats(0, 1),
)  # fmt: skip
def test_every_image_in_the_calibrated_range_is_represented_within_half_a_step(low, size, bits, signed, at):
    calibrated = CalibratedInput(minimum=low, maximum=low + size, integral=False, images=1)
    config = fheconv.QuantConfig(input_bits=bits, input_signed=signed)
    found = input_quantization(calibrated, config)
    x = np.array([low, low + size * at, min(low + size, calibrated.maximum)])
    integers = found.integers(x)
    assert (np.abs((integers - found.zero_point) * found.scale - x) <= found.scale * (1 + 1e-6)).all()
    assert (np.abs((integers - found.zero_point) * found.scale - x)[1:2] <= found.scale).all()
    assert found.integers(np.zeros(1)) == found.zero_point


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.sampled(2)
def test_more_activation_bits_represent_activations_better(seed):
    module, images = random_net(seed)
    _, tensors, coarse = chosen(module, images, activation_bits=2)
    _, _, fine = chosen(module, images, activation_bits=6)

    def error(found):
        return sum(
            np.square((q.nearest(values) - q.zero_point) * q.scale - values).mean()
            for values, q in zip(tensors[1:-1], found[1:-1], strict=True)
        )

    assert error(fine) < 0.1 * error(coarse)


class Trained(nn.Module):
    """A network with quantized weights and activations, by torch's own operators for such training."""

    def __init__(self, pool=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.pool = nn.Conv2d(1, 3, 3), nn.Linear(3 if pool else 12, 3), pool

    def weight(self, layer):
        """Weights on the grid of 8 bits that ends at the greatest of each channel."""
        steps = layer.weight.detach().flatten(1).abs().amax(1) / 127
        zeros = torch.zeros(len(steps), dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(layer.weight, steps, zeros, 0, -127, 127)

    def forward(self, x):
        x = torch.nn.functional.conv2d(x, self.weight(self.conv), self.conv.bias)
        x = torch.fake_quantize_per_tensor_affine(torch.relu(x), 0.25, 3, 3, 10)
        x = torch.nn.functional.max_pool2d(x, 2) if self.pool else x
        return torch.nn.functional.linear(x.flatten(1), self.weight(self.fc), self.fc.bias)


@pytest.mark.parametrize("pool", [False, True])
def test_activations_keep_the_scale_and_width_that_they_were_trained_with(pool):
    """So that the integers are the network's own, and calibration chooses nothing."""
    images = np.random.default_rng(0).integers(0, 4, (40, 1, 4, 4))
    model = Trained(pool)
    config = fheconv.QuantConfig(method="minmax", weight_bits=8, input_bits=2, activation_bits=2)
    network = fheconv.quantize(model, images[:5], config)
    kept = network.quantizations[1]
    assert (kept.scale, kept.minimum, kept.maximum, kept.zero_point) == (0.25, 0, 7, 0)
    expected = model(torch.tensor(images, dtype=torch.float32)).detach().numpy()
    off = network(images) - expected
    assert np.abs(off).max() <= 0.51 * network.last.scale.max()  # the last bias, in whole steps
    np.testing.assert_allclose(off, off[:1].repeat(len(off), 0), atol=1e-5)
    one = fheconv.quantize(model, np.zeros((1, 1, 4, 4), int), config).quantizations[1]
    assert one == kept
