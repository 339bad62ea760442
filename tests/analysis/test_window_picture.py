"""The picture of a window shows the accumulators, the window, the worst case and what the lookup gives."""

import numpy as np
import pytest

import fheconv
from fheconv.analysis import plots
from fheconv.networks.bounds import layer_bounds
from tests.support.nets import quantized, random_net

pytestmark = pytest.mark.usefixtures("_closes_figures")


@pytest.fixture
def _closes_figures():
    yield
    plots.plt.close("all")


@pytest.mark.parametrize("overflow", ["defined", "proved"])
def test_the_picture_shows_what_the_network_computes(overflow):
    network = quantized(0, overflow=overflow, rounding_bits=4)
    _, images = random_net(0)
    layer = network.layers[0]
    for channel in range(layer.shape[0]):
        ax = plots.window(network, images, layer.name, channel)
        accumulators = layer.accumulate(network.tensors(network.quantize_input(images)[0])[:1])[:, channel]
        (bars,) = ax.containers
        assert sum(bar.get_height() for bar in bars) == accumulators.size
        bounds = layer_bounds(layer, network.shapes)
        ends = {int(line.get_xdata()[0]) for line in ax.lines if len(line.get_xdata())}
        assert ends == {int(bounds.channel_minimum[channel]), int(bounds.channel_maximum[channel])}
        (line,) = ax.figure.axes[-1].lines
        x, y = np.asarray(line.get_xdata(), np.int64), line.get_ydata()
        everywhere = np.broadcast_to(
            x.reshape(-1, *[1] * len(layer.shape)), (len(x), *layer.shape)
        )  # every accumulator of the layer is x
        given = layer.lookup(everywhere)[(slice(None), channel, *[0] * (len(layer.shape) - 1))]
        np.testing.assert_allclose(y, (given - layer.lookup.output.zero_point) * layer.lookup.output.scale)
        assert x[0] <= accumulators.min()
        assert x[-1] >= accumulators.max()


def test_without_a_name_it_is_the_first_layer_with_a_lookup():
    network = quantized(0, overflow="defined", rounding_bits=4)
    assert repr(network.layers[0].name) in plots.window(network, random_net(0)[1]).get_xlabel()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "nowhere"}, "layer is 'nowhere', and must be one that has a lookup: "),
        ({"channel": 99}, r"channel is 99; layer .+ has the channels 0 to "),
        ({"channel": -1}, "channel is -1"),
    ],
)
def test_what_there_is_not_is_refused(options, message):
    with pytest.raises(fheconv.InvalidArgumentError, match=message):
        plots.window(quantized(0, rounding_bits=4), random_net(0)[1], **options)


def test_a_network_without_lookups_has_no_picture():
    filter_alone = fheconv.quantize(np.ones((1, 1, 2, 2)), np.ones((1, 1, 3, 3)))
    with pytest.raises(fheconv.InvalidArgumentError, match="there is none"):
        plots.window(filter_alone, np.ones((1, 1, 3, 3)))
    with pytest.raises(fheconv.InvalidArgumentError, match=r"must be what fheconv\.quantize returns"):
        plots.window(None, np.ones((1, 1, 3, 3)))
