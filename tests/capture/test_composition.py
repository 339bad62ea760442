"""Layers in a row with no activation between them become convolutions, with few weights."""

import numpy as np
import pytest
import torch
from torch import nn

from fheconv.capture.model import capture
from fheconv.networks.floats import Layer
from tests.support.captured import Fn, check, cost
from tests.support.weighing import weights


def conv(i, o, k=3, **options):
    return nn.Conv2d(i, o, k, **options)


@pytest.mark.parametrize(
    ("layers", "shape", "filter_"),
    [
        ([conv(1, 1), conv(1, 1)], (1, 32, 32), (1, 1, 5, 5)),
        ([conv(2, 3, padding=1), conv(3, 4)], (2, 9, 9), (4, 2, 5, 5)),
        ([conv(8, 8, (3, 1)), conv(8, 8, (1, 3))], (8, 64, 64), (8, 8, 3, 3)),
        ([conv(1, 2, stride=2), conv(2, 3, stride=3)], (1, 32, 32), (3, 1, 7, 7)),
        ([conv(1, 2, dilation=2), conv(2, 3, dilation=4)], (1, 32, 32), (3, 1, 7, 7)),
        ([conv(4, 4, groups=4), conv(4, 8, groups=4)], (4, 9, 9), (8, 1, 5, 5)),
        ([conv(4, 4, groups=4), conv(4, 4, groups=2)], (4, 9, 9), (4, 2, 5, 5)),
        ([conv(4, 8, groups=4), conv(8, 3, 1)], (4, 9, 9), (3, 4, 3, 3)),
        ([conv(1, 2), conv(2, 2), conv(2, 1)], (1, 20, 20), (1, 1, 7, 7)),
        ([conv(1, 2), nn.AvgPool2d(2), conv(2, 3)], (1, 20, 20), (3, 1, 8, 8)),
        ([nn.Conv1d(1, 2, 3), nn.Conv1d(2, 2, 3)], (1, 50), (2, 1, 5)),
        ([nn.Conv3d(1, 1, 2), nn.Conv3d(1, 1, 2)], (1, 5, 5, 5), (1, 1, 3, 3, 3)),
    ],
)
@pytest.mark.sampled(3)
def test_convolutions_with_nothing_in_between_are_one(layers, shape, filter_):
    network = check(nn.Sequential(*layers), shape)
    (layer,) = network.layers
    (term,) = layer.terms
    assert term.weighted()[1].weight.shape == filter_
    assert weights(check(nn.Sequential(*layers, nn.ReLU()), shape)) == np.prod(filter_)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("layers", "shape", "most"),
    [
        # With padding of one in between: the middle, four sides, four corners.
        ([conv(1, 4, padding=1), conv(4, 6, padding=1)], (1, 64, 64), 9 * 6 * 25),
        ([conv(1, 2, 5, padding=2), conv(2, 2, 5, padding=2)], (1, 32, 32), 25 * 2 * 81),
        ([conv(1, 2), conv(2, 2, stride=2, padding=1)], (1, 33, 33), 9 * 2 * 25),
        # Upsampling in between: every other output sees the same weights.
        ([conv(1, 2), nn.ConvTranspose2d(2, 2, 2, stride=2)], (1, 16, 16), 4 * 2 * 9),
        ([nn.ConvTranspose2d(1, 2, 3, stride=2), conv(2, 2)], (1, 16, 16), 4 * 2 * 9),
        # More kinds of borders than terms are worth: each of the outputs has weights of its own.
        (
            [conv(1, 2, padding=1), nn.Upsample(scale_factor=2, mode="bilinear")],
            (1, 16, 16),
            32 * 32 * 2 * 16,
        ),
        ([conv(1, 2, padding=1, padding_mode="reflect"), conv(2, 2)], (1, 40, 40), 30 * 2 * 25),
        ([conv(1, 2), nn.ZeroPad2d(1), conv(2, 2)], (1, 32, 32), 9 * 2 * 25),
    ],
)
def test_borders_cost_no_more_than_their_own_filters(layers, shape, most):
    network = check(nn.Sequential(*layers), shape)
    assert cost(network) == 0
    assert weights(network) <= most


