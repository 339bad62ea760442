"""Turns quantized modules of torch.ao.quantization into ones that torch.export can follow.

`prepare_qat` leaves modules that go on observing their inputs, and `convert` leaves modules that compute with
torch's own quantized tensors. Both become modules of floats that round in the same places to the same
numbers.
"""

import contextlib
import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fheconv.basics.errors import UnsupportedLayerError

# Modules of torch.ao.nn.quantized that give the same for real numbers as for their integers.
_SAME: dict[str, Callable[[], nn.Module]] = {
    "DeQuantize": nn.Identity, "Dropout": nn.Identity, "ReLU6": nn.ReLU6,
}  # fmt: skip
# Modules that stand there too, and compute with floats.
_OF_FLOATS = ("FloatFunctional", "FXFloatFunctional", "MaxPool2d")


class Rounding(nn.Module):
    """Rounds a tensor to integers times a scale, or one for each channel of `axis`."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Any, zero_point: Any, ends: tuple[int, int], axis: int | None = None) -> None:
        super().__init__()
        self.register_buffer("scale", torch.as_tensor(scale).detach().float().reshape(-1).clone())
        self.register_buffer("zero_point", torch.as_tensor(zero_point).detach().round().int().reshape(-1))
        self.ends, self.axis = ends, axis

    def forward(self, x: Tensor) -> Tensor:
        """Return the tensor with each value rounded."""
        if self.axis is None:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, *self.ends)
        return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero_point, self.axis, *self.ends)


class Rounded(nn.Module):
    """Applies a layer of floats, and ReLU if a layer had one, and rounds the result."""

    def __init__(self, layer: nn.Module, rounding: Rounding, *, relu: bool) -> None:
        super().__init__()
        self.layer, self.rounding, self.relu = layer, rounding, relu

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded result."""
        y = self.layer(x)
        rounded: Tensor = self.rounding(torch.relu(y) if self.relu else y)
        return rounded


class Functional(nn.Module):
    """Stands for QFunctional: sums and concatenations, rounded."""

    def __init__(self, rounding: Rounding) -> None:
        super().__init__()
        self.rounding = rounding

    def add(self, x: Tensor, y: Tensor) -> Any:
        """Return x + y, rounded."""
        return self.rounding(x + y)

    def add_relu(self, x: Tensor, y: Tensor) -> Any:
        """Return relu(x + y), rounded."""
        return self.rounding(torch.relu(x + y))

    def cat(self, x: list[Tensor], dim: int = 0) -> Any:
        """Return the tensors side by side, rounded."""
        return self.rounding(torch.cat(x, dim))

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        """Return x · y, which only changes the scale."""
        return x * y


class _Averaging(TorchFunctionMode):
    """Refuses averages of torch's own quantized tensors: torch rounds these, and floats would not be."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        name = getattr(func, "__name__", "")
        if re.search("avg_pool|mean|interpolate", name) and any(getattr(x, "is_quantized", 0) for x in args):
            raise UnsupportedLayerError(
                f"{name} averages torch's own quantized tensors, and rounds as no layer here does. Give the "
                "model as it was before torch.ao.quantization.convert."
            )
        return func(*args, **(kwargs or {}))


def as_floats(module: nn.Module, example: Tensor) -> nn.Module:
    """Return a module that computes with plain tensors: a changed copy, or itself if it does already.

    Raises `UnsupportedLayerError` naming a quantized module that has no counterpart here, or a function that
    a model calls for a batch like `example`.
    """
    every = module.named_modules(remove_duplicate=False)  # observers of torch.fx are shared
    found = {name: part for name, part in every if _is_quantized(part)}
    if "" in found:
        return _replaced("", module)
    if not found:
        return module
    with torch.no_grad():
        copied = copy.deepcopy(module)
        if not all(map(_fakes, found.values())):
            with contextlib.suppress(RuntimeError), _Averaging():  # it says elsewhere why it does not run
                copied.eval()(example.clone())
    for name, part in found.items():
        parent, _, last = name.rpartition(".")
        if not any(name.startswith(outer + ".") for outer in found):
            copied.get_submodule(parent)._modules[last] = _replaced(name, part)
    return copied


def _is_quantized(part: nn.Module) -> bool:
    home = type(part).__module__
    converted = home.startswith(("torch.ao.nn.quantized.modules", "torch.ao.nn.intrinsic.quantized.modules"))
    return _fakes(part) or (converted and type(part).__name__ not in _OF_FLOATS)


def _fakes(part: nn.Module) -> bool:
    """Return whether a module rounds as torch's FakeQuantize does, or torchao's."""
    return all(hasattr(part, name) for name in ("fake_quant_enabled", "scale", "zero_point", "ch_axis"))


def _replaced(name: str, part: Any) -> nn.Module:
    """Return a module of floats that does the same as a quantized one."""
    kind = type(part).__name__
    if _fakes(part):
        if not bool(torch.as_tensor(part.fake_quant_enabled).any()):
            return nn.Identity()
        observer = getattr(part, "activation_post_process", part)
        axis = part.ch_axis if part.scale.numel() > 1 else None
        return Rounding(part.scale, part.zero_point, (observer.quant_min, observer.quant_max), axis)
    if kind in _SAME:
        return _SAME[kind]()
    if kind == "Quantize":
        return Rounding(part.scale, part.zero_point, _ends(part.dtype))
    if kind == "QFunctional":
        return Functional(Rounding(part.scale, part.zero_point, _ends(torch.quint8)))
    if re.fullmatch("Conv(ReLU)?[123]d|Linear(ReLU)?", kind):
        rounding = Rounding(part.scale, part.zero_point, _ends(torch.quint8))
        return Rounded(_layer(kind.replace("ReLU", ""), part), rounding, relu="ReLU" in kind)
    raise UnsupportedLayerError(
        f"Layer {name!r} ({type(part).__module__}.{kind}) cannot be compiled: it computes with torch's own "
        "quantized tensors in a way that is not known here. Give the model as it was before "
        "torch.ao.quantization.convert, or leave this layer out of it (qconfig = None)."
    )


def _layer(kind: str, part: Any) -> nn.Module:
    """Return the convolution or linear layer of floats that a quantized one stands for."""
    weight, bias = part.weight().dequantize(), part.bias()
    if kind == "Linear":
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    else:
        options = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        given = {option: getattr(part, option) for option in options}
        made = getattr(nn, kind)(part.in_channels, part.out_channels, bias=bias is not None, **given)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    return made


def _ends(dtype: torch.dtype) -> tuple[int, int]:
    return (-128, 127) if dtype == torch.qint8 else (0, 255)
