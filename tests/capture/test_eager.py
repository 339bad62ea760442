"""Models of torch.ao.quantization give what torch's own integer arithmetic gives."""

import numpy as np
import pytest
import torch
import torch.ao.quantization as ao
from torch import nn

import fheconv
from fheconv.capture.eager import as_floats

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


class Net(nn.Module):
    """A network as torch's tutorials write it, with a residual sum."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = ao.QuantStub(), ao.DeQuantStub()
        self.a, self.bn, self.relu = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU()
        self.b, self.relu2 = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()
        self.sum, self.pool = torch.ao.nn.quantized.FloatFunctional(), nn.MaxPool2d(2)
        self.c = nn.Linear(12, 4)

    def forward(self, x):
        x = self.relu(self.bn(self.a(self.quant(x))))
        x = self.pool(self.sum.add(x, self.relu2(self.b(x))))
        return self.dequant(self.c(x.flatten(1)))


def trained():
    """The network after some steps of training for weights of 3 bits and activations of 4 bits."""
    torch.manual_seed(0)
    model = ao.fuse_modules_qat(Net().train(), [["a", "bn", "relu"], ["b", "relu2"]])
    activation = ao.FakeQuantize.with_args(
        observer=ao.MovingAverageMinMaxObserver, quant_min=0, quant_max=15, dtype=torch.quint8
    )
    weight = ao.FakeQuantize.with_args(
        observer=ao.MovingAveragePerChannelMinMaxObserver, quant_min=-3, quant_max=3, dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    )  # fmt: skip
    model.qconfig = ao.QConfig(activation=activation, weight=weight)
    ao.prepare_qat(model, inplace=True)
    for _ in range(3):
        model(torch.rand(16, 1, 6, 6))
    return model.eval()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("converted", [False, True])
def test_prepared_and_converted_models_give_the_integers_of_torch(converted):
    model = trained()
    if converted:
        ao.convert(model, inplace=True)
    images = torch.rand(30, 1, 6, 6)
    network = fheconv.quantize(model, images[:1])
    model.apply(ao.disable_observer)  # or else torch changes the scales while it evaluates
    with torch.no_grad():
        expected = model(images).numpy()
    assert len({*np.round(expected.ravel(), 4)}) > 3
    np.testing.assert_allclose(network(images), expected, atol=1e-5)
    # The first quantizer takes no lookup. What is converted has 8 bits, whatever it was trained with.
    assert len(network.layers) == 6
    assert network.input.maximum == (255 if converted else 15)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_layers_of_other_kinds(kind):
    torch.manual_seed(1)
    axes = {nn.Conv1d: 1, nn.Conv3d: 3}.get(kind, 2)
    layer = kind(2, 3, 3, stride=2, padding=1)
    quantized = getattr(torch.ao.nn.quantized, kind.__name__)(2, 3, 3, stride=2, padding=1)
    weight = torch.quantize_per_tensor(layer.weight.detach(), 0.1, 0, torch.qint8)
    quantized.set_weight_bias(weight, layer.bias.detach())
    quantized.scale, quantized.zero_point = 0.05, 100
    images = torch.quantize_per_tensor(torch.randn(4, 2, *[5] * axes), 0.1, 128, torch.quint8)
    with torch.no_grad():
        made = as_floats(quantized, images.dequantize())(images.dequantize())
    np.testing.assert_allclose(made.numpy(), quantized(images).dequantize().numpy(), atol=1e-6)


def test_a_module_without_quantization_is_itself():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())
    assert as_floats(model, torch.zeros(1, 1, 3, 3)) is model


def test_a_quantized_module_that_is_not_known_is_named():
    model = nn.Sequential(torch.ao.nn.quantized.Sigmoid(0.1, 0))
    with pytest.raises(fheconv.UnsupportedLayerError, match=r"'0' .*Sigmoid.* before torch.ao.quantization"):
        fheconv.quantize(model, np.zeros((1, 1, 3, 3)))


@pytest.mark.slow
def test_converted_models_that_average_are_refused():
    """Torch rounds averages of integers."""
    model = nn.Sequential(ao.QuantStub(), nn.Conv2d(1, 2, 3), nn.AvgPool2d(2), ao.DeQuantStub()).train()
    model.qconfig = ao.get_default_qat_qconfig("x86")
    ao.prepare_qat(model, inplace=True)
    model(torch.rand(4, 1, 6, 6))
    converted = ao.convert(model.eval())
    with pytest.raises(fheconv.UnsupportedLayerError, match=r"avg_pool2d .* before torch.ao"):
        fheconv.quantize(converted, torch.rand(4, 1, 6, 6))


@pytest.mark.slow
def test_eight_bits_that_no_lookup_holds_are_rounded_anew_as_the_error_advises():
    torch.manual_seed(0)
    layers = ao.QuantStub(), nn.Conv2d(3, 4, 3), nn.ReLU(), ao.DeQuantStub()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3)).train()
    model.qconfig = ao.get_default_qat_qconfig("x86")
    ao.prepare_qat(model, inplace=True)
    images = torch.randn(64, 3, 6, 6)
    model(images)
    model.eval().apply(ao.disable_observer)
    with pytest.raises(fheconv.AccumulatorOverflowError, match="This was tried, and fits") as caught:
        fheconv.quantize(model, images)
    network = fheconv.quantize(model, images, fheconv.QuantConfig(**caught.value.settings))
    with torch.no_grad():
        expected = model(images).numpy()
    assert np.corrcoef(network(images).ravel(), expected.ravel())[0, 1] > 0.98


def test_an_observer_that_two_names_share_is_replaced_under_both():
    model = nn.Sequential(ao.FusedMovingAvgObsFakeQuantize(), nn.ReLU())
    model.append(model[0])
    model(torch.rand(4, 1, 3, 3))
    made = as_floats(model.eval(), torch.zeros(2, 1, 3, 3))
    assert not any(isinstance(part, ao.FakeQuantize) for part in made.modules())
