"""Ten models as others bring them: of packages, or trained by the tools of others.

Architectures are those of pytorchcv, with few channels, and the mean in the place of their last pooling,
which is for images of 224 × 224. What is trained for integers was trained by Brevitas and by torchao. Models
of packages that the project does not need are ONNX files in `tests/strangers`, and come with their weights.
`tests/benchmarks/strangers.py` reads trained weights from packages.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pytorchcv.models.efficientnet import EfficientNet
from pytorchcv.models.jasper import Jasper
from pytorchcv.models.mobilenetv3 import MobileNetV3
from pytorchcv.models.resnet import ResNet
from pytorchcv.models.squeezenet import SqueezeNet
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional

import fheconv
from tests.support import makers

CLASSES = 3
FILES = Path(__file__).parents[1] / "strangers"


class Stranger(NamedTuple):
    """A model, images of its kind, and which of its outputs is meant."""

    model: Any
    images: np.ndarray
    outputs: int | str | None = None


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


def crops(count: int, height: int, width: int) -> np.ndarray:
    """Squares and strips of photographs at several scales, (count, 3, height, width) in [−1, 1]."""
    rng = np.random.default_rng(0)
    photographs = [torch.tensor(image).movedim(-1, 0).float() for image in load_sample_images().images]
    found = []
    for scale in rng.integers(1, 9, count):
        photograph = photographs[rng.integers(len(photographs))]
        size = (scale * height, scale * width)
        top, left = (
            rng.integers(whole - part + 1) for whole, part in zip(photograph.shape[1:], size, strict=True)
        )
        part = photograph[:, top : top + size[0], left : left + size[1]]
        found.append(functional.interpolate(part[None], size=(height, width), mode="area")[0])
    return (torch.stack(found).numpy() - 127.5) / 128


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


# Networks that only have an architecture, the shape of their images, and which of their outputs is meant.
_ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int | None]] = {
    "ResNet (pytorchcv)": (_resnet, (3, 8, 8), None),
    "SqueezeNet (pytorchcv)": (_squeezenet, (3, 8, 8), None),
    "MobileNetV3 (pytorchcv)": (_mobilenet, (3, 12, 12), None),
    "EfficientNet (pytorchcv)": (_efficientnet, (3, 8, 8), None),
    "Jasper, 1-D (pytorchcv)": (Speech, (2, 16), 0),
}
# Files of trained models, the size of their images, and which of their outputs is meant.
_FILES: dict[str, tuple[str, tuple[int, int], str | None]] = {
    "PNet, its scores (facenet-pytorch)": ("pnet.onnx", (12, 12), "scores"),
    "PNet of Keras, its scores (mtcnn)": ("pnet-keras.onnx", (12, 12), "Identity_1:0"),
    "direction of text (rapidocr)": ("direction.onnx", (48, 8), None),
}
_TRAINED: dict[str, Callable[[], nn.Module]] = {
    "trained for integers (Brevitas)": makers.trained_by_brevitas,
    "trained for integers (PT2E of torchao)": makers.trained_by_torchao,
}
NAMES = (*_ARCHITECTURES, *_FILES, *_TRAINED)


def stranger(name: str, count: int) -> Stranger:
    """Make one of the models, with `count` images."""
    torch.manual_seed(2)  # with others, SqueezeNet may give zeros alone
    rng = np.random.default_rng(0)
    if name in _FILES:
        file, size, outputs = _FILES[name]
        model = fheconv.from_onnx(FILES / file)
        images = crops(count, *size)
        return Stranger(model, images if model.input_shape[0] == 3 else np.moveaxis(images, 1, -1), outputs)
    if name in _TRAINED:
        images = rng.uniform(0, 1, (count, *makers.SHAPE)).astype(np.float32)
        return Stranger(_TRAINED[name](), images)
    make, shape, outputs = _ARCHITECTURES[name]
    return Stranger(settled(make(), shape), rng.uniform(0, 1, (count, *shape)).astype(np.float32), outputs)
