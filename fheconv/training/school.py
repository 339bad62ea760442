"""Trains students on a lesson: images, and the logits that they are to learn."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fheconv.basics.errors import CalibrationError
from fheconv.basics.progress import track
from fheconv.training.finetuning import MEASURED, TEMPERATURE, Augment, augmented
from fheconv.training.students import ACTIVATIONS, CONVOLUTIONS, Student

# Of each image, this many variants are made, or fewer if there were more than `MOST_VALUES` pixels.
VARIANTS, MOST_VALUES = 30, 2**27
# A lookup rounds its accumulator to one of so many steps. Students are trained with this rounding.
STEPS = 2**5
WEIGHT_DECAY = 1e-3
WEIGHTED = nn.Linear, *CONVOLUTIONS


class Lesson(NamedTuple):
    """Variants of images (V, N, C, *S), and the logits to learn for them (V, N, K)."""

    images: Tensor
    logits: Tensor


class School:
    """Trains students on a lesson, and keeps the one with the least held-out loss.

    Students see images of mean 0 and variance 1. `best_student` puts this into their first layer. During
    training, activations are rounded as lookups are.
    """

    def __init__(
        self, lesson: Lesson, held_out: Lesson, learning_rate: float = 0.01, batch_size: int = 64
    ) -> None:
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

    def best_student(self) -> nn.Sequential:
        """Return the student with the least loss. Raises `CalibrationError` if training has diverged."""
        if self.best is None:
            raise CalibrationError("Training has diverged; lower the learning rate.")
        kind, trained = self.best
        student = self._built(kind)
        student.load_state_dict(trained)
        return self._for_images(student)

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

    hooks = [layer.register_forward_pre_hook(rounded) for layer in student if isinstance(layer, ACTIVATIONS)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def variants(images: Tensor, augment: Augment | None) -> Tensor:
    """Return the images and variants of them, (V, N, C, *S)."""
    found = [images]
    for _ in range(min(VARIANTS, max(MOST_VALUES // images.numel(), 1)) - 1):
        if augment is not None:
            found.append(augmented(augment, images))
        else:
            share = torch.rand(len(images), *[1] * (images.ndim - 1))
            found.append(torch.lerp(images, images[torch.randperm(len(images))], share))
    return torch.stack(found)
