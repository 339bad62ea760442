"""Train ResCNN on the 8x8 digits: `python models/train_rescnn_digits.py [--split SEED] [--output PATH]`.

Without `--output` nothing is written: the accuracy is printed beside that of the shipped weights.
With `--split` a validation part of the training images is left out, to choose things on.
The recipe (epochs, learning rate, warps) and the numbers of channels were chosen on validation parts of the
training images (four folds: 98.6 % right); the test images only measure the result.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional

import digits

NAME = "rescnn-digits"
# In validation, TinyCNN's larger warp costs this network almost a point. Stronger noise and weight decay than
# TinyCNN's cost nothing in float, and gain almost a point with 4-bit weights and activations.
RECIPE = digits.Recipe(epochs=100, batch=64, learning_rate=2e-2, weight_decay=1e-1, warp=0.05, noise=2.0)


class ResCNN(nn.Module):
    """What larger networks are made of: (N, 1, 8, 8) pixels 0..16 to (N, 10) logits.

    Encrypted, each element of an activation costs a table lookup. So the first pooling comes before its
    activation, and the dilated convolution leaves 2x2 positions: 128 + 128 + 64 = 320 elements per image.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding="same", bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.pool = nn.AvgPool2d(2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.pointwise = nn.Conv2d(8, 8, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.dilated = nn.Conv2d(8, 16, 3, padding=1, dilation=2, bias=False)
        self.bn3 = nn.BatchNorm2d(16)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = functional.relu(self.pool(self.bn1(self.conv1(x))))
        x = functional.relu(x + self.bn2(self.pointwise(self.depthwise(x))))
        x = functional.relu(self.bn3(self.dilated(x)))
        return self.fc1(self.mean(x).flatten(1))


def shipped(split: int | None = None) -> ResCNN:
    """Load weights that lie beside this script: trained on all training images, or on those of a split."""
    return digits.load(ResCNN(), NAME, split)


def train(split: int | None = None) -> ResCNN:
    """Train on the training images alone: on all, or on those of a split."""
    return digits.train(ResCNN, RECIPE, split)


def architecture(model: ResCNN) -> list[digits.Entry]:
    """Describe the layers in the order in which they are applied; an Add names what it adds."""
    return [
        digits.entry(model, "conv1", stride=1, padding="same"),
        digits.entry(model, "bn1", eps=model.bn1.eps),
        digits.entry(model, "pool", kernel_size=2),
        {"name": "relu1", "kind": "ReLU"},
        digits.entry(model, "depthwise", stride=1, padding=1, groups=8),
        digits.entry(model, "pointwise", stride=1, padding=0),
        digits.entry(model, "bn2", eps=model.bn2.eps),
        {"kind": "Add", "inputs": ["relu1", "bn2"]},
        {"kind": "ReLU"},
        digits.entry(model, "dilated", stride=1, padding=1, dilation=2),
        digits.entry(model, "bn3", eps=model.bn3.eps),
        {"kind": "ReLU"},
        digits.entry(model, "mean", output_size=1),
        {"kind": "Flatten"},
        digits.entry(model, "fc1"),
    ]


def write(model: ResCNN, path: Path, split: int | None = None) -> None:
    """Write `model`, just trained, to `path` and its card beside it."""
    digits.write(model, path, architecture(model), Path(__file__), RECIPE, split)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, compare with the shipped weights, and write what was trained if asked to."""
    digits.run(shipped, train, write, arguments)


if __name__ == "__main__":
    main()
