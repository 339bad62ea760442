"""Trains a student: a small network that imitates a trained one within a budget of lookups."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fheconv.basics.checks import check_integer, check_number
from fheconv.basics.errors import CalibrationError, InvalidArgumentError
from fheconv.basics.keywords import answers_keywords
from fheconv.basics.progress import status, track
from fheconv.basics.samples import Data, images_of
from fheconv.capture.model import capture, image_axes
from fheconv.networks.floats import Network
from fheconv.training.finetuning import HELD_OUT, MEASURED, TEMPERATURE, Augment, augmented
from fheconv.training.students import CONVOLUTIONS, Student, students

if TYPE_CHECKING:
    from fheconv.capture.outputs import Outputs

# Of each image, this many variants are made, or fewer if there were more than `MOST_VALUES` pixels.
VARIANTS, MOST_VALUES = 30, 2**27
# The teacher answers this many images at once.
AT_ONCE = 250
# A lookup rounds its accumulator to one of so many steps. The student is trained with this rounding.
STEPS = 2**5
WEIGHT_DECAY = 1e-3
WEIGHTED = nn.Linear, *CONVOLUTIONS


class Lesson(NamedTuple):
    """Variants of images (V, N, C, *S), and the teacher's logits for them (V, N, K)."""

    images: Tensor
    logits: Tensor


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
            order = torch.randperm(len(images))
            count = math.ceil(HELD_OUT * len(order))
            images, others = images[order[count:]], images[order[:count]]
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
            lesson = _lesson(teacher, _variants(images, augment))
        return _School(lesson, held_out, learning_rate, batch_size).best_student(lookup_budget, epochs)


