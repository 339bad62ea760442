"""Quantizing with more bits gives a smaller error, or nearly the same."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fheconv
import train_rescnn_digits
import train_tinycnn_digits
from digits import SPLITS, validation_split

# Held-out errors of one bit more and of one bit less differ by chance, too.
CHANCE = 1.05
# Of 250 random networks, one was worse than this by one bit more of its weights, 1.21 times as bad.
GREATEST_CHANCE = 1.3


def error(module, images, calibrating, widths):
    """The squared error on images that do not calibrate, as a share of the variance, at (w, a, K) bits."""
    weights, activations, kept = widths
    config = fheconv.QuantConfig(
        overflow="defined", weight_bits=weights, activation_bits=activations, rounding_bits=kept, input_bits=6
    )
    network = fheconv.quantize(module, images[:calibrating], config)
    with torch.no_grad():
        meant = module(images[calibrating:]).numpy()
    return np.square(network(images[calibrating:]) - meant).mean(axis=0).sum() / meant.var(axis=0).sum()


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("model", [train_tinycnn_digits, train_rescnn_digits])
def test_no_setting_of_a_trained_network_is_worse_than_one_with_fewer_bits(model, split):
    module = model.shipped(split)
    images = validation_split(split).train_images[:700]
    tried = list(product((4, 6), (3, 4, 5), (3, 5, 6)))
    errors = {widths: error(module, images, 200, widths) for widths in tried}
    worse = [
        (few, more, errors[more] / errors[few])
        for few, more in product(tried, tried)
        if all(np.less_equal(few, more)) and errors[more] > CHANCE * errors[few]
    ]
    assert not worse


@pytest.mark.slow
@settings(max_examples=15)
@given(
    st.integers(0, 2**32),
    st.tuples(*[st.integers(3, 5)] * 3),
    st.sampled_from([one for one in product((0, 1), repeat=3) if any(one)]),
)
def test_random_networks_are_hardly_ever_worse_for_more_bits(seed, few, added):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    channels, first, second = (int(rng.integers(*ends)) for ends in ((1, 4), (4, 9), (4, 9)))
    activation = (nn.ReLU, nn.Tanh, nn.SiLU)[int(rng.integers(3))]
    stride = int(rng.integers(1, 3))
    module = nn.Sequential(
        nn.Conv2d(channels, first, int(rng.integers(2, 4)), stride=stride),
        activation(),
        nn.MaxPool2d(2) if stride == 1 else nn.Identity(),
        nn.Conv2d(first, second, 2),
        activation(),
        nn.Flatten(),
        nn.LazyLinear(5),
    ).eval()
    images = torch.rand(300, channels, 8, 8)
    module(images)  # now the last layer knows its size
    more = tuple(np.add(few, added).tolist())
    assert error(module, images, 100, more) <= GREATEST_CHANCE * error(module, images, 100, few)
