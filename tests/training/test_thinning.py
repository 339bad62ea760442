"""Networks with fewer lookups: which change is made, and what the changed network computes."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import fheconv
from fheconv.capture.model import capture
from fheconv.networks.demand import demand
from fheconv.networks.floats import Layer, Maximum
from fheconv.quantizer.layerwise import quantize_network
from fheconv.training import thinning
from fheconv.training.thinning import lookups, thinned
from tests.support.nets import BLOCKS, READERS, Readers, quantized, random_net

SIZE = (1, 5, 6)


@pytest.fixture
def only_poolings(monkeypatch):
    """No channel loses its activation."""
    monkeypatch.setattr(thinning, "fits_of", lambda sums, activations: iter(()))


def captured(module, images):
    return capture(module.double().eval(), images.shape[1:])


def without_activation(network, number, channel, images, *, degree=1):
    """The oracle: the results where one channel is its best polynomial: linear, or its mean for degree 0."""
    tensors = [images]
    for place, layer in enumerate(network.layers, 1):
        sums, output = layer.sums(tensors) if isinstance(layer, Layer) else None, layer.output(tensors)
        tensors.append(output)
        if place == number:
            tensors[-1] = output.copy()
            x, y = sums[:, channel].ravel(), output[:, channel].ravel()
            fit = np.polynomial.Polynomial.fit(x, y, degree)
            tensors[-1][:, channel] = fit(sums[:, channel])
    return tensors[-1]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", READERS)
def test_the_channel_that_matters_least_becomes_linear(name, monkeypatch):
    """Read by convolutions of all kinds, through paddings and poolings; before weights are fitted.

    Read by maxima, it becomes its mean.
    """
    monkeypatch.setattr(thinning, "fitted", lambda now, images: now.network)
    torch.manual_seed(0)
    images = np.random.default_rng(0).normal(size=(20, 1, 6, 6))
    network = captured(Readers(READERS[name]), images)
    degree = 0 if name == "maximum" else 1
    results = [without_activation(network, 1, channel, images, degree=degree) for channel in range(4)]
    meant = network.tensors(images)[-1]
    errors = [np.square(result - meant).mean() for result in results]
    pooled = pooled_first(name, images)
    if pooled is not None:  # three of four lookups are saved, and of a channel one in four
        results.append(pooled)
        errors.append(np.square(pooled - meant).mean() / 3)
    fewer = thinned(network, images, lookups(network) - 1)
    expected = results[int(np.argmin(errors))]
    np.testing.assert_allclose(fewer.tensors(images)[-1], expected, rtol=1e-9, atol=1e-9)
    saved = 3 / 4 if pooled is not None and expected is pooled else 1 / 4
    assert lookups(fewer) == lookups(network) * (1 - saved)


# What is left of a channel has no part in those that were taken out, or does not meet them in one window.
EXACT = {"depthwise", "reflected"}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", READERS)
def test_weights_fitted_to_what_is_left_compute_more_of_what_was_trained(name, monkeypatch):
    """On other images than those that they were fitted on."""
    torch.manual_seed(0)
    images, others = np.random.default_rng(0).normal(size=(2, 300, 1, 6, 6))
    network = captured(Readers(READERS[name]), images)
    fitted = thinned(network, images, lookups(network) // 4)
    monkeypatch.setattr(thinning, "fitted", lambda now, images: now.network)
    plain = thinned(network, images, lookups(network) // 4)
    meant = network.tensors(others)[-1]
    assert lookups(fitted) <= lookups(network) // 4
    errors = [np.square(one.tensors(others)[-1] - meant).mean() for one in (fitted, plain)]
    if name in EXACT:
        assert errors[0] == pytest.approx(errors[1], rel=0.01)
    else:
        assert errors[0] < errors[1]


def pooled_first(name, images):
    """What the network of an average pooling computes in the other order, by torch; None without one."""
    if name != "average":
        return None
    torch.manual_seed(0)
    module = Readers(READERS[name])
    pool, reader = module.reader
    with torch.no_grad():
        return reader(torch.relu(pool(module.conv(torch.tensor(images))))).numpy()


@pytest.mark.sampled(5)
@pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.AvgPool2d(3, stride=2), nn.AvgPool2d((2, 1))], ids=str)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.PReLU(1)], ids=str)
@pytest.mark.usefixtures("only_poolings")
def test_a_pooling_moves_before_its_activation(pool, activation):
    torch.manual_seed(1)
    conv, reader = nn.Conv2d(2, 1, 2, padding=1), nn.Conv2d(1, 3, 2)
    images = np.random.default_rng(0).normal(size=(9, 2, 6, 6))
    network = captured(nn.Sequential(conv, activation, pool, reader), images)
    with torch.no_grad():
        expected = nn.Sequential(conv, pool, activation, reader)(torch.tensor(images)).numpy()
    fewer = thinned(network, images, lookups(network) - 1)
    np.testing.assert_allclose(fewer.tensors(images)[-1], expected, atol=1e-9)
    assert lookups(fewer) == int(np.prod(fewer.layers[0].shape))
    if pool.kernel_size == 2:
        assert lookups(network) == 4 * lookups(fewer)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "between",
    [
        nn.AvgPool2d(2, padding=1),
        nn.AvgPool2d(3, stride=2, ceil_mode=True),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Sequential(nn.AvgPool2d(2), nn.AvgPool2d(2, padding=1)),
    ],
    ids=str,
)
@pytest.mark.usefixtures("only_poolings")
def test_poolings_of_borders_stay_where_they_are(between):
    """Nothing, or no more than the first pooling, can be moved; what is asked for beyond is refused."""
    torch.manual_seed(1)
    images = np.random.default_rng(0).normal(size=(9, 1, 6, 6))
    module = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), between, nn.Conv2d(1, 2, 1))
    network = captured(module, images)
    least = 9 if isinstance(between, nn.Sequential) else lookups(network)
    with pytest.raises(fheconv.InvalidArgumentError, match=f"needs {least} lookups"):
        thinned(network, images, least - 1)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, stride=2), nn.MaxPool2d((1, 2), 1)], ids=str
)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh()], ids=str)
def test_maxima_become_averages_before_the_activation(pool, activation):
    """These are scaled and shifted, nearest to the greatest sum of each window. A single channel stays in."""
    torch.manual_seed(1)
    conv, reader = nn.Conv2d(2, 1, 2, padding=1), nn.Conv2d(1, 3, 2)
    images = np.random.default_rng(0).normal(size=(9, 2, 6, 6))
    network = captured(nn.Sequential(conv, activation, pool, reader), images)
    average = nn.AvgPool2d(pool.kernel_size, pool.stride)
    with torch.no_grad():
        averages = average(conv(torch.tensor(images))).numpy()
        greatest = pool(conv(torch.tensor(images))).numpy()
    fewer = thinned(network, images, averages[0].size)
    assert not any(isinstance(layer, Maximum) for layer in fewer.layers)
    assert lookups(fewer) == averages[0].size
    assert fewer.shapes == (network.shapes[0], averages.shape[1:], network.shapes[-1])
    sums = fewer.layers[0].sums(fewer.tensors(images))
    assert np.corrcoef(averages.ravel(), sums.ravel())[0, 1] ** 2 == pytest.approx(1)
    assert np.square(sums - greatest).mean() < np.square(averages - greatest).mean()


def test_maxima_beside_another_reader_stay():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 4)

        def forward(self, x):
            x = torch.relu(self.conv(x))
            return self.a(nn.functional.max_pool2d(x, 4)) + self.b(x)

    torch.manual_seed(2)
    images = np.random.default_rng(0).normal(size=(9, 1, 6, 6))
    network = captured(Two(), images)
    with pytest.raises(fheconv.InvalidArgumentError, match=f"needs {lookups(network)} lookups"):
        thinned(network, images, lookups(network) - 1)


@pytest.mark.usefixtures("only_poolings")
def test_an_activation_with_two_readers_is_pooled_for_both_or_for_none():
    class Two(nn.Module):
        def __init__(self, other):
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 2, 2), nn.Conv2d(1, 2, 2)
            self.pool, self.other = nn.AvgPool2d(2), other

        def forward(self, x):
            x = torch.relu(self.conv(x))
            return self.a(self.pool(x)) + self.b(self.other(x))

    torch.manual_seed(2)
    images = np.random.default_rng(0).normal(size=(9, 1, 6, 6))
    same = captured(Two(nn.AvgPool2d(2)), images)
    assert lookups(thinned(same, images, 9)) == 9
    different = captured(Two(nn.AvgPool2d(4, stride=1)), images)
    with pytest.raises(fheconv.InvalidArgumentError, match="needs 36 lookups"):
        thinned(different, images, 35)


def test_a_channel_that_never_changes_costs_nothing():
    """The third filter sees nothing, and its bias is what ReLU lets through."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 1)
    )
    with torch.no_grad():
        module[0].weight[2], module[0].bias[2] = 0, 0.7
    images = np.random.default_rng(0).normal(size=(20, 1, 5, 5))
    network = captured(module, images)
    fewer = thinned(network, images, lookups(network) - 1)
    others = np.random.default_rng(1).normal(size=(20, 1, 5, 5))
    np.testing.assert_allclose(fewer.tensors(others)[-1], network.tensors(others)[-1], atol=1e-12)
    assert lookups(fewer) == lookups(network) - 25
    assert not demand(fewer)[1][2].any()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.sampled(3)
