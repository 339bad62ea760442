"""Ten models as others bring them: architectures of torchvision, facenet-pytorch and Keras, small ones.

The packages themselves are not among what the project needs: torchvision's wheels are for one build of torch,
facenet-pytorch asks for an old torch, TensorFlow is large. So the architectures are written down here, with
few channels and random weights. `tests/benchmarks/strangers.py` reads trained weights from packages.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers the operators of PT2E
from onnx import helper
from torch import Tensor, nn
from torch.nn import functional

import fheconv
from tests.support.onnx_files import exported, written


class Stranger(NamedTuple):
    """A model, the shape of its images, and which of its outputs is meant."""

    model: Any
    shape: tuple[int, ...]
    outputs: int | None = None


def convolution(before: int, channels: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
    """A convolution without bias, and BatchNorm with statistics of its own."""
    norm = nn.BatchNorm2d(channels)
    norm.running_var.uniform_(0.1, 0.4)
    return nn.Sequential(
        nn.Conv2d(before, channels, kernel, stride, kernel // 2, groups=groups, bias=False), norm
    )


class BasicBlock(nn.Module):
    """The block of torchvision's ResNet-18."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = convolution(before, channels, 3, stride), convolution(channels, channels)
        self.beside = convolution(before, channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.second(functional.relu(self.first(x))) + self.beside(x))


class Fire(nn.Module):
    """The module of torchvision's SqueezeNet."""

    def __init__(self, before: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(before, squeeze, 1)
        self.ones, self.threes = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.squeeze(x))
        return torch.cat([functional.relu(self.ones(x)), functional.relu(self.threes(x))], 1)


class SqueezeExcitation(nn.Module):
    """The gates of torchvision's MobileNetV3 and EfficientNet."""

    def __init__(self, channels: int, squeeze: int, activation: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, squeeze, 1), nn.Conv2d(squeeze, channels, 1)
        self.activation, self.gate = activation, gate

    def forward(self, x: Tensor) -> Tensor:
        mean = functional.adaptive_avg_pool2d(x, 1)
        return self.gate(self.up(self.activation(self.down(mean)))) * x


class InvertedResidual(nn.Module):
    """The block of MobileNetV3 and EfficientNet: wide, depthwise, gated, narrow."""

    def __init__(self, channels: int, wide: int, activation: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.widen, self.depthwise = convolution(channels, wide, 1), convolution(wide, wide, 3, groups=wide)
        self.gates = SqueezeExcitation(wide, 2, nn.ReLU(), gate)
        self.project, self.activation = convolution(wide, channels, 1), activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.depthwise(self.activation(self.widen(x))))
        return x + self.project(self.gates(y))


class PNet(nn.Module):
    """The proposal network of facenet-pytorch's MTCNN: a tuple of boxes and probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.MaxPool2d(2, 2, ceil_mode=True),
            nn.Conv2d(4, 4, 3), nn.PReLU(4), nn.Conv2d(4, 4, 3), nn.PReLU(4),
        )  # fmt: skip
        self.scores, self.boxes = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(x)
        return self.boxes(x), functional.softmax(self.scores(x), 1)


class ByHand(nn.Module):
    """A network trained for integers, rounding as Brevitas does: divide, round, clamp, multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 2, 3, stride=2), nn.Linear(18, 3)

    @staticmethod
    def weight(layer: Any) -> Tensor:
        steps = layer.weight.flatten(1).abs().amax(1).reshape(-1, *[1] * (layer.weight.ndim - 1)) / 3
        return torch.clamp(torch.round(layer.weight / steps), -3, 3) * steps

    def forward(self, x: Tensor) -> Tensor:
        x = torch.clamp(torch.round(x / 0.0667), 0, 15) * 0.0667
        x = torch.relu(functional.conv2d(x, self.weight(self.conv), self.conv.bias, stride=2))
        x = torch.clamp(torch.round(x / 0.1), 0, 7) * 0.1
        return functional.linear(x.flatten(1), self.weight(self.fc), self.fc.bias)


class Converted(nn.Module):
    """A network as PT2E leaves it: `quantize_per_tensor` and `dequantize_per_tensor` around everything."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("conv", torch.randint(-3, 4, (2, 1, 3, 3), dtype=torch.int8))
        self.register_buffer("fc", torch.randint(-3, 4, (3, 32), dtype=torch.int8))
        self.bias = nn.Parameter(torch.rand(3))

    @staticmethod
    def real(x: Tensor, scale: float, low: int, high: int, kind: torch.dtype) -> Tensor:
        return torch.ops.quantized_decomposed.dequantize_per_tensor(x, scale, 0, low, high, kind)

    def rounded(self, x: Tensor, scale: float) -> Tensor:
        x = torch.ops.quantized_decomposed.quantize_per_tensor(x, scale, 0, 0, 15, torch.uint8)
        return self.real(x, scale, 0, 15, torch.uint8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rounded(x, 0.0667)
        x = functional.conv2d(x, self.real(self.conv, 0.1, -3, 3, torch.int8), stride=2, padding=1)
        x = self.rounded(torch.relu(x), 0.11)
        return functional.linear(x.flatten(1), self.real(self.fc, 0.05, -3, 3, torch.int8), self.bias)


class Sequence(nn.Module):
    """A 1-D network with gated linear units, as for sound."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(1, 4, 5, 2), nn.Conv1d(2, 4, 3)
        self.last = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.glu(self.first(x), 1)
        return self.last(functional.glu(self.second(x), 1).mean(2))


