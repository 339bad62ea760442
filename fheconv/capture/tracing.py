"""Readies a module for torch.export, whose own tracing stops at some ways in which models are written."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DATA: Any = torch.Tensor.data


class _Detached(TorchFunctionMode):
    """Reads `tensor.data` as `tensor.detach()`, which torch.export knows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, or another in its place."""
        if getattr(func, "__self__", None) is _DATA:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


@contextmanager
def traceable(module: torch.nn.Module) -> Iterator[None]:
    """Let torch.export trace a module, also one with weights made under `torch.inference_mode()`.

    The module has ordinary copies of such weights meanwhile.
    """
    held: list[dict[str, Any]] = []
    for part in module.modules():
        held += [part._parameters, part._buffers]
    before = [dict(tensors) for tensors in held]
    try:
        with torch.inference_mode(False), torch.no_grad(), _Detached():
            copies: dict[int, torch.Tensor] = {}  # one of each: some are shared
            for tensors in held:
                for name, value in tensors.items():
                    if value is not None and value.is_inference():
                        tensors[name] = copies.setdefault(id(value), _copy(value))
            yield
    finally:
        for tensors, old in zip(held, before, strict=True):
            tensors.update(old)


def _copy(value: torch.Tensor) -> torch.Tensor:
    copy = value.detach().clone()
    is_parameter = isinstance(value, torch.nn.Parameter)
    return torch.nn.Parameter(copy, requires_grad=False) if is_parameter else copy