def test_a_narrow_layer_between_wide_ones_is_looked_up():
    """400 × 2 and 2 × 3000 weights and 2 lookups, not 400 × 3000 weights."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(400, 2), nn.Linear(2, 3000))
    network = check(model, (1, 20, 20))
    assert cost(network) == 2
    assert weights(network) == 400 * 2 + 2 * 3000


def test_what_reads_a_cut_twice_looks_it_up_once():
    def twice(m, x):
        y = m.a(x.flatten(1))
        return m.b(y) + m.c(y).flip(1)

    model = Fn(twice, a=nn.Linear(400, 2), b=nn.Linear(2, 3000), c=nn.Linear(2, 3000))
    assert cost(check(model, (1, 20, 20))) == 2


def test_a_product_too_large_to_hold_is_cut():
    model = nn.Sequential(nn.Flatten(), nn.Linear(10_000, 30, bias=False), nn.Linear(30, 10_000))
    network = check(model, (1, 100, 100))
    assert [layer.bias.size for layer in network.layers] == [30, 10_000]
    names = [layer.name for layer in network.layers]
    assert len(set(names)) == 2


def test_convolutions_of_photographs_in_a_row():
    """Dense, it would have been 150,528 × 1,605,632 weights."""
    network = capture(nn.Sequential(conv(3, 16, padding=1), conv(16, 32, padding=1)), (3, 224, 224))
    assert weights(network) <= 9 * 32 * 3 * 25
    assert all(isinstance(layer, Layer) for layer in network.layers)


def test_outputs_that_read_padding_alone():
    check(nn.Sequential(conv(1, 1, 1), conv(1, 1, 1, padding=2)), (1, 3, 3))
    check(nn.Sequential(conv(1, 2, 1, padding=3), conv(2, 1, 1, padding=2), nn.ReLU()), (1, 2, 2))
    # Cropped to the padding, nothing is left but the biases.
    model = Fn(lambda m, x: m.b(m.a(x))[:, :, :1, :1], a=conv(1, 1, 1), b=conv(1, 1, 1, padding=2))
    check(model, (1, 3, 3))


def test_sums_of_products():
    parts = {"a": conv(1, 2, padding=1), "b": conv(2, 2, padding=1), "c": conv(1, 2)}
    check(Fn(lambda m, x: m.b(m.a(x))[:, :, 1:-1, 1:-1] + m.c(x), **parts), (1, 8, 8))
    check(Fn(lambda m, x: m.b(torch.relu(m.a(x)) + m.a(x)), **parts), (1, 8, 8))
    check(Fn(lambda m, x: m.b(m.a(x).flip(2)) + m.b(m.a(x).flip(3)), **parts), (1, 8, 8))


def residual(m, x):
    for layer in m.layers:
        x = x + layer(x)
    return x


@pytest.mark.slow
def test_residual_sums_with_nothing_in_between():
    """Each doubles the terms of the sum before. Terms alike become one, and sums of many products are cut."""
    network = check(Fn(residual, layers=nn.ModuleList(conv(4, 4, 1) for _ in range(14))), (4, 5, 5))
    assert weights(network) == 4 + 4 * 4
    assert cost(network) == 0
    wide = nn.ModuleList(conv(2, 2, padding=1) for _ in range(12))
    network = check(Fn(residual, layers=wide), (2, 6, 6))
    assert sum(len(layer.terms) for layer in network.layers) < 2000


def test_convolutions_side_by_side_are_one():
    parts = {"a": conv(1, 2), "b": conv(1, 2)}
    network = check(Fn(lambda m, x: 2 * m.a(x) - m.b(x), **parts), (1, 6, 6))
    assert weights(network) == 2 * 9
