"""Models in a few lines, captured and compared with torch."""

import math

import numpy as np
import torch
from torch import nn

from fheconv.capture.model import capture
from fheconv.networks.floats import Layer, Network


class Fn(nn.Module):
    """A model written as a function, with named parts as its layers."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def trained(model, seed=0):
    """The model in double precision, with statistics and affine parameters unlike their first values."""
    torch.manual_seed(seed)
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            if part.affine:
                part.weight.data.normal_()
                part.bias.data.normal_()
    return model.double()


def check(model, shape, lookups=None, layers=None) -> Network:
    """Capture the model and compare with torch; `lookups` is how many elements activations are taken of."""
    model = trained(model)
    network = capture(model, shape)
    x = torch.randn(3, *shape, dtype=torch.float64)
    training = [part.training for part in model.modules()]
    with torch.no_grad():
        expected = model.eval()(x).double().numpy()
    for part, mode in zip(model.modules(), training, strict=True):
        part.training = mode
    y = network(x.numpy())
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-9)
    if lookups is not None:
        assert cost(network) == lookups
    if layers is not None:
        assert len(network.layers) == layers
    assert network.layers[-1].activation is None
    assert len({layer.name for layer in network.layers}) == len(network.layers)
    for layer in network.layers[:-1]:
        assert layer.activation is not None if isinstance(layer, Layer) else True
    for layer in network.layers:
        for term in getattr(layer, "terms", ()):
            assert len(term.inexact()) == 1
    return network


def cost(network):
    return sum(
        math.prod(layer.shape)
        for layer in network.layers
        if isinstance(layer, Layer) and layer.activation is not None
    )


def conv(i, o, k=3, **options):
    return nn.Conv2d(i, o, k, **{"padding": k // 2, **options})
