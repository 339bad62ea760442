"""What the training scripts share: scikit-learn's 8x8 digits, training, cards, command line."""

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

Model = TypeVar("Model", bound=nn.Module)
# A card, or an entry of its "architecture".
Entry = dict[str, object]
# The seeds of the validation splits for which weights are shipped.
SPLITS = (0, 1, 2)
# The points of the grid that `warped` bends images by, along each axis.
BENDS = 5


class Digits(NamedTuple):
    """The split, in the order of `train_test_split`: 1347 images to train on, 450 held out."""

    train_images: Tensor
    test_images: Tensor
    train_labels: Tensor
    test_labels: Tensor


class Split(NamedTuple):
    """A validation split of the training images: 1077 to train on, 270 left out, to choose things on.

    The recipes of the scripts are older than these splits: they were chosen on parts of all 1347.
    """

    train_images: Tensor
    validation_images: Tensor
    train_labels: Tensor
    validation_labels: Tensor


class Recipe(NamedTuple):
    """How `train` trains. Choose it on a part of the training images: the test images only measure."""

    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float
    warp: float
    noise: float
    bend: float = 0.0
    seed: int = 0


def digits() -> Digits:
    """Load scikit-learn's digits as float32 (N, 1, 8, 8), pixels 0..16 not rescaled."""
    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.as_tensor(data.target)
    return Digits(*train_test_split(images, labels, test_size=0.25, shuffle=True, random_state=42))


def validation_split(seed: int) -> Split:
    """Split the training images, each class in proportion. No test image is among them."""
    data = digits()
    images, labels = data.train_images, data.train_labels
    return Split(*train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=seed))


def parts(split: int | None) -> Digits | Split:
    """Load the training images: all, beside the test images, or those of a split, beside its others."""
    return digits() if split is None else validation_split(split)


def held_out(split: int | None) -> tuple[Tensor, Tensor]:
    """Images and labels to measure on: the test images, or the validation images of a split."""
    _, images, _, labels = parts(split)
    return images, labels


