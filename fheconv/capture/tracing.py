"""Prepares a module for torch.export, and shows what its results depend on, and where channels belong."""

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fheconv.basics.arrays import Shape
from fheconv.basics.errors import UnsupportedLayerError
from fheconv.basics.samples import channel_remedy

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

    Meanwhile the module has ordinary copies of such weights, and of its buffers, which `forward` may change.
    """
    parts = list(module.modules())
    held: list[dict[str, Any]] = [*(p._parameters for p in parts), *(p._buffers for p in parts)]
    before = [dict(tensors) for tensors in held]
    try:
        with torch.inference_mode(False), torch.no_grad(), _Detached(), _unguarded(module):
            copies: dict[int, torch.Tensor] = {}  # one of each, because some are shared
            for number, tensors in enumerate(held):
                for name, value in tensors.items():
                    if value is not None and (number >= len(parts) or value.is_inference()):
                        tensors[name] = copies.setdefault(id(value), _copy(value))
            yield
    finally:
        for tensors, old in zip(held, before, strict=True):
            tensors.update(old)


def evaluate(module: torch.nn.Module) -> None:
    """Set evaluation mode. The modules of exported programs refuse `eval`: their graphs are in one mode."""
    try:
        module.eval()
    except NotImplementedError:
        for part in module.modules():
            part.training = False


@contextmanager
def _unguarded(module: torch.nn.Module) -> Iterator[None]:
    """Let a module that an exported program made take batches of any size.

    It checks the sizes by a hook and by a part of its graph. Whether it depends on the size is found out by
    running it.
    """
    hooks, guards = module._forward_pre_hooks, module._modules.get("_guards_fn")
    checks = [key for key, hook in hooks.items() if "input_constraints" in getattr(hook, "__name__", "")]
    held = {key: hooks.pop(key) for key in checks}
    if guards is not None:
        module._modules["_guards_fn"] = _Unchecked()
    try:
        yield
    finally:
        hooks.update(held)
        if guards is not None:
            module._modules["_guards_fn"] = guards


class _Unchecked(torch.nn.Module):
    """Stands where a part of a graph checked sizes."""

    def forward(self, *_: Any) -> None:
        """Check nothing."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch.export from printing what it knows of an error, which is pages; the error says enough."""
    loggers = (logging.getLogger(name) for name in list(logging.root.manager.loggerDict))
    handlers = [handler for one in loggers if one.name.split(".")[0] == "torch" for handler in one.handlers]
    levels = [handler.level for handler in handlers]
    try:
        for handler in handlers:
            handler.setLevel(logging.CRITICAL + 1)
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)


def _copy(value: torch.Tensor) -> torch.Tensor:
    copy = value.detach().clone()
    is_parameter = isinstance(value, torch.nn.Parameter)
    return torch.nn.Parameter(copy, requires_grad=False) if is_parameter else copy


def dependence(module: Callable[..., Any], batch: int, shape: Shape, like: torch.Tensor) -> str:
    """Return what the results of a module depend on besides each image, in words; "" if nothing is found.

    `module` may be a function that gives one of its results. It runs on a batch of random images of `shape`,
    twice, and on a larger batch that starts with the same images. Numbers that are drawn outside torch, or a
    batch size that `forward` reads, are constants in a graph, so only the results show them.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch + 1, *shape, generator=generator).to(like)
    first, again = (module(images[:batch].clone()) for _ in range(2))
    if not (isinstance(first, torch.Tensor) and isinstance(again, torch.Tensor)):
        return ""  # capture refuses several results by itself
    if not _close(first, again, 1e-6):
        return (
            "its results differ between two runs on the same images: forward draws at random, or changes "
            "tensors or numbers that it reads; let them be constants in evaluation mode"
        )
    remedy = (
        "forward reads the batch size, or mixes the images of a batch; let each image have its own result"
    )
    if not first.ndim:
        return f"its result is a single number for all images: {remedy}"
    try:
        larger = module(images.clone())
    except Exception as error:  # the user's forward can raise anything
        return f"it takes a batch of {batch} images, but not of {batch + 1} ({error}): {remedy}"
    # Another batch size may add up in another order, and then a rounding may fall to the other side.
    if first.is_floating_point() and not _close(first, larger[:batch], 1e-3):
        return f"its results for the same images differ in batches of {batch} and of {batch + 1}: {remedy}"
    return ""


class _Reached(Exception):
    """Ends a run of a module at its first convolution, which it holds if it reads the images themselves."""

    def __init__(self, convolution: torch.nn.Module | None) -> None:
        super().__init__()
        self.convolution = convolution


def check_channels(module: torch.nn.Module, example: torch.Tensor) -> None:
    """Raise `UnsupportedLayerError` if images like `example` lack the channel axis of the first convolution.

    Or if they have it last. A model whose first convolution reads something else than images passes.
    """
    convolution = _first_convolution(module, example)
    if convolution is None:
        return
    channels, kernel = convolution.in_channels, convolution.kernel_size
    shape = tuple(example.shape[1:])
    remedy = channel_remedy((0, *shape), channels, len(kernel) + 1)  # 0: any number of images
    if remedy:
        raise UnsupportedLayerError(
            f"The images have shape (n, {', '.join(map(str, shape))}), and the model takes (n, {channels}, "
            f"{', '.join('MND'[: len(kernel)])}).{remedy}"
        )


def _first_convolution(module: torch.nn.Module, example: torch.Tensor) -> Any:
    """Return the first convolution that a module runs, if it reads the images themselves; otherwise None."""

    def stop(part: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        same = len(arguments) > 0 and arguments[0].shape == example.shape
        raise _Reached(part if same else None)

    kinds = torch.nn.modules.conv._ConvNd
    hooks = [one.register_forward_pre_hook(stop) for one in module.modules() if isinstance(one, kinds)]
    try:
        with traceable(module):
            module(example.clone())
    except _Reached as reached:
        return reached.convolution
    except Exception:  # the user's forward can raise anything, and says so elsewhere
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return None


def _close(a: torch.Tensor, b: torch.Tensor, share: float) -> bool:
    """Return whether two results differ by no more than a share of the largest."""
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    finite = a[a.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=share * size, equal_nan=True)
