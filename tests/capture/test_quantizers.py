"""What training for integers leaves in a model, by the operators of those who write such models."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers the operators of PT2E
from torch import nn
from torch.nn import functional

import fheconv
from fheconv.capture.model import capture

DECOMPOSED = torch.ops.quantized_decomposed
IMAGES = np.random.default_rng(0).uniform(-1, 2, (12, 1, 6, 6)).astype(np.float32)


def rounded(x, scale, zero, high):
    """As PT2E writes it: to integers, and back."""
    arguments = scale, zero, 0, high, torch.uint8
    return DECOMPOSED.dequantize_per_tensor(DECOMPOSED.quantize_per_tensor(x, *arguments), *arguments)


class Converted(nn.Module):
    """A network as torchao's convert_pt2e leaves it: integer weights, quantize and dequantize everywhere."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("a", (3, 1, 3, 3)), ("b", (3, 3, 3, 3)), ("c", (4, 12))):
            integers = torch.randint(-3, 4, shape, generator=generator, dtype=torch.int8)
            self.register_buffer(name, integers)
            self.register_buffer(name + "_scale", torch.rand(shape[0], generator=generator) * 0.2 + 0.1)
        self.bias = nn.Parameter(torch.rand(4, generator=generator))

    def weight(self, name):
        scale = getattr(self, name + "_scale")
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        return DECOMPOSED.dequantize_per_channel(getattr(self, name), scale, zeros, 0, -3, 3, torch.int8)

    def forward(self, x):
        x = rounded(x, 0.11, 5, 15)
        x = torch.relu(functional.conv2d(x, self.weight("a")))
        integers = DECOMPOSED.quantize_per_tensor(x, 0.07, 0, 0, 15, torch.uint8)
        twice = [DECOMPOSED.dequantize_per_tensor(integers, 0.07, 0, 0, 15, torch.uint8) for _ in range(2)]
        y = functional.conv2d(twice[0], self.weight("b"), padding=1)
        y = rounded(torch.relu(y), 0.13, 0, 15)
        x = rounded(twice[1] + y, 0.19, 0, 15)
        x = rounded(functional.max_pool2d(x, 2), 0.19, 0, 15)
        return rounded(functional.linear(x.flatten(1), self.weight("c"), self.bias), 0.3, 8, 15)


def exported(batch, model=None):
    return torch.export.export(model or Converted(), (torch.rand(batch, 1, 6, 6),))


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "make",
    [Converted, lambda: exported(2).module(), lambda: exported(5).module(), lambda: exported(5)],
    ids=["module", "exported.module()", "another batch size", "exported"],
)
def test_pt2e(make):
    model = make()
    network = fheconv.quantize(model, IMAGES[:1])
    with torch.no_grad():
        expected = Converted()(torch.tensor(IMAGES)).numpy()
    np.testing.assert_allclose(network(IMAGES), expected, atol=1e-5)
    assert len({*np.round(expected.ravel(), 3)}) > 5
    assert network.input.scale == np.float32(0.11)
    assert len(network.layers) == 6  # none for images, and one for an activation that is read twice


class Wrapped(NamedTuple):
    """What a module returns that says with which scale its values are integers."""

    value: torch.Tensor
    scale: float


class ByHand(nn.Module):
    """Rounds as Brevitas does: it divides, rounds, chooses, and multiplies again."""

    def __init__(self, scale, low, high):
        super().__init__()
        self.scale, self.low, self.high = nn.Parameter(torch.tensor(scale)), low, high
        self.return_quant_tensor = True

    def forward(self, x):
        y = torch.round(x / self.scale)
        high, low = torch.tensor(float(self.high)), torch.tensor(float(self.low))
        y = torch.where(y > high, high, y)
        y = torch.where(y < low, low, y) * self.scale
        return Wrapped(y, self.scale) if self.return_quant_tensor else y


class BiasByHand(nn.Module):
    """Rounds a bias by the scale of what the layer reads, as Brevitas does; plain tensors have no scale."""

    def forward(self, bias, x):
        return torch.round(bias / x.scale) * x.scale