def evaluate(model: nn.Module, split: int | None = None) -> float:
    """Fraction of `held_out(split)` that `model`, put into evaluation mode, classifies rightly."""
    return accuracy(model, *held_out(split))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Fraction of `images` that `model`, put into evaluation mode, classifies rightly."""
    with torch.inference_mode():
        right = model.eval()(images).argmax(1) == labels
    return int(right.sum()) / len(right)


def warped(images: Tensor, warp: float, noise: float, bend: float = 0.0) -> Tensor:
    """Images under small random affine maps and pixel noise: without them, 1347 are learned by heart.

    With `bend`, strokes bend too: the points of a coarse grid move each on its own, and others smoothly
    between them (Simard et al. 2003, "Best practices for convolutional neural networks applied to visual
    document analysis").
    """
    maps = torch.eye(2, 3) + warp * torch.randn(len(images), 2, 3)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    if bend:
        coarse = bend * torch.randn(len(images), 2, BENDS, BENDS)
        moves = functional.interpolate(coarse, images.shape[2:], mode="bicubic", align_corners=True)
        grid = grid + moves.permute(0, 2, 3, 1)
    moved = functional.grid_sample(images, grid, align_corners=False)
    return moved + noise * torch.randn_like(moved)


def fit(model: Model, recipe: Recipe, images: Tensor, labels: Tensor) -> Model:
    """Train a model that has its first weights, for a fixed number of epochs."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    batches = -(-len(images) // recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, total_steps=recipe.epochs * batches
    )
    for _ in range(recipe.epochs):
        for batch in torch.randperm(len(images)).split(recipe.batch):
            logits = model(warped(images[batch], recipe.warp, recipe.noise, recipe.bend))
            loss = functional.cross_entropy(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def train(network: Callable[[], Model], recipe: Recipe, split: int | None) -> Model:
    """Train a new `network()` on all training images, or on those of a split."""
    torch.manual_seed(recipe.seed)
    data = parts(split)
    return fit(network(), recipe, data.train_images, data.train_labels)


def entry(model: nn.Module, name: str, **options: object) -> Entry:
    """Describe the layer `name` of `model`: its kind, the shapes of its tensors, and `options`."""
    layer = model.get_submodule(name)
    shapes = {part: list(tensor.shape) for part, tensor in layer.state_dict().items()}
    return {"name": name, "kind": type(layer).__name__, **shapes, **options}


def weights(name: str, split: int | None) -> Path:
    """Where the shipped weights `name` lie: those trained on all training images, or on those of a split."""
    stem = name if split is None else f"{name}-split{split}"
    return Path(__file__).with_name(f"{stem}.safetensors")


def load(model: Model, name: str, split: int | None) -> Model:
    """Put the shipped weights `name` into `model`."""
    model.load_state_dict(load_file(weights(name, split)))
    return model.eval()


def measured(model: nn.Module, split: int | None) -> Entry:
    """Describe how `model` does on the held-out images."""
    images = len(held_out(split)[0])
    accuracy = evaluate(model, split)
    if split is None:
        part, what, call = "test", "held-out quarter of the split", "evaluate()"
    else:
        part, what, call = "validation", "images left out of training", f"evaluate(split={split})"
    return {
        "value": round(accuracy, 4),
        "right_answers": round(accuracy * images),
        f"{part}_images": images,
        "how_measured": f"Top-1 of the float32 model on the {what}, by {call} in models/digits.py.",
    }


def left_out(split: int) -> str:
    """Say what a model was trained on, and what not."""
    of_split = validation_split(split)
    trained, out = len(of_split.train_images), len(of_split.validation_images)
    return (
        f"Of the {trained + out} training images, {out} were left out, as validation images: "
        f"train_test_split(test_size=0.2, stratify=labels, random_state={split})."
    )


def card(
    model: nn.Module, path: Path, architecture: Sequence[Entry], how_trained: str, split: int | None
) -> Entry:
    """Describe `model`, whose weights are in `path`."""
    data = (
        "UCI Optical Recognition of Handwritten Digits as shipped by scikit-learn "
        "(load_digits), pixels not rescaled, "
        "train_test_split(test_size=0.25, shuffle=True, random_state=42)."
    )
    accuracies = {"accuracy": measured(model, None)}
    if split is not None:
        data = f"{data} {left_out(split)}"
        accuracies["validation_accuracy"] = measured(model, split)
    return {
        "name": path.stem,
        "file": path.name,
        "architecture": architecture,
        "input_shape": [1, 8, 8],
        "input_range": [0, 16],
        "data": data,
        "licence": "Data: UCI Optical Recognition of Handwritten Digits, CC BY 4.0.",
        **accuracies,
        "how_trained": how_trained,
        "sha256": sha256(path),
    }


def write(
    model: nn.Module,
    path: Path,
    architecture: Sequence[Entry],
    script: Path,
    recipe: Recipe,
    split: int | None,
) -> None:
    """Write `model`, just trained by `script`, to `path` and its card beside it."""
    save_file(model.state_dict(), path)
    option = "" if split is None else f" --split {split}"
    how = f"By models/{script.name}{option}: AdamW, {recipe.epochs} epochs, seed {recipe.seed}."
    write_card(card(model, path, architecture, how, split), path)


def write_card(card: Entry, path: Path) -> None:
    """Write the card of the weights in `path` beside them."""
    path.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Return the checksum of a file, for its card."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_output(parser: argparse.ArgumentParser, output: Path | None) -> None:
    """Refuse an output that cannot be written before the training, not after it."""
    if output is not None and output.suffix != ".safetensors":
        parser.error(f"--output must end in .safetensors, got {output}")
    if output is not None and not output.parent.is_dir():
        parser.error(f"--output: there is no folder {output.parent}")


def run(
    shipped: Callable[[int | None], Model],
    train: Callable[[int | None], Model],
    write: Callable[[Model, Path, int | None], None],
    arguments: Sequence[str] | None,
) -> None:
    """Train, compare with the shipped weights, and write what was trained if asked to."""
    parser = argparse.ArgumentParser(description="Train on scikit-learn's digits.")
    parser.add_argument("--output", type=Path, help="a .safetensors file; its card goes beside it")
    parser.add_argument(
        "--split", type=int, choices=SPLITS, help="leave the validation images of this split out of training"
    )
    options = parser.parse_args(arguments)
    output: Path | None = options.output
    split: int | None = options.split
    check_output(parser, output)

    reference = f"{evaluate(shipped(split), split):.2%}"
    model = train(split)
    print(f"trained now: {evaluate(model, split):.2%} of the held-out images, shipped: {reference}")
    if output is not None:
        write(model, output, split)
        print(f"wrote {output} and its card")
