"""What the scripts that train on scikit-learn's 8x8 digits share: data, training, cards, command line."""

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

Model = TypeVar("Model", bound=nn.Module)
# One entry of a card's "architecture".
Entry = dict[str, object]


class Digits(NamedTuple):
    """The split, in the order of `train_test_split`: 1347 images to train on, 450 held out."""

    train_images: Tensor
    test_images: Tensor
    train_labels: Tensor
    test_labels: Tensor


class Recipe(NamedTuple):
    """How `train` trains. Choose it on a part of the training images: the test images only measure."""

    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float
    warp: float
    noise: float
    seed: int = 0


def digits() -> Digits:
    """Load scikit-learn's digits as float32 (N, 1, 8, 8), pixels 0..16 not rescaled."""
    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.as_tensor(data.target)
    parts = train_test_split(images, labels, test_size=0.25, shuffle=True, random_state=42)
    return Digits(*parts)


def evaluate(model: nn.Module) -> float:
    """Fraction of the held-out images that `model`, put into evaluation mode, classifies rightly."""
    data = digits()
    with torch.inference_mode():
        right = model.eval()(data.test_images).argmax(1) == data.test_labels
    return int(right.sum()) / len(right)


def warped(images: Tensor, warp: float, noise: float) -> Tensor:
    """Images under small random affine maps and pixel noise: without them, 1347 are learned by heart."""
    maps = torch.eye(2, 3) + warp * torch.randn(len(images), 2, 3)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, align_corners=False)
    return moved + noise * torch.randn_like(moved)


def train(network: Callable[[], Model], recipe: Recipe) -> Model:
    """Train a new `network()` for a fixed number of epochs on the training images alone."""
    torch.manual_seed(recipe.seed)
    data = digits()
    model = network()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    batches = -(-len(data.train_images) // recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, total_steps=recipe.epochs * batches
    )
    for _ in range(recipe.epochs):
        for batch in torch.randperm(len(data.train_images)).split(recipe.batch):
            logits = model(warped(data.train_images[batch], recipe.warp, recipe.noise))
            loss = functional.cross_entropy(logits, data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def entry(model: nn.Module, name: str, **options: object) -> Entry:
    """Describe the layer `name` of `model`: its kind, the shapes of its tensors, and `options`."""
    layer = model.get_submodule(name)
    shapes = {part: list(tensor.shape) for part, tensor in layer.state_dict().items()}
    return {"name": name, "kind": type(layer).__name__, **shapes, **options}


def card(path: Path, architecture: Sequence[Entry], accuracy: float, how_trained: str) -> dict[str, object]:
    """Describe the weights in `path`."""
    images = len(digits().test_images)
    return {
        "name": path.stem,
        "file": path.name,
        "architecture": architecture,
        "input_shape": [1, 8, 8],
        "input_range": [0, 16],
        "data": "UCI Optical Recognition of Handwritten Digits as shipped by scikit-learn "
        "(load_digits), pixels not rescaled, "
        "train_test_split(test_size=0.25, shuffle=True, random_state=42).",
        "licence": "Data: UCI Optical Recognition of Handwritten Digits, CC BY 4.0.",
        "accuracy": {
            "value": round(accuracy, 4),
            "right_answers": round(accuracy * images),
            "test_images": images,
            "how_measured": "Top-1 of the float32 model on the held-out quarter of the split, by "
            "evaluate() in models/digits.py.",
        },
        "how_trained": how_trained,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def write(model: nn.Module, path: Path, architecture: Sequence[Entry], script: Path, recipe: Recipe) -> None:
    """Write `model`, just trained by `script`, to `path` and its card beside it."""
    save_file(model.state_dict(), path)
    how = f"By models/{script.name}: AdamW, {recipe.epochs} epochs, seed {recipe.seed}."
    text = json.dumps(card(path, architecture, evaluate(model), how), indent=2) + "\n"
    path.with_suffix(".json").write_text(text, encoding="utf-8")


def run(
    shipped: Callable[[], Model],
    train: Callable[[], Model],
    write: Callable[[Model, Path], None],
    arguments: Sequence[str] | None,
) -> None:
    """Train, compare with the shipped weights, and write what was trained if asked to."""
    parser = argparse.ArgumentParser(description="Train on scikit-learn's digits.")
    parser.add_argument("--output", type=Path, help="a .safetensors file; its card goes beside it")
    output: Path | None = parser.parse_args(arguments).output
    # Refused here, not after the training.
    if output is not None and output.suffix != ".safetensors":
        parser.error(f"--output must end in .safetensors, got {output}")
    if output is not None and not output.parent.is_dir():
        parser.error(f"--output: there is no folder {output.parent}")

    reference = f"{evaluate(shipped()):.2%}"
    model = train()
    print(f"trained now: {evaluate(model):.2%} of the held-out images, shipped: {reference}")
    if output is not None:
        write(model, output)
        print(f"wrote {output} and its card")
