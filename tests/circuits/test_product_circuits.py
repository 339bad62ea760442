"""Products of two encrypted values, encrypted."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import fheconv


class SqueezeAndExcite(nn.Module):
    """A convolution whose channels are multiplied by gates, which see the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.last = nn.Conv2d(1, 2, 3), nn.Linear(8, 3)
        self.squeeze, self.excite = nn.Conv2d(2, 1, 1), nn.Conv2d(1, 2, 1)

    def forward(self, x):
        x = functional.relu(self.conv(x))
        gate = self.excite(functional.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return self.last((x * functional.hardsigmoid(gate)).flatten(1))


@pytest.mark.slow
def test_squeeze_and_excite_encrypted_is_the_clear_integers():
    config = fheconv.QuantConfig(input_bits=2, activation_bits=2, weight_bits=2, accumulator_bits=5)
    images = np.random.default_rng(0).uniform(0, 1, (30, 1, 4, 4))
    network = fheconv.quantize(SqueezeAndExcite().eval(), images, config)
    squares = [layer for layer in network.source.layers if "square" in layer.kind]
    assert sum(np.prod(layer.shape) for layer in squares) == 16
    circuit = fheconv.compile(network, fheconv.CompileConfig(p_error=1e-4))
    assert circuit.cost.lookups <= 8 + 1 + 2 + 16
    circuit.keygen()
    results = circuit.decrypt(circuit.run(circuit.encrypt(images[:1])), dequantize=False)
    np.testing.assert_array_equal(results, network.integers(images[:1]))
