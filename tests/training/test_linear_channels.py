"""Channels without activation: what reads them reads what they were computed from, exactly."""

import numpy as np
import pytest
import torch
from torch import nn

import fheconv
from fheconv.capture.model import capture
from fheconv.networks.demand import demand
from fheconv.training.linear_channels import Fit, Thinned, fits_of, without_activation
from fheconv.training.thinning import lookups, thinned
from tests.support.nets import READERS, Readers

IMAGES = np.random.default_rng(0).normal(size=(6, 1, 6, 6))


def captured(module):
    return capture(module.double().eval(), IMAGES.shape[1:])


def changed(network, number, channel, fit):
    return without_activation(Thinned(network=network, original=network, means={}), number, channel, fit)


def expected(network, number, channel, fit):
    """The oracle: the results if one channel is a linear function of its sums."""
    tensors = [IMAGES]
    for place, layer in enumerate(network.layers, 1):
        tensors.append(layer.output(tensors))
        if place == number:
            sums = network.layers[place - 1].sums(tensors)
            tensors[-1] = tensors[-1].copy()
            tensors[-1][:, channel] = fit.slope * sums[:, channel] + fit.offset
    return tensors[-1]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("fit", [Fit(0.4, 0.3), Fit(0.0, 0.3)], ids=str)
def test_the_network_computes_the_linear_function_wherever_it_is_read(name, fit):
    torch.manual_seed(0)
    network = captured(Readers(READERS[name]))
    now = changed(network, 1, 2, fit)
    if name == "maximum" and fit.slope:
        assert now is None
        return
    np.testing.assert_allclose(now.network.tensors(IMAGES)[-1], expected(network, 1, 2, fit), atol=1e-9)
    np.testing.assert_allclose(now.original.tensors(IMAGES)[-1], network.tensors(IMAGES)[-1], atol=1e-9)
    assert not demand(now.network)[1][2].any()
    assert lookups(now.network) == lookups(network) * 3 // 4


def test_channels_of_several_layers_become_linear_one_after_the_other():
    """Through paddings, strides and a residual sum; the second layer reads the first one's linear channel."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
            self.c = nn.Conv2d(3, 2, 2, stride=2)

        def forward(self, x):
            x = torch.relu(self.a(x))
            return self.c(torch.relu(self.b(x)) + x)

    torch.manual_seed(0)
    network, first, second = captured(Net()), Fit(0.5, 0.2), Fit(-0.3, 0.1)
    now = changed(network, 1, 0, first)
    then = without_activation(now, 2, 1, second)
    np.testing.assert_allclose(
        then.network.tensors(IMAGES)[-1], expected(now.network, 2, 1, second), atol=1e-9
    )
    np.testing.assert_allclose(then.original.tensors(IMAGES)[-1], network.tensors(IMAGES)[-1], atol=1e-9)
    assert lookups(then.network) == lookups(network) * 4 // 6


def test_an_activation_that_is_linear_where_sums_lie_costs_nothing():
    """Its sums are all positive, so that ReLU does nothing; a PReLU of slope 1 never does."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 2), nn.PReLU(3), nn.Conv2d(3, 2, 2))
    with torch.no_grad():
        module[0].bias[1] = 50.0
        module[3].weight[:] = torch.tensor([0.2, 1.0, 0.2])
    network = captured(module)
    fewer = thinned(network, IMAGES, lookups(network) - 16 - 9)
    np.testing.assert_allclose(fewer.tensors(IMAGES)[-1], network.tensors(IMAGES)[-1], atol=1e-6)
    assert not demand(fewer)[1][1].any()
    assert not demand(fewer)[2][1].any()


def test_a_whole_layer_becomes_linear_but_never_constant():
    """Its convolution and the next are one. Of its tensor one value is left, because no tensor is empty."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Conv2d(2, 2, 3))
    with torch.no_grad():
        module[0].bias[:] = 50.0
        module[2].bias[:] = -50 * module[2].weight.sum((1, 2, 3))  # sums of both signs
    network = captured(module)
    fewer = thinned(network, IMAGES, 18 + 1)
    np.testing.assert_allclose(fewer.tensors(IMAGES)[-1], network.tensors(IMAGES)[-1], atol=1e-6)
    assert lookups(fewer) == 18 + 1
    assert lookups(thinned(network, IMAGES, 2)) == 2
    assert np.ptp(thinned(network, IMAGES, 2).tensors(IMAGES)[-1]) > 0.01
    with pytest.raises(fheconv.LookupBudgetError, match="needs 2 lookups"):
        thinned(network, IMAGES, 1)


def test_the_fit_is_that_of_least_squares():
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    fit, mean = fits_of(x, np.maximum(x, 0))
    np.testing.assert_allclose(fit, np.polyfit(x, np.maximum(x, 0), 1))
    assert mean == (0.0, pytest.approx(np.maximum(x, 0).mean()))
    assert list(fits_of(np.full(3, 2.0), np.full(3, 1.0))) == [(0.0, 1.0)]


@pytest.mark.slow
def test_linear_channels_are_quantized_and_compiled():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    config = fheconv.QuantConfig(overflow="defined", rounding_bits=6, weight_bits=6, input_bits=6)
    network = fheconv.quantize(module, IMAGES, config)
    tuned = fheconv.finetune(network, IMAGES, epochs=1, lookup_budget=16)
    assert len(tuned.layers[-1].terms) == 2
    assert {term.source for term in tuned.layers[-1].terms} == {0, 1}
    circuit = fheconv.compile(tuned, fheconv.CompileConfig(p_error=0.01))
    assert circuit.cost.lookups == lookups(tuned.source) == 16
    np.testing.assert_allclose(circuit.predict(IMAGES), tuned(IMAGES))
