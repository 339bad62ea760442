"""Ten models as others bring them: most are of packages, the others are written as packages have them.

Architectures are those of pytorchcv, with few channels, and the mean in the place of their last pooling,
which is for images of 224 × 224. What is trained for integers was trained by Brevitas and by torchao.
Two are written down here: facenet-pytorch asks for an old torch, and TensorFlow is large.
`tests/benchmarks/strangers.py` reads trained weights from packages.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from onnx import helper
from pytorchcv.models.efficientnet import EfficientNet
from pytorchcv.models.jasper import Jasper
from pytorchcv.models.mobilenetv3 import MobileNetV3
from pytorchcv.models.resnet import ResNet
from pytorchcv.models.shufflenetv2 import ShuffleNetV2
from pytorchcv.models.squeezenet import SqueezeNet
from torch import Tensor, nn
from torch.nn import functional

import fheconv
from tests.support import makers
from tests.support.onnx_files import exported, written

CLASSES = 3


class Stranger(NamedTuple):
    """A model, the shape of its images, and which of its outputs is meant."""

    model: Any
    shape: tuple[int, ...]
    outputs: int | None = None


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


class Speech(nn.Module):
    """Jasper, a 1-D network that recognizes speech, on recordings of one length."""

    def __init__(self) -> None:
        super().__init__()
        blocks = 4
        self.jasper = Jasper(
            [4] * blocks, [3] * blocks, 1e-3, [0.0] * blocks, 1, False, False,
            from_audio=False, in_channels=2, num_classes=CLASSES,
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.jasper(x, torch.full((len(x),), x.shape[2]))


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


def settled(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The model for small images, with the statistics of BatchNorm that random images have."""
    features = getattr(model, "features", nn.Module())
    if hasattr(features, "final_pool"):
        features.final_pool = nn.AdaptiveAvgPool2d(1)
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.momentum = None  # the mean of all batches
    with torch.no_grad():
        model.train()(torch.rand(60, *shape))
    return model.eval()


def _resnet() -> nn.Module:
    return ResNet([[4], [8]], 4, bottleneck=False, conv1_stride=False, num_classes=CLASSES)


def _squeezenet() -> nn.Module:
    model = SqueezeNet([[8, 8]], [[0, 1]], 3, 4, num_classes=CLASSES)
    model.output.final_pool = nn.AdaptiveAvgPool2d(1)
    return model


def _mobilenet() -> nn.Module:
    channels, widened, *flags = [[4], [4]], [[4], [8]], [[1], [0]], [[1], [0]], [[1], [1]]
    return MobileNetV3(channels, widened, 4, 8, 8, *flags, True, False, num_classes=CLASSES)


def _efficientnet() -> nn.Module:
    return EfficientNet([[4], [4]], 4, 8, [[3], [3]], [2, 2], [[1], [2]], num_classes=CLASSES)


def _classifier(folder: Path) -> Any:
    """A classifier that comes as a file of ONNX."""
    shape = (1, 8, 8)
    network = ShuffleNetV2([[8]], 4, 8, in_channels=1, num_classes=CLASSES)
    model = nn.Sequential(settled(network, shape), nn.Softmax(1)).eval()
    path = folder / "classifier.onnx"
    return fheconv.from_onnx(exported(model, torch.rand(2, *shape), path, "new, any batch"))


# Networks that only have an architecture, the shape of their images, and which of their outputs is meant.
_ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int | None]] = {
    "ResNet (pytorchcv)": (_resnet, (3, 8, 8), None),
    "SqueezeNet (pytorchcv)": (_squeezenet, (3, 8, 8), None),
    "MobileNetV3 (pytorchcv)": (_mobilenet, (3, 12, 12), None),
    "EfficientNet (pytorchcv)": (_efficientnet, (3, 8, 8), None),
    "Jasper, 1-D (pytorchcv)": (Speech, (2, 16), 0),
    "PNet, its scores (facenet-pytorch)": (PNet, (3, 12, 12), 1),
}
# Models that come as they are; those that are files are written into a folder.
_FINISHED: dict[str, tuple[Callable[[Path], Any], tuple[int, ...]]] = {
    "ShuffleNetV2, a classifier (ONNX)": (_classifier, (1, 8, 8)),
    "Keras (NHWC, as tf2onnx writes it)": (keras, (8, 8, 1)),
    "trained for integers (Brevitas)": (lambda _: makers.trained_by_brevitas(), makers.SHAPE),
    "trained for integers (PT2E of torchao)": (lambda _: makers.trained_by_torchao(), makers.SHAPE),
}
NAMES = (*_ARCHITECTURES, *_FINISHED)


def stranger(name: str, folder: Path) -> Stranger:
    """Make one of the models; those that are files are written into a folder."""
    torch.manual_seed(2)  # with others, SqueezeNet may give zeros alone
    if name in _ARCHITECTURES:
        make, shape, outputs = _ARCHITECTURES[name]
        return Stranger(settled(make(), shape), shape, outputs)
    finished, shape = _FINISHED[name]
    return Stranger(finished(folder), shape)
