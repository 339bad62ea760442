"""Fine-tunes a quantized network within the budgets of its accumulators."""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fheconv.basics.arrays import Array, as_array
from fheconv.basics.checks import check_integer, check_number
from fheconv.basics.errors import AccumulatorOverflowError, CalibrationError, InvalidArgumentError
from fheconv.basics.keywords import answers_keywords
from fheconv.basics.progress import track
from fheconv.basics.samples import Data, samples
from fheconv.networks.floats import Network
from fheconv.networks.integers import IntegerNetwork, QuantizedLayer
from fheconv.quantizer.layerwise import quantize_network
from fheconv.training.requantizable import RequantizableNetwork
from fheconv.training.thinning import thinned
from fheconv.training.trainable import TrainableNetwork

N = TypeVar("N", bound=IntegerNetwork)
Augment: TypeAlias = Callable[[Tensor], Tensor]

# This share of the data is held out. It decides which network is kept.
HELD_OUT = 0.2
# Integer weights are trained between these shares of the epochs. Before and after, only scales and biases
# adapt.
FROM, TO = 0.1, 0.8
# A learning rate rises during this share of its time. Then it falls to 0.
RISE = 0.1
# The number of times that the held-out loss is measured, of integer weights and of float weights. The latter
# are quantized from scratch each time, which takes as long as `fheconv.quantize`.
MEASURED, QUANTIZED = 40, 10
# The temperature at which the float network's answers are learned (Hinton et al. 2015).
TEMPERATURE = 2.0
# The ranges of accumulators are observed on at most this many images.
MOST_OBSERVED = 1000


class Examples(NamedTuple):
    """Images (N, C, *S), their right classes (N, …) if these are known, and the float network's sums.

    `spread` is the variance of all these sums. It is the unit in which errors are measured.
    """

    images: Tensor
    labels: Tensor | None
    meant: Tensor
    spread: Tensor

    def of(self, where: Tensor) -> "Examples":
        """Return the examples at the indices `where`."""
        labels = None if self.labels is None else self.labels[where]
        return Examples(self.images[where], labels, self.meant[where], self.spread)


class _Schedule(NamedTuple):
    """The length and speed of training. It ends after `patience` epochs without a smaller held-out loss."""

    epochs: int
    learning_rate: float
    batch_size: int
    patience: int


