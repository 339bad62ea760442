"""Gives a traced module the numbers that it reads from its own weights.

`float(weight.abs().max())` and `if self.scale == 0` read numbers. While torch.export traces a module, its
weights have no values, so that it cannot follow such a module. Therefore the module is run first, and the
numbers that do not depend on the image are remembered.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fheconv.basics.arrays import Shape

# The ways in which a number is read from a tensor, or from two.
_READS: tuple[Any, ...] = (
    Tensor.__bool__, Tensor.__float__, Tensor.__index__, Tensor.__int__, Tensor.allclose, Tensor.equal,
    Tensor.item, Tensor.tolist, torch.allclose, torch.equal,
)  # fmt: skip


class _Read(NamedTuple):
    """Holds what was read, in which way, and the shapes and types of the tensors that it was read from.

    `known` says that it does not depend on the image.
    """

    way: Any
    tensors: tuple[tuple[Shape, torch.dtype], ...]
    number: Any
    known: bool


class _Watching(TorchFunctionMode):
    """Sees every function of torch that is called, also by classes that are like tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let a class that is like a tensor, such as Brevitas's, call functions; or call this one."""
        like = next((kind for kind in types if not issubclass(kind, Tensor)), None)
        if like is None:
            return self.called(func, args, kwargs or {})
        with self:
            return like.__torch_function__(func, types, args, kwargs)

    def called(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what a function of torch gives."""
        raise NotImplementedError


class Reading(_Watching):
    """Remembers the numbers that a module reads while it runs in this context, in order.

    The first one that may depend on the image is the last: one that comes from other tensors than the
    module's own, constants, and what was computed from these alone.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        parts = list(module.modules())
        own = [*module.parameters(), *module.buffers(), *_tensors([vars(part) for part in parts])]
        # Tensors are held, so that no other one gets the memory of one that is known.
        self._known = {_memory(tensor): tensor for tensor in own}
        self.reads: list[_Read] = []

    def called(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what a function of torch gives."""
        tensors = _tensors((args, kwargs))
        before = [_version(tensor) for tensor in tensors]
        known = all(_memory(tensor) in self._known for tensor in tensors)
        result = func(*args, **kwargs)
        if func in _READS:
            if all(read.known for read in self.reads):
                self.reads.append(_Read(func, _kinds(tensors), result, known))
            return result
        if known:
            self._known |= {_memory(tensor): tensor for tensor in _tensors(result)}
            return result
        changed = (tensor for tensor, old in zip(tensors, before, strict=True) if _version(tensor) != old)
        for tensor in (*_tensors(result), *changed):
            self._known.pop(_memory(tensor), None)
        return result


class Repeating(_Watching):
    """Gives a module that is traced in this context the numbers that it read when it ran."""

    def __init__(self, reads: list[_Read]) -> None:
        super().__init__()
        self._reads, self._next = reads, 0

    def called(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what a function gives, or the next number; after the last one, the first comes again."""
        if self._reads and func in _READS:
            read = self._reads[self._next % len(self._reads)]
            if not read.known:
                self._reads = []
            elif (func, _kinds(_tensors((args, kwargs)))) == (read.way, read.tensors):
                self._next += 1
                return read.number
        return func(*args, **kwargs)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _kinds(tensors: list[Tensor]) -> tuple[tuple[Shape, torch.dtype], ...]:
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)


def _version(tensor: Tensor) -> int | None:
    """Return how often a tensor was changed. Tensors of `torch.inference_mode()` do not count it."""
    return None if tensor.is_inference() else tensor._version


def _memory(tensor: Tensor) -> int:
    """Return a number that tensors have in common if a change of one can change the other."""
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # as inside torch.vmap
        return id(tensor)
