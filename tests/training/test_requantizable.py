"""The float weights behind windows as a torch module: what it computes, its gradients, what it becomes."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fheconv
from fheconv.networks.floats import Layer
from fheconv.quantizer.layerwise import quantize_network
from fheconv.quantizer.rows import read_taps
from fheconv.training.requantizable import RequantizableNetwork
from tests.support.layers import KINDS, random_module
from tests.support.nets import BLOCKS, quantize, quantized, random_net
from tests.support.same import same_network

SIZE = (2, 5, 6)
WINDOWS = {"overflow": "defined", "rounding_bits": 4}
# Nearly floats: what is left of roundings is small beside the values.
FINE = {"overflow": "defined", "rounding_bits": 8, "activation_bits": 8, "input_bits": 12}
seeds = st.integers(0, 2**32 - 1)


def weight_changes(module):
    return [parameter for name, parameter in module.named_parameters() if name.endswith("change")]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("options", [WINDOWS, {**WINDOWS, "method": "mse"}], ids=str)
@pytest.mark.sampled(3)
def test_without_training_it_is_what_its_floats_are_quantized_to(block, options):
    network = quantized(7, block, size=SIZE, **options)
    images = random_net(7, block, size=SIZE)[1]
    meant = quantize_network(network.source, images, network.calibrated, network.config)
    same_network(meant, RequantizableNetwork(network, images).quantized(images))


@pytest.mark.slow
@settings(max_examples=10)
@given(seed=seeds, kind=st.sampled_from(KINDS))
def test_convolutions_of_any_kind(seed, kind):
    """Over one to three axes, transposed, in groups, of several channels, in every padding mode."""
    layer, shape = random_module(seed, kind)
    images = np.random.default_rng(seed).uniform(-1, 1, (6, *shape))
    model = nn.Sequential(layer, nn.PReLU(), nn.Flatten()).double()
    width = model(torch.tensor(images)).shape[1]
    network = quantize(nn.Sequential(*model, nn.Linear(width, 2)).double(), images, **FINE)
    module = RequantizableNetwork(network, images)
    same_network(
        quantize_network(network.source, images, network.calibrated, network.config),
        module.quantized(images),
    )
    got, meant = module.eval()(torch.tensor(images).float()).detach().numpy(), network.source(images)
    off, varied = np.abs(got - meant).max(), np.abs(meant - meant.mean(axis=0)).max()
    assert off <= 0.1 * varied + 0.01 * np.abs(meant).max()  # results may be the same for all images


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.sampled(3)
def test_it_is_the_float_network_but_for_rounding(block):
    network = quantized(7, block, size=SIZE, **FINE)
    images = random_net(7, block, size=SIZE)[1]
    module = RequantizableNetwork(network, images).eval()
    got, meant = module(torch.tensor(images).float()).detach().numpy(), network.source.tensors(images)[-1]
    assert np.square(got - meant).mean() < 0.001 * meant.var()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("seed", [3, 7])
@pytest.mark.sampled(7)
def test_what_was_trained_is_quantized(block, seed):
    """The floats of the result are those that were trained: they compute what the module does."""
    network = quantized(seed, block, size=SIZE, **FINE)
    images = random_net(seed, block, size=SIZE)[1]
    module = RequantizableNetwork(network, images).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(60 * torch.randn(parameter.shape))
        got = module(torch.tensor(images).float()).numpy()
    again = module.quantized(images)
    assert type(again) is type(network)
    assert again.config == network.config
    meant = again.source.tensors(images)[-1]
    before = network.source.tensors(images)[-1]
    assert np.square(got - meant).mean() < 0.002 * meant.var()
    assert np.square(before - meant).mean() > 0.01 * meant.var()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.sampled(3)
def test_gradients_reach_every_parameter_and_pruned_weights_stay(block):
    module, images = random_net(7, block, size=SIZE)
    pruned = copy.deepcopy(module)
    for conv in pruned.modules():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size != (1, 1):
            with torch.no_grad():
                conv.weight[..., 0, 0] = 0
    network = quantize(pruned, images, **WINDOWS)
    trained = RequantizableNetwork(network, images).train()
    optimizer = torch.optim.Adam(trained.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        trained(torch.tensor(images).float()).square().sum().backward()
        optimizer.step()
    changed = [parameter.detach().abs().amax() for parameter in trained.parameters()]
    assert min(changed) > 0
    for before, after in zip(network.source.layers, trained.quantized(images).source.layers, strict=True):
        if isinstance(before, Layer):
            for term, again in zip(before.terms, after.terms, strict=True):
                (_, kernel), (_, other) = term.weighted(), again.weighted()
                assert not other.weight[~read_taps(kernel)].any()


def homogeneous(bits):
    """A network whose first layer is linear up to its columns, and its images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.Hardtanh(-1e3, 1e3), nn.Conv2d(3, 1, 3))
    images = np.random.default_rng(0).uniform(-1, 1, (9, 1, 5, 5))
    return quantize(model.double(), images, overflow="defined", rounding_bits=bits), images


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_the_gradient_includes_that_of_the_columns(bits):
    """Twice the weights make columns twice as wide, and all sums twice as great, however coarse these are.

    Euler's theorem on homogeneous functions says it of the derivatives. Without that of the size of a column
    it would not hold.
    """
    network, images = homogeneous(bits)
    trained = RequantizableNetwork(network, images).double().eval()
    with torch.no_grad():
        trained.layers[1].bias.zero_()
    first = trained.layers[0].terms[0]
    out = trained(torch.tensor(images))
    weigh = torch.randn(out.shape, dtype=out.dtype)
    weighed = (weigh * out).sum()
    weighed.backward()
    slope = (first.change.grad * first.weight / first.unit).sum()
    assert slope.item() == pytest.approx(weighed.item(), rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_each_channel_has_as_many_values_as_its_lookup_has_columns(bits):
    network, images = homogeneous(bits)
    seen = []
    trained = RequantizableNetwork(network, images).train()
    trained.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    for _ in range(3):
        trained(torch.tensor(images).float())
    for output in seen:
        for channel in output.detach().moveaxis(1, 0):
            assert 2 < len(channel.unique()) <= 2**bits or bits == 2
    assert not torch.equal(seen[0], seen[1])  # noise


def test_equal_sums_have_a_gradient():
    """Of one image, each channel of a linear layer has one sum, and no range."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    images = np.random.default_rng(0).uniform(0, 1, (9, 1, 3, 3))
    trained = RequantizableNetwork(quantize(model, images, **WINDOWS), images)
    trained(torch.tensor(images[:1]).float()).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in trained.parameters())
    assert all(parameter.grad.any() for parameter in weight_changes(trained))


def test_a_parameter_that_is_no_number_is_named():
    network = quantized(7, "conv", size=SIZE, **WINDOWS)
    images = random_net(7, "conv", size=SIZE)[1]
    trained = RequantizableNetwork(network, images)
    with torch.no_grad():
        trained.layers[0].shift.fill_(np.nan)
    with pytest.raises(fheconv.CalibrationError, match=r"layers.0.shift is not finite"):
        trained.quantized(images)
