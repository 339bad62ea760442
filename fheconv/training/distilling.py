"""Trains a student: a small network that imitates a trained one within a budget of lookups."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fheconv.basics.checks import check_integer, check_number
from fheconv.basics.errors import InvalidArgumentError
from fheconv.basics.keywords import answers_keywords
from fheconv.basics.progress import status
from fheconv.basics.samples import Data, images_of
from fheconv.capture.model import capture, image_axes
from fheconv.networks.floats import Network
from fheconv.training.finetuning import Augment, held_apart
from fheconv.training.school import Lesson, School, variants
from fheconv.training.students import Student, students

if TYPE_CHECKING:
    from fheconv.capture.outputs import Outputs

# The teacher answers this many images at once.
AT_ONCE = 250


@answers_keywords
def distill(
    model: Any,
    training: Data,
    *,
    lookup_budget: int,
    epochs: int = 400,
    validation: Data | None = None,
    augment: Augment | None = None,
    learning_rate: float = 0.01,
    batch_size: int = 64,
    seed: int = 0,
    outputs: "Outputs" = None,
) -> nn.Sequential:
    """Train a student that imitates a model with at most `lookup_budget` lookups an image, and return it.

    The student is another network, and an ordinary `torch.nn.Module`. It learns the logits of the model on
    images (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"). Quantize it like any model.
    With a budget of 0 it is linear, and its circuit needs no evaluation keys.

    model: a classifier, as for `fheconv.quantize`. `outputs` picks one of several outputs, as there.
    training: images (N, C, *S) as for `fheconv.finetune`. Classes are ignored.
    lookup_budget: the most lookups of an image, as the forecast of the quantized student counts them.
    epochs: how often each image is seen.
    validation: images on which students are compared. Otherwise a fifth of `training` is held out.
    augment: maps a batch of images to changed ones. Without it, students also learn on mixtures of two images
        (Beyer et al. 2022, "Knowledge distillation: a good teacher is patient and consistent").

    Kinds of students (`fheconv.training.students`) are trained for a short time. The half of them with the
    least loss on held-out images is trained for twice as long, and so on, and the last one for all epochs
    (successive halving, Jamieson and Talwalkar 2016). During training, activations are rounded as lookups
    are. After an interruption, the best student so far is returned, if there is one. The same `seed` gives
    the same student on one machine.

    Raises `InvalidArgumentError` for arguments that do not fit, and for a model whose outputs are not a logit
    for each class, otherwise like `quantize`.

    Example:
        >>> student = distill(model, images, lookup_budget=32)  # doctest: +SKIP
        >>> fheconv.quantize(student, images).forecast().lookups  # doctest: +SKIP
        32
    """
    if augment is not None and not callable(augment):
        raise InvalidArgumentError(f"augment={augment!r} must be a function of a batch of images.")
    check_integer("lookup_budget", lookup_budget, 0)
    check_integer("epochs", epochs, 1)
    check_integer("batch_size", batch_size, 1)
    check_integer("seed", seed, 0, 2**63 - 1)
    check_number("learning_rate", learning_rate, 0.0)
    axes = image_axes(model)
    images = _images(training, "training", axes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        if validation is None:
            kept, held = held_apart(len(images))
            images, others = images[kept], images[held]
        else:
            others = _images(validation, "validation", axes)
            if others.shape[1:] != images.shape[1:]:
                raise InvalidArgumentError(
                    f"The images of training have shape {tuple(images.shape)} and those of validation "
                    f"{tuple(others.shape)}; give images of one size."
                )
        teacher = capture(model, tuple(images.shape[1:]), outputs)
        if len(teacher.shapes[-1]) != 1:
            raise InvalidArgumentError(
                f"The model's outputs have shape {teacher.shapes[-1]}; distill needs (classes,), a logit for "
                "each."
            )
        held_out = _lesson(teacher, others[None])
        with status("Asking the model about variants of the images…"):
            lesson = _lesson(teacher, variants(images, augment))
        school = School(lesson, held_out, learning_rate, batch_size)
        try:
            _train_kinds(school, students(tuple(images.shape[1:]), lookup_budget), epochs)
        except KeyboardInterrupt:
            if school.best is None:
                raise
        return school.best_student()


def _train_kinds(school: School, kinds: list[Student], epochs: int) -> None:
    """Train students of all kinds for a short time, the better half for longer, and so on."""
    while len(kinds) > 1:
        some = math.ceil(epochs / len(kinds))
        losses = [school.train(kind, some) for kind in kinds]
        kinds = [kinds[place] for place in np.argsort(losses)[: len(kinds) // 2]]
    school.train(kinds[0], epochs)


def _images(data: Data, name: str, axes: int | None) -> Tensor:
    images = images_of(data, f"The images of {name}", axes)
    if images.ndim < 2 or len(images) < 2 or not np.isfinite(images).all():
        raise InvalidArgumentError(
            f"{name} has images of shape {images.shape}; give a batch of two or more, (n, C, *S), "
            "of finite values."
        )
    return torch.tensor(images, dtype=torch.float32)


def _lesson(teacher: Network, images: Tensor) -> Lesson:
    flat = images.flatten(0, 1)
    logits = [teacher.tensors(some.double().numpy())[-1] for some in torch.split(flat, AT_ONCE)]
    meant = torch.as_tensor(np.concatenate(logits), dtype=torch.float32)
    return Lesson(images, meant.reshape(*images.shape[:2], -1))