@answers_keywords
def finetune(
    network: N,
    data: Data,
    *,
    epochs: int = 200,
    validation: Data | None = None,
    augment: Augment | None = None,
    learning_rate: float = 0.04,
    batch_size: int = 64,
    patience: int | None = None,
    lookup_budget: int | None = None,
    seed: int = 0,
) -> N:
    """Fine-tune a network, and return the result, of the same config. What was proved stays proved.

    `data` are images (N, C, *S), or a pair of images and their classes (N,), or a `DataLoader`, a `Dataset`
    or an iterable of batches, with classes or without (`fheconv.basics.samples`). Without classes the network
    learns the float network's results (mean squared error). With classes it also learns the classes
    (cross-entropy, and the float network's answers by distillation). A fifth of the data is held out, unless
    `validation` is given. The result is the network with the least held-out loss of all that were measured,
    including the network before training. The optimizer is Adam. Learning rates fall to 0, and most of the
    gain comes at the end.

    What is trained depends on the windows. Where accumulators are rounded in windows that are not proved
    (`overflow="defined"` with `rounding_bits`), the windows follow what the sums reach. There the float
    weights are trained, with the sums rounded (`fheconv.training.requantizable`). The result is quantized
    from them again, with new scales and windows, and its `source` is the trained float network. About 100
    epochs are enough. Elsewhere the integer weights are trained within the budgets of their accumulators:
    scales and biases all the time, weights from the first tenth of the epochs to the last fifth
    (`fheconv.training.trainable`). A network that was trained for integers keeps its grids in this way.

    `augment` maps a batch of images to changed ones, anew in each epoch. `patience` stops the training after
    so many epochs without a better held-out loss. `lookup_budget` is the most lookups that an image may take:
    before training, channels whose activations hardly matter become linear, average poolings are moved before
    their activations, and so are max poolings, as averages (`fheconv.training.thinning`). The same `seed`
    gives the same network on one machine.

    Accumulators that are looked up keep to the widths that the network's config asks for. If it asks for
    none, windows keep to the width at which lookups are cheap. Without windows, no filter of a layer may have
    a larger span than the widest filter had before.

    Raises `InputRangeError` for images that the network does not take, `AccumulatorOverflowError` if a
    pooling that is moved before its activation leaves no room for any weight, `InvalidArgumentError` for
    other arguments that do not fit.

    Example:
        >>> tuned = finetune(network, (images, classes), epochs=50, seed=0)  # doctest: +SKIP
        >>> tuned.budget().proved  # doctest: +SKIP
        True
    """
    if not isinstance(network, IntegerNetwork):
        raise InvalidArgumentError(
            f"network is a {type(network).__name__}; only what fheconv.quantize returns can be fine-tuned."
        )
    if augment is not None and not callable(augment):
        raise InvalidArgumentError(f"augment={augment!r} must be a function of a batch of images.")
    check_integer("epochs", epochs, 1)
    check_integer("batch_size", batch_size, 1)
    check_integer("seed", seed, 0, 2**63 - 1)
    check_number("learning_rate", learning_rate, 0.0)
    for name, value in (("patience", patience), ("lookup_budget", lookup_budget)):
        if value is not None:
            check_integer(name, value, 1)
    examples = _examples(network, data, "data")
    generator = torch.Generator().manual_seed(int(seed))
    if validation is None:
        kept, held = held_apart(len(examples.images), generator)
        examples, held_out = examples.of(kept), examples.of(held)
    else:
        held_out = _examples(network, validation, "validation")
        if (held_out.labels is None) != (examples.labels is None):
            raise InvalidArgumentError("Give classes with both data and validation, or with neither.")
    with torch.random.fork_rng(devices=[]):  # noise and augmentations draw from torch's own generator
        torch.manual_seed(int(seed))
        teacher = network.source
        trained = network
        if lookup_budget is not None:
            observed = examples.images[:MOST_OBSERVED].double().numpy()
            source = thinned(teacher, observed, lookup_budget)
            if source is not teacher:
                fewer = quantize_network(source, observed, network.calibrated, network.config)
                trained = type(network).of(fewer)
        schedule = _Schedule(epochs, learning_rate, batch_size, patience or epochs)
        return _train(trained, teacher, examples, held_out, augment, schedule)