def keras(folder: Path) -> Any:
    """A graph as tf2onnx writes one of Keras: images (n, 8, 8, 1), transposed around the convolutions."""
    rng = np.random.default_rng(0)
    weights = {
        "k": rng.normal(0, 0.4, (3, 1, 3, 3)).astype(np.float32),
        "b": rng.normal(0, 0.1, 3).astype(np.float32),
        "shape": np.array([-1, 27]),
        "m": rng.normal(0, 0.3, (27, 4)).astype(np.float32),
        "c": rng.normal(0, 0.1, 4).astype(np.float32),
    }
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "k", "b"], ["u"], kernel_shape=[3, 3]),
        helper.make_node("Relu", ["u"], ["r"]),
        helper.make_node("AveragePool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Transpose", ["p"], ["q"], perm=[0, 2, 3, 1]),
        helper.make_node("Reshape", ["q", "shape"], ["f"]),
        helper.make_node("MatMul", ["f", "m"], ["g"]),
        helper.make_node("Add", ["g", "c"], ["h"]),
        helper.make_node("Softmax", ["h"], ["y"], axis=-1),
    ]
    return fheconv.from_onnx(written(folder / "keras.onnx", nodes, ("n", 8, 8, 1), weights))


def classifier(folder: Path) -> Any:
    """A classifier that comes as a file of ONNX."""
    model = nn.Sequential(
        convolution(1, 4, 3, 2), nn.ReLU(), convolution(4, 4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.Softmax(1),
    ).eval()  # fmt: skip
    path = folder / "classifier.onnx"
    return fheconv.from_onnx(exported(model, torch.rand(2, 1, 8, 8), path, "new, any batch"))


def head(*layers: nn.Module, channels: int) -> nn.Module:
    """Layers, the mean of each channel, and scores of three classes."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


def _resnet(_: Path) -> Any:
    stem = convolution(3, 4), nn.ReLU()
    return head(*stem, BasicBlock(4, 4, 1), BasicBlock(4, 8, 2), channels=8)


def _squeezenet(_: Path) -> Any:
    stem = nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.MaxPool2d(2)
    made = head(*stem, Fire(4, 2, 4), Fire(8, 2, 4), channels=8)
    for part in made.modules():
        if isinstance(part, nn.Conv2d):  # as torchvision does
            nn.init.kaiming_uniform_(part.weight)
    return made


def _mobilenet(_: Path) -> Any:
    block = InvertedResidual(4, 8, nn.Hardswish(), nn.Hardsigmoid())
    return head(convolution(3, 4, 3, 2), nn.Hardswish(), block, channels=4)


def _efficientnet(_: Path) -> Any:
    return head(
        convolution(3, 4, 3, 2), nn.SiLU(), InvertedResidual(4, 8, nn.SiLU(), nn.Sigmoid()), channels=4
    )


_MODELS: dict[str, tuple[Callable[[Path], Any], tuple[int, ...], int | None]] = {
    "ResNet (torchvision)": (_resnet, (3, 8, 8), None),
    "SqueezeNet (torchvision)": (_squeezenet, (3, 12, 12), None),
    "MobileNetV3 (torchvision)": (_mobilenet, (3, 8, 8), None),
    "EfficientNet (torchvision)": (_efficientnet, (3, 8, 8), None),
    "PNet, its scores (facenet-pytorch)": (lambda _: PNet(), (3, 12, 12), 1),
    "classifier (ONNX)": (classifier, (1, 8, 8), None),
    "Keras (NHWC, as tf2onnx writes it)": (keras, (8, 8, 1), None),
    "trained for integers, by hand (Brevitas)": (lambda _: ByHand(), (1, 8, 8), None),
    "trained for integers (PT2E)": (lambda _: Converted(), (1, 8, 8), None),
    "gated 1-D network": (lambda _: Sequence(), (1, 24), None),
}
NAMES = tuple(_MODELS)


def stranger(name: str, folder: Path) -> Stranger:
    """Make one of the models; those that are files are written into a folder."""
    torch.manual_seed(0)
    make, shape, outputs = _MODELS[name]
    model = make(folder)
    return Stranger(model.eval() if isinstance(model, nn.Module) else model, shape, outputs)
