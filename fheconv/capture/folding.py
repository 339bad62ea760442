"""Follows tensors whose first axis is not the batch, and complex tensors, until they are real batches again.

Models fold channels or frames into the batch to treat them alike: `x.reshape(b * c, 1, h, w)`. For each image
this equals a tensor (c · 1, h, w), whose operators work on groups of channels. Everything else that happens
to a folded tensor, and everything that happens to a complex one (a Fourier transform), is kept as a function.
It is judged when the tensor is a real batch again.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from fheconv.basics.arrays import Shape
from fheconv.capture.calls import BATCH, Call, gathered
from fheconv.capture.graph import Unsupported, Value
from fheconv.capture.operators import HANDLERS, MOVES, SAME
from fheconv.capture.probing import filled, leaves, of_function, precise
from fheconv.networks.expression import ELEMENTWISE

MIXES = "it mixes the images of a batch, or drops the batch axis"

# What torch makes of a BatchNorm whose statistics are constants. It gives several tensors.
_OF_CONSTANTS = "native_batch_norm_legit_no_training"
_CHANNELWISE = {
    _OF_CONSTANTS,
    *(f"{kind}{axes}d" for axes in (1, 2, 3) for kind in
      ("avg_pool", "adaptive_avg_pool", "max_pool", "conv", "conv_transpose")),
    *ELEMENTWISE, "add", "sub", "mul", "div", "neg", "batch_norm", "dropout", "prelu",
}  # fmt: skip


# The tensors (BATCH, *S) of values, and what was computed of them, by the ids of values and folded tensors.
Tensors: TypeAlias = dict[int, torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Folded:
    """Represents a function of some values, whose result of `shape` is not a batch of real images.

    `moves` says that it only moves values, `complex` that its result is complex.
    """

    values: tuple[Value, ...]
    function: Callable[[Tensors], torch.Tensor]
    shape: Shape
    moves: bool
    complex: bool = False

    def of(self, known: Tensors) -> torch.Tensor:
        """Return the result for the tensors of the values, computed once."""
        if id(self) not in known:
            # Copies in between, which views need, are no nodes any more.
            known[id(self)] = self.function(known).contiguous()
        return known[id(self)]

    def images(self, call: Call, shape: Shape) -> Value:
        """Return it as a value of `shape`. Raises `Unsupported` if it mixes the images of a batch."""
        call = replace(call, given=shape, real=True)

        def function(*tensors: torch.Tensor) -> torch.Tensor:
            known = {id(value): one for value, one in zip(self.values, tensors, strict=True)}
            return self.of(known).reshape(BATCH, *shape)

        if self.moves:
            moved: Value = gathered(call, self.values, function)
            return moved
        made = of_function(call, function, self.values)
        if made is None:
            raise Unsupported(f"{MIXES}, or is not linear")
        return made


def folds(call: Call, arguments: Any) -> bool:
    """Return whether an operator takes a folded tensor, or makes one."""
    if any(isinstance(leaf, Folded) for leaf in leaves(arguments)):
        return True
    example: Any = call.node.meta.get("val")
    if not isinstance(example, torch.Tensor):
        return False
    moved = call.operation in MOVES and example.shape[:1] != (BATCH,) and all(example.shape)
    return moved or example.is_complex()


def followed(call: Call, arguments: Any, options: Any) -> Any:
    """Return what an operator makes of folded tensors: a value, or a folded tensor.

    Raises `Unsupported` if it mixes the images of a batch, or is not supported for folded tensors.
    """
    example: Any = call.node.meta.get("val")
    if call.operation == _OF_CONSTANTS:
        example = example[0]
    if not isinstance(example, torch.Tensor):
        raise Unsupported(f"{MIXES}; it gives several tensors of a folded one")
    shape = tuple(map(int, example.shape))
    parts = [leaf for leaf in leaves((arguments, options)) if isinstance(leaf, Folded | Value)]
    real = not any(isinstance(part, Folded) and part.complex for part in parts)
    if real and call.operation in _CHANNELWISE and _are_alike(call, arguments, shape):
        made = _by_groups(call, arguments, options, shape)
        return (made,) if call.operation == _OF_CONSTANTS else made
    if real and call.operation == "linear" and isinstance(arguments[0], Folded) and shape[0] % BATCH == 0:
        # Over the last axis, whatever the others are.
        before = arguments[0].shape
        value = arguments[0].images(call, (before[0] // BATCH, *before[1:]))
        inside = replace(call, given=(shape[0] // BATCH, *shape[1:]))
        return _folded(HANDLERS["linear"](inside, value, *arguments[1:], **options), shape)
    if call.operation in SAME:
        return parts[0]
    if not call.real and call.operation not in MOVES:
        raise Unsupported(
            "it takes or gives truth values or whole numbers that are folded; unfold them before"
        )

    def function(known: Tensors) -> torch.Tensor:
        def fill(leaf: Any) -> Any:
            if isinstance(leaf, Folded):
                return leaf.of(known)
            return known[id(leaf)] if isinstance(leaf, Value) else precise(leaf)

        positional, named = filled((arguments, options), fill)
        result: torch.Tensor = call.target(*positional, **named)
        return result

    values = dict.fromkeys(
        v for part in parts for v in (part.values if isinstance(part, Folded) else (part,))
    )
    moves = call.operation in MOVES and all(part.moves for part in parts if isinstance(part, Folded))
    made = Folded(
        values=tuple(values), function=function, shape=shape, moves=moves, complex=example.is_complex()
    )
    return made.images(call, shape[1:]) if shape[0] == BATCH and not made.complex else made


def _folded(value: Value, shape: Shape) -> Folded:
    def function(known: Tensors) -> torch.Tensor:
        return known[id(value)].reshape(shape)

    return Folded(values=(value,), function=function, shape=shape, moves=True)


def _are_alike(call: Call, arguments: Any, shape: Shape) -> bool:
    """Return whether the encrypted arguments are folded tensors of one shape, and all hold whole images."""
    constants = [leaf for leaf in leaves(arguments) if isinstance(leaf, torch.Tensor)]
    if call.operation in ("add", "div", "mul", "sub") and any(one.numel() > 1 for one in constants):
        return False
    first, *rest = (leaf for leaf in leaves(arguments) if isinstance(leaf, Folded | Value))
    same = all(isinstance(one, Folded) and one.shape == first.shape for one in (first, *rest))
    return same and first.shape[0] % BATCH == 0 and shape[:1] == first.shape[:1] and len(shape) > 1


def _by_groups(call: Call, arguments: Any, options: Any, shape: Shape) -> Folded:
    """Return what an operator that treats folded images alike makes of them, as groups of channels."""
    count = shape[0] // BATCH
    tiled = call.operation in (_OF_CONSTANTS, "batch_norm") or call.operation.startswith("conv")

    def each(leaf: Any) -> Any:
        if isinstance(leaf, Folded):
            return leaf.images(call, (count * leaf.shape[1], *leaf.shape[2:]))
        if not isinstance(leaf, torch.Tensor) or (leaf.numel() == 1 and not tiled):
            return leaf
        if tiled or call.operation == "prelu":
            return leaf.repeat(count, *[1] * (leaf.ndim - 1))
        raise Unsupported("it takes constants of several numbers for a folded tensor; unfold it before")

    first, *rest = (each(leaf) for leaf in arguments)
    if call.operation.startswith("conv"):
        rest, options = list(rest), dict(options)
        at = 5  # after weight, bias, stride, padding, and dilation or output_padding
        if len(rest) > at:
            rest[at] *= count
        else:
            options["groups"] = options.get("groups", 1) * count
    inside = replace(call, given=(count * shape[1], *shape[2:]))
    made = HANDLERS[call.operation](inside, first, *rest, **options)
    return _folded(made[0] if call.operation == _OF_CONSTANTS else made, shape)