def test_it_stops_at_the_budget_or_says_what_is_needed(block):
    _, images = random_net(7, block, size=SIZE)
    network = quantized(7, block, size=SIZE).source
    all_of_them = lookups(network)
    assert thinned(network, images, all_of_them) is network
    with pytest.raises(
        fheconv.InvalidArgumentError, match=r"lookup_budget=0 is too small.* needs \d+"
    ) as error:
        thinned(network, images, 0)
    least = int(re.search(r"needs (\d+) lookups", str(error.value))[1])
    assert lookups(thinned(network, images, least)) == least
    with pytest.raises(fheconv.InvalidArgumentError, match=f"needs {least} lookups"):
        thinned(network, images, least - 1)
    half = (least + all_of_them) // 2
    assert least <= lookups(thinned(network, images, half)) <= half


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("options", [{"accumulator_bits": 9}, {"weight_bits": 2}, {"method": "mse"}], ids=str)
@pytest.mark.sampled(7)
def test_what_was_taken_out_stays_out_when_quantized(block, options):
    _, images = random_net(7, block, size=SIZE)
    given = quantized(7, block, size=SIZE, **options)
    network = given.source
    for budget in (lookups(network), lookups(network) * 3 // 4):
        try:
            fewer = thinned(network, images, budget)
        except fheconv.InvalidArgumentError:
            continue
        again = quantize_network(fewer, images, given.calibrated, given.config)
        assert fheconv.QuantizedNetwork.of(again).budget().lookups == lookups(fewer) <= budget
        for mask, wanted in zip(demand(again), demand(fewer), strict=True):
            np.testing.assert_array_equal(mask, wanted)


def test_a_circuit_takes_as_many_lookups():
    _, images = random_net(7, "depthwise", size=SIZE)
    given = quantized(7, "depthwise", size=SIZE, accumulator_bits=9)
    budget = lookups(given.source) * 3 // 4
    fewer = thinned(given.source, images, budget)
    network = quantize_network(fewer, images, given.calibrated, given.config)
    circuit = fheconv.FheCircuit(fheconv.QuantizedNetwork.of(network), fheconv.CompileConfig())
    assert circuit.cost.lookups == lookups(fewer) <= budget


def test_pruned_inputs_get_no_weights_from_the_fit_to_what_is_delivered():
    """Where trained filters of one group read nothing, no weight makes up for another's error."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    module = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    pruned = torch.tensor(rng.random((2, 1, 3, 3, 3)) < 0.5)
    with torch.no_grad():
        module[0].weight[1] = module[0].weight[0] + 0.01  # alike: the fit would share the weights out
        module[2].weight.reshape(2, 2, 3, 3, 3).masked_fill_(pruned, 0)
    images = rng.uniform(size=(30, 1, 5, 5))
    config = fheconv.QuantConfig(weight_bits=8, activation_bits=3, accumulator_bits=16)
    network = fheconv.quantize(module, images, config)
    weight = network.layers[1].terms[0].steps[0].weight.reshape(2, 2, 3, 3, 3)
    assert not weight[np.broadcast_to(pruned, weight.shape)].any()
    assert weight[~np.broadcast_to(pruned, weight.shape)].any()