class _School:
    """Trains students on a lesson, and keeps the one with the least held-out loss.

    Students see images of mean 0 and variance 1. `best_student` puts this into their first layer.
    """

    def __init__(self, lesson: Lesson, held_out: Lesson, learning_rate: float, batch_size: int) -> None:
        self.learning_rate, self.batch_size = learning_rate, batch_size
        std, self.mean = torch.std_mean(lesson.images)
        self.std = std if std > 0 else torch.ones(())
        self.lesson, self.held_out = (
            one._replace(images=(one.images - self.mean) / self.std) for one in (lesson, held_out)
        )
        variance = lesson.logits.var()
        self.spread = variance if variance > 0 else torch.ones(())
        self.best: tuple[Student, dict[str, Tensor]] | None = None
        self.least = math.inf

    def best_student(self, lookup_budget: int, epochs: int) -> nn.Sequential:
        """Return the best student of all kinds that keep to the budget."""
        try:
            kinds = students(tuple(self.held_out.images.shape[2:]), lookup_budget)
            while len(kinds) > 1:
                some = math.ceil(epochs / len(kinds))
                losses = [self.train(kind, some) for kind in kinds]
                kinds = [kinds[place] for place in np.argsort(losses)[: len(kinds) // 2]]
            self.train(kinds[0], epochs)
        except KeyboardInterrupt:
            if self.best is None:
                raise
        if self.best is None:
            raise CalibrationError("Training has diverged; lower the learning rate.")
        kind, trained = self.best
        student = self._built(kind)
        student.load_state_dict(trained)
        return self._for_images(student)

    def train(self, kind: Student, epochs: int) -> float:
        """Train a student of a kind from the start, and return its last held-out loss."""
        variants, count = self.lesson.images.shape[:2]
        student = self._new(kind).train()
        optimizer = torch.optim.AdamW(student.parameters(), self.learning_rate, weight_decay=WEIGHT_DECAY)
        steps = epochs * -(-count // self.batch_size)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, steps)
        loss, every = math.inf, -(-epochs // MEASURED)
        with _rounded(student):
            for epoch in track(range(1, epochs + 1), f"Training a student ({kind})…"):
                images, logits = (values[(epoch - 1) % variants] for values in self.lesson)
                for batch in torch.split(torch.randperm(count), self.batch_size):
                    optimizer.zero_grad()
                    torch.autograd.backward(self._loss(student(images[batch]), logits[batch]))
                    optimizer.step()
                    rates.step()
                if epoch % every == 0 or epoch == epochs:
                    loss = self._held_out_loss(student)
                    if loss < self.least:
                        self.best, self.least = (kind, deepcopy(student.state_dict())), loss
        return loss

    def _built(self, kind: Student) -> Any:
        return kind.build(tuple(self.held_out.images.shape[2:]), self.held_out.logits.shape[-1])

    @torch.no_grad()
    def _new(self, kind: Student) -> nn.Sequential:
        """Return a student whose accumulators have mean 0 and variance 1 (Krähenbühl et al. 2016)."""
        x, student = self.lesson.images[0], self._built(kind)
        for layer in student[:-1]:
            if isinstance(layer, WEIGHTED):
                sums: Tensor = layer(x)
                std, mean = torch.std_mean(sums, [0, *range(2, sums.ndim)])
                std = torch.where(std > 0, std, 1.0)
                layer.weight /= std.reshape(-1, *[1] * (layer.weight.ndim - 1))
                layer.bias.sub_(mean).div_(std)
            x = layer(x)
        return student

    def _loss(self, logits: Tensor, meant: Tensor) -> Tensor:
        if meant.shape[-1] == 1:  # a single score has no classes to choose from
            return functional.mse_loss(logits, meant) / self.spread
        ours, theirs = (functional.log_softmax(one / TEMPERATURE, dim=-1) for one in (logits, meant))
        return TEMPERATURE**2 * functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)

    @torch.no_grad()
    def _held_out_loss(self, student: nn.Sequential) -> float:
        return float(self._loss(student(self.held_out.images[0]), self.held_out.logits[0]))

    @torch.no_grad()
    def _for_images(self, student: Any) -> nn.Sequential:
        """Let a student take images as they are."""
        first = next(layer for layer in student if isinstance(layer, WEIGHTED))
        first.weight /= self.std
        first.bias -= self.mean * first.weight.flatten(1).sum(1)
        return student.eval()


@contextmanager
def _rounded(student: nn.Sequential) -> Iterator[None]:
    """Round what enters activations to `STEPS` steps of its range, one a channel, as a lookup does."""

    def rounded(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        (x,) = inputs
        seen = x.detach()
        axes = [0, *range(2, x.ndim)]
        step = ((seen.amax(axes, keepdim=True) - seen.amin(axes, keepdim=True)) / STEPS).clamp(min=1e-12)
        return x + ((seen / step).round() * step - seen)

    hooks = [layer.register_forward_pre_hook(rounded) for layer in student if isinstance(layer, nn.PReLU)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _images(data: Data, name: str, axes: int | None) -> Tensor:
    images = images_of(data, f"The images of {name}", axes)
    if images.ndim < 2 or len(images) < 2 or not np.isfinite(images).all():
        raise InvalidArgumentError(
            f"{name} has images of shape {images.shape}; give a batch of two or more, (n, C, *S), "
            "of finite values."
        )
    return torch.tensor(images, dtype=torch.float32)


def _variants(images: Tensor, augment: Augment | None) -> Tensor:
    """Return the images and variants of them, (V, N, C, *S)."""
    found = [images]
    for _ in range(min(VARIANTS, max(MOST_VALUES // images.numel(), 1)) - 1):
        if augment is not None:
            found.append(augmented(augment, images))
        else:
            share = torch.rand(len(images), *[1] * (images.ndim - 1))
            found.append(torch.lerp(images, images[torch.randperm(len(images))], share))
    return torch.stack(found)


def _lesson(teacher: Network, images: Tensor) -> Lesson:
    flat = images.flatten(0, 1)
    logits = [teacher.tensors(some.double().numpy())[-1] for some in torch.split(flat, AT_ONCE)]
    meant = torch.as_tensor(np.concatenate(logits), dtype=torch.float32)
    return Lesson(images, meant.reshape(*images.shape[:2], -1))