class Biased(nn.Module):
    """A convolution with such a bias."""

    def __init__(self, conv):
        super().__init__()
        self.conv, self.bias_quant = conv, BiasByHand()

    def forward(self, x, weight):
        return functional.conv2d(
            x.value if isinstance(x, Wrapped) else x, weight, self.bias_quant(self.conv.bias, x)
        )


class HandMade(nn.Module):
    """A network of such modules, which takes what they return as it comes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.w = ByHand(0.17, -8, 7), ByHand(0.23, 0, 15), ByHand(0.11, -3, 3)
        self.a, self.c = Biased(nn.Conv2d(1, 3, 3)), nn.Linear(48, 4)

    def forward(self, x):
        def plain(y):
            return y.value if isinstance(y, Wrapped) else y

        x = self.a(self.first(x), plain(self.w(self.a.conv.weight)))
        x = plain(self.act(torch.relu(x)))
        return functional.linear(x.flatten(1), plain(self.w(self.c.weight)), self.c.bias)


def test_what_divides_rounds_and_multiplies_by_hand_is_taken_over_as_well():
    model = HandMade().eval()
    network = fheconv.quantize(model, IMAGES[:1])
    with torch.no_grad():
        expected = model(torch.tensor(IMAGES)).numpy()
    np.testing.assert_allclose(network(IMAGES), expected, atol=1e-5)
    assert network.input.real_range == pytest.approx((-8 * 0.17, 7 * 0.17))
    assert [q.maximum for q in network.quantizations] == [15, 15]
    assert model.first.return_quant_tensor  # the user's model is as it was


def test_a_module_of_an_exported_program_keeps_its_checks():
    module = exported(5).module()
    capture(module, (1, 6, 6))
    with pytest.raises((AssertionError, RuntimeError)):
        module(torch.rand(3, 1, 6, 6))
    assert module(torch.rand(5, 1, 6, 6)).shape == (5, 4)


@pytest.mark.parametrize(
    ("quantizer", "words"),
    [
        (
            lambda x: torch.fake_quantize_per_channel_affine(
                x, torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3, dtype=torch.int32), 1, 0, 15
            ),
            "it has 3 numbers for its scale; .*one for the whole activation",
        ),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8).dequantize(), "quantize"),
    ],
)
def test_what_cannot_be_taken_over_is_refused_in_a_few_words(quantizer, words):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3)

        def forward(self, x):
            return quantizer(self.conv(x)) * 2

    with pytest.raises(fheconv.UnsupportedLayerError, match=words) as refused:
        fheconv.quantize(Model(), IMAGES)
    assert len(str(refused.value)) < 600


def test_torch_prints_nothing_of_its_own_about_a_model_that_it_cannot_export(capfd):
    class Measured(nn.Module):
        def forward(self, x):
            return torch.fake_quantize_per_tensor_affine(x, float(x.abs().max()) / 7, 0, 0, 7)

    with pytest.raises(fheconv.UnsupportedLayerError, match="path depends on the values"):
        fheconv.quantize(Measured(), IMAGES)
    shown = capfd.readouterr()
    assert shown.out + shown.err == ""


class Shifted(nn.Module):
    """Adds a zero-point before it rounds, and returns its scale too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.scale = nn.Conv2d(1, 2, 3, padding=1), nn.Parameter(torch.tensor(0.23))

    def forward(self, x):
        x = (torch.clamp(torch.round(x / self.scale + 6.0), 0, 15) - 6.0) * self.scale
        weight = torch.round(self.conv.weight / 0.05) * 0.05
        return functional.conv2d(x, weight, self.conv.bias, padding=1), self.scale


def test_a_zero_point_of_images_is_the_clients_and_what_is_no_result_is_left_out():
    network = fheconv.quantize(Shifted(), IMAGES[:1])
    with torch.no_grad():
        expected = Shifted()(torch.tensor(IMAGES))[0].numpy()
    np.testing.assert_allclose(network(IMAGES), expected, atol=1e-5)
    assert (network.input.zero_point, network.input.maximum, len(network.layers)) == (6, 15, 1)
