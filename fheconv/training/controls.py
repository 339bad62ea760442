"""Trains controls: trivial models that learn the classes without the user's model.

A circuit that a control beats is not worth its price.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fheconv.basics.samples import Samples
from fheconv.training.finetuning import TEMPERATURE, Augment, held_apart
from fheconv.training.school import Lesson, School, variants
from fheconv.training.students import Student

# The logit of the right class, when the others are 0: their probabilities are e⁻²⁰.
SURE = 20 * TEMPERATURE


def control(
    training: Samples,
    *,
    lookups: int,
    classes: int,
    epochs: int,
    validation: Samples | None = None,
    augment: Augment | None = None,
    seed: int = 0,
) -> nn.Sequential:
    """Train one hidden layer of as many ReLUs as `lookups`, or a linear model for 0 lookups, and return it.

    training, validation: images (N, C, *S) and their classes (N,). Without `validation`, a fifth of
        `training` is held out. The model with the least loss on held-out images is returned.
    classes: the number of classes.

    It is trained as students are (`fheconv.training.school`), but on the right classes. Raises
    `CalibrationError` if training diverges.

    Example:
        >>> images = torch.rand(20, 1, 3, 3).numpy()
        >>> control(Samples(images, [0, 1] * 10), lookups=4, classes=2, epochs=1)
        Sequential(
          (0): Flatten(start_dim=1, end_dim=-1)
          (1): Linear(in_features=9, out_features=4, bias=True)
          (2): ReLU()
          (3): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        images, labels = _tensors(training)
        if validation is None:
            kept, held = held_apart(len(images))
            (images, others), (labels, right) = ((x[kept], x[held]) for x in (images, labels))
        else:
            others, right = _tensors(validation)
        changed = images[None] if augment is None else variants(images, augment)
        lesson = Lesson(changed, _logits(labels, classes).expand(len(changed), -1, -1))
        school = School(lesson, Lesson(others[None], _logits(right, classes)[None]))
        school.train(Student(hidden=lookups, relu=True), epochs)
        return school.best_student()


def _tensors(examples: Samples) -> tuple[Tensor, Tensor]:
    return torch.as_tensor(examples.images, dtype=torch.float32), torch.as_tensor(examples.classes).long()


def _logits(labels: Tensor, classes: int) -> Tensor:
    """Return the logits (N, K) of a model that knows the right classes (N,)."""
    return SURE * functional.one_hot(labels, classes).float()
