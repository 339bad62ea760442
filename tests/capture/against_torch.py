"""Captures a model and compares the network with torch."""

import numpy as np
import torch
from torch import nn

from fheconv.capture.model import capture
from fheconv.networks.floats import Layer, Network

torch.set_num_threads(1)


class Fn(nn.Module):
    """A model written as a function, with named parts as its layers."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def compare(model, shape, images=3) -> Network:
    """Return the captured network, once it gave what torch does; in the model's own precision or better."""
    torch.manual_seed(0)
    model = model.double().eval()
    network = capture(model, shape)
    x = torch.randn(images, *shape, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x).numpy()
    y = network(x.numpy())
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-9)
    for layer in network.layers:
        for term in getattr(layer, "terms", ()):
            assert len(term.inexact()) == 1
    return network


def weights(network) -> int:
    """How many weights are to be quantized."""
    layers = (layer for layer in network.layers if isinstance(layer, Layer))
    return sum(term.weighted()[1].weight.size for layer in layers for term in layer.terms)


def lookups(network) -> int:
    """How many values an activation is taken of."""
    layers = (layer for layer in network.layers if isinstance(layer, Layer) and layer.activation is not None)
    return sum(layer.bias.size for layer in layers)
