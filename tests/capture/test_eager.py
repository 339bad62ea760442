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
        made = as_floats(quantized)(images.dequantize())
    np.testing.assert_allclose(made.numpy(), quantized(images).dequantize().numpy(), atol=1e-6)


def test_a_module_without_quantization_is_itself():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())
    assert as_floats(model) is model


def test_a_quantized_module_that_is_not_known_is_named():
    model = nn.Sequential(torch.ao.nn.quantized.Sigmoid(0.1, 0))
    with pytest.raises(fheconv.UnsupportedLayerError, match=r"'0' .*Sigmoid.* before torch.ao.quantization"):
        fheconv.quantize(model, np.zeros((1, 1, 3, 3)))
