"""Numbers that a module reads from its own weights are known when it is traced; those of images are not."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import fheconv
from fheconv.capture.model import capture

IMAGES = np.random.default_rng(0).uniform(-1, 1, (4, 1, 5, 5)).astype(np.float32)


class Reads(nn.Module):
    """Reads numbers in the ways of those who write training for integers by hand."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.plain = nn.Conv2d(1, 2, 3), torch.tensor(0.5)
        self.register_buffer("started", torch.tensor(1))

    def forward(self, x):
        if self.started == 0:
            raise RuntimeError("the first batch, which sets scales")
        if not torch.allclose(self.plain, self.plain.clone()) or bool((self.started != 1).any()):
            x = x + 1
        weight, size = self.conv.weight, float(self.conv.weight.abs().max())
        weight = torch.fake_quantize_per_tensor_affine(weight, size / 3, int(self.started) - 1, -3, 3)
        return functional.conv2d(x, weight, self.conv.bias * self.plain.item())


def test_numbers_of_weights_are_constants():
    model = Reads()
    with torch.no_grad():
        expected = model(torch.tensor(IMAGES)).numpy()
    np.testing.assert_allclose(capture(model, (1, 5, 5))(IMAGES), expected, atol=1e-5)
    assert capture(model, (1, 5, 5)).trained


class Watches(nn.Module):
    """Keeps a statistic of the images in a buffer, and reads it."""

    def __init__(self, read):
        super().__init__()
        self.conv, self.read = nn.Conv2d(1, 1, 1), read
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        return self.conv(x) * (2 if self.read(self, x) else 1)


@pytest.mark.parametrize(
    "read",
    [
        lambda self, x: x.abs().max() > 1e6,
        lambda self, x: self.conv.weight.max() > 1e6 or x.sum() > 1e6,
        lambda self, x: self.seen.copy_(x.abs().max()) > 1e6,
        lambda self, x: self.seen.view(1).copy_(x.amax()[None]).sum() and self.seen > 1e6,
    ],
    ids=["image", "weight, then image", "changed buffer", "changed through a view"],
)
def test_numbers_of_images_stay_refused(read):
    with pytest.raises(fheconv.UnsupportedLayerError, match=r"depends on the values of the image|differ"):
        capture(Watches(read), (1, 5, 5))