def _train(
    network: N,
    teacher: Network,
    examples: Examples,
    held_out: Examples,
    augment: Augment | None,
    schedule: "_Schedule",
) -> N:
    """Train, and return the network with the least held-out loss of all that were measured."""
    epochs = schedule.epochs
    observed = examples.images[:MOST_OBSERVED].double().numpy()
    batches = -(-len(examples.images) // schedule.batch_size)
    module: TrainableNetwork[N] | RequantizableNetwork[N]
    if _follows_windows(network):
        module, (start, end), measured = RequantizableNetwork(network, observed), (0, epochs), QUANTIZED
    else:
        module, measured = TrainableNetwork(network), MEASURED
        start, end = math.ceil(FROM * epochs), math.ceil(TO * epochs)
    module.train()
    optimizer = torch.optim.Adam(
        [
            {"params": module.weight_parameters(), "lr": schedule.learning_rate},
            {"params": module.other_parameters(), "lr": schedule.learning_rate / 2},
        ]
    )
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        [
            lambda step: _rate(step, start * batches, end * batches),
            lambda step: _rate(step, 0, epochs * batches),
        ],
    )
    best, least, best_at = network, held_out_loss(network, held_out), 0
    every = -(-epochs // measured)
    for epoch in track(range(1, epochs + 1), "Fine-tuning…"):
        for batch in torch.randperm(len(examples.images)).tensor_split(batches):
            some = examples.of(batch)
            if augment is not None:
                images = augmented(augment, some.images)
                some = some._replace(images=images, meant=_meant(teacher, images))
            optimizer.zero_grad()
            torch.autograd.backward(_loss(module(some.images), some))
            optimizer.step()
            rates.step()
            module.draw_in()
        if epoch % every == 0 or epoch in {start, end, epochs}:
            try:
                now = module.quantized(observed)
            except CalibrationError:  # training has diverged and will not recover
                break
            except AccumulatorOverflowError:  # the window of a layer has become too narrow, for now
                continue
            loss = held_out_loss(now, held_out)
            if loss < least:
                best, least, best_at = now, loss, epoch
            if epoch - best_at >= schedule.patience:
                break
    return best


def _follows_windows(network: IntegerNetwork) -> bool:
    """Return whether the float weights are to be trained: sums are rounded in windows that are not proved.

    Such windows follow what the sums reach. A network that was trained for integers keeps its integers.
    """
    tables = (layer.lookup for layer in network.layers if isinstance(layer, QuantizedLayer))
    rounded = any(table is not None and not table.proved and table.dropped_bits for table in tables)
    return rounded and not network.source.trained


def augmented(augment: Augment, images: Tensor) -> Tensor:
    """Return the batch that `augment` makes of `images`, checked."""
    changed = augment(images)
    if not isinstance(changed, Tensor) or changed.shape != images.shape:
        got = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
        raise InvalidArgumentError(
            f"augment returned {got} for images of shape {tuple(images.shape)}; it must return a tensor of "
            "the same shape."
        )
    return changed.to(images)


def _rate(step: int, start: int, end: int) -> float:
    """Return the share of the learning rate at a step: a short rise and a long fall, and 0 outside."""
    at = (step - start) / max(end - start, 1)
    if not 0 <= at < 1:
        return 0.0
    return at / RISE if at < RISE else (1 + math.cos(math.pi * (at - RISE) / (1 - RISE))) / 2


def _examples(network: IntegerNetwork, data: Data, name: str) -> Examples:
    given, classes = samples(data, f"The images of {name}", len(network.input_shape))
    network.quantize_input(given)
    if given.ndim != len(network.input_shape) + 1 or len(given) < 2:
        raise InvalidArgumentError(
            f"{name} has images of shape {given.shape}; give a batch of two or more, (n, "
            f"{', '.join(map(str, network.input_shape))})."
        )
    images = torch.tensor(given, dtype=torch.float32)
    meant = _meant(network.source, images)
    variance = meant.var()
    spread = torch.where(variance > 0, variance, 1.0)
    if classes is None:
        return Examples(images, None, meant, spread)
    labels = as_array(classes, f"The classes of {name}")
    count, shape = meant.shape[1], (len(images), *meant.shape[2:])
    if (
        labels.dtype.kind not in "iu"
        or labels.shape != shape
        or not (0 <= labels.min() <= labels.max() < count)
    ):
        raise InvalidArgumentError(
            f"The classes of {name} are {labels.dtype} of shape {labels.shape}{_ends(labels)}; this network "
            f"needs integers from 0 to {count - 1} of shape {shape}."
        )
    return Examples(images, torch.tensor(labels.astype(np.int64)), meant, spread)


def _ends(values: Array) -> str:
    return f", from {values.min()} to {values.max()}" if values.size else ""


def held_apart(count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Return the indices of the examples to train on, and of the fifth that is held out."""
    order = torch.randperm(count, generator=generator)
    held = math.ceil(HELD_OUT * count)
    return order[held:], order[:held]


def _meant(teacher: Network, images: Tensor) -> Tensor:
    """Return the sums (N, K, *Out) of the float network's last layer."""
    return torch.as_tensor(teacher.tensors(images.double().numpy())[-1], dtype=torch.float32)


def _loss(sums: Tensor, examples: Examples) -> Tensor:
    if examples.labels is None:
        return functional.mse_loss(sums, examples.meant) / examples.spread
    distilled = functional.kl_div(
        functional.log_softmax(sums / TEMPERATURE, dim=1),
        functional.log_softmax(examples.meant / TEMPERATURE, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return functional.cross_entropy(sums, examples.labels) + TEMPERATURE**2 * distilled


def held_out_loss(network: IntegerNetwork, held_out: Examples) -> float:
    """Return the loss of the integer network itself. It decides which network `finetune` returns."""
    accumulators = network.accumulate(network.quantize_input(held_out.images)[0])
    sums = torch.as_tensor(accumulators * network.last.scale, dtype=torch.float32)
    return float(_loss(sums, held_out))
