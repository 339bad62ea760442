"""Images whose channel axis is missing, or last, are recognised by the first convolution."""

import numpy as np
import pytest
import torch
from torch import nn

import fheconv

GREY = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 36, 3))
COLOUR = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 36, 3))
TWO = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 36, 3))
SIGNAL = nn.Sequential(nn.Conv1d(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 6, 3))


class Functional(nn.Module):
    """A model whose convolution is no module."""

    def forward(self, x):
        return nn.functional.conv2d(x, torch.ones(1, 1, 3, 3)).relu()


def exported(module, *shape):
    batch = {0: torch.export.Dim("batch")}
    return torch.export.export(module, (torch.zeros(2, *shape),), dynamic_shapes=(batch,))


CASES = {
    "grey without an axis": (GREY, (5, 8, 8), r"\(n, 8, 8\).*\(n, 1, M, N\).*missing.*images\[:, None\]"),
    "grey, axis last": (GREY, (5, 8, 8, 1), r"\(n, 8, 8, 1\).*is last.*images.transpose\(0, 3, 1, 2\)"),
    "colour, axis last": (COLOUR, (5, 8, 8, 3), r"\(n, 8, 8, 3\).*is last.*images.transpose\(0, 3, 1, 2\)"),
    "colour without an axis": (COLOUR, (5, 8, 8), r"\(n, 8, 8\).*missing.*\(n, 3, \.\.\.\)"),
    "as many channels as images in a batch": (TWO, (5, 8, 8), r"missing.*\(n, 2, \.\.\.\)"),
    "signals, axis last": (SIGNAL, (5, 8, 2), r"\(n, 8, 2\).*\(n, 2, M\).*images.transpose\(0, 2, 1\)"),
    "exported": (exported(GREY, 1, 8, 8), (5, 8, 8), r"missing.*images\[:, None\]"),
    "exported, axis last": (exported(COLOUR, 3, 8, 8), (5, 8, 8, 3), r"images.transpose\(0, 3, 1, 2\)"),
    "a convolution": (nn.Conv2d(1, 2, 3), (5, 8, 8), r"\(5, 8, 8\).*missing.*images\[:, None\]"),
    "a convolution, axis last": (nn.Conv2d(3, 2, 3), (5, 8, 8, 3), r"images.transpose\(0, 3, 1, 2\)"),
    "a convolution, one image": (nn.Conv2d(3, 2, 3), (8, 8, 3), r"images.transpose\(2, 0, 1\)"),
}


@pytest.mark.parametrize(("model", "shape", "words"), CASES.values(), ids=CASES)
def test_the_channel_axis_is_named_with_the_remedy(model, shape, words):
    with pytest.raises(fheconv.FheConvError, match=words) as caught:
        fheconv.quantize(model, np.random.default_rng(0).random(shape))
    assert "The channel axis" in str(caught.value)


@pytest.mark.parametrize(("model", "shape"), [(GREY, (5, 8, 8)), (COLOUR, (5, 8, 8, 3))])
def test_the_remedy_helps(model, shape):
    images = np.random.default_rng(0).random(shape)
    right = images[:, None] if len(shape) == 3 else images.transpose(0, 3, 1, 2)
    network = fheconv.quantize(model, right)
    assert network(right).shape == (5, 3)
    with pytest.raises(fheconv.InputRangeError, match="channel axis"):
        network(images)


def test_training_mode_and_hooks_stay_as_they_were():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout()).train()
    with pytest.raises(fheconv.UnsupportedLayerError, match="channel axis"):
        fheconv.quantize(model, np.ones((5, 8, 8)))
    assert all(part.training and not part._forward_pre_hooks for part in model.modules())


def test_other_wrong_sizes_are_not_blamed_on_the_axis():
    with pytest.raises(fheconv.UnsupportedLayerError) as caught:
        fheconv.quantize(GREY, np.ones((5, 1, 9, 9)))
    assert "channel axis" not in str(caught.value)


def test_a_convolution_that_is_no_module_gets_torchs_words():
    with pytest.raises(fheconv.UnsupportedLayerError, match="cannot be run on images"):
        fheconv.quantize(Functional(), np.ones((5, 8, 8, 1)))
