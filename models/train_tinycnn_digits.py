"""Train TinyCNN on the 8x8 digits: `python models/train_tinycnn_digits.py [--split SEED] [--output PATH]`.

Without `--output` nothing is written: the accuracy is printed beside that of the shipped weights.
With `--split` a validation part of the training images is left out, to choose things on.
The recipe (epochs, learning rate, warps) was chosen on a validation part of the training images;
the test images only measure the result.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional

import digits

NAME = "tinycnn-digits"
# Without warps and noise: 97.5 % in validation instead of 98.3 %.
RECIPE = digits.Recipe(epochs=100, batch=64, learning_rate=1e-2, weight_decay=1e-2, warp=0.1, noise=1.0)


class TinyCNN(nn.Module):
    """Three convolutions and a linear layer: (N, 1, 8, 8) pixels 0..16 to (N, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2)
        self.conv3 = nn.Conv2d(16, 32, 2)
        self.fc1 = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = functional.relu(self.conv1(x))
        x = functional.relu(self.conv2(x))
        x = functional.relu(self.conv3(x))
        return self.fc1(x.flatten(1))


def shipped(split: int | None = None) -> TinyCNN:
    """Load weights that lie beside this script: trained on all training images, or on those of a split."""
    return digits.load(TinyCNN(), NAME, split)


def train(split: int | None = None) -> TinyCNN:
    """Train on the training images alone: on all, or on those of a split."""
    return digits.train(TinyCNN, RECIPE, split)


def architecture(model: TinyCNN) -> list[digits.Entry]:
    """Describe the layers in the order in which they are applied."""
    return [
        digits.entry(model, "conv1", stride=1, padding=0),
        {"kind": "ReLU"},
        digits.entry(model, "conv2", stride=2, padding=0),
        {"kind": "ReLU"},
        digits.entry(model, "conv3", stride=1, padding=0),
        {"kind": "ReLU"},
        {"kind": "Flatten"},
        digits.entry(model, "fc1"),
    ]


def write(model: TinyCNN, path: Path, split: int | None = None) -> None:
    """Write `model`, just trained, to `path` and its card beside it."""
    digits.write(model, path, architecture(model), Path(__file__), RECIPE, split)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, compare with the shipped weights, and write what was trained if asked to."""
    digits.run(shipped, train, write, arguments)


if __name__ == "__main__":
    main()
