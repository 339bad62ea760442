"""Says why a module cannot be captured, where in the user's code, and what to do about it."""

import inspect
import re
import traceback
from pathlib import Path
from typing import Any

import torch

from fheconv.basics.arrays import Shape
from fheconv.basics.errors import UnsupportedLayerError

# Lines in these folders are not the user's.
_OURS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
# Where an error of torch is longer than this, the rest of it is for developers of torch.
MOST_SAID = 300


def check_module(module: torch.nn.Module) -> None:
    """Raise `UnsupportedLayerError` for a module that cannot be run on images and traced.

    Example:
        >>> check_module(torch.nn.LazyConv2d(2, 3))
        Traceback (most recent call last):
        fheconv.basics.errors.UnsupportedLayerError: This LazyConv2d has layers without weights yet; ...
    """
    kind = type(module).__name__
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise UnsupportedLayerError(
            f"This {kind} is TorchScript, whose layers cannot be read. Give the module that it was made "
            "from; or torch.onnx.export(model, (images,), 'model.onnx', dynamo=False), and then "
            "fheconv.from_onnx('model.onnx')."
        )
    tensors = [*module.parameters(), *module.buffers()]
    if any(map(torch.nn.parameter.is_lazy, tensors)):
        raise UnsupportedLayerError(f"This {kind} has layers without weights yet; run it once, or load them.")
    if any(tensor.is_meta for tensor in tensors):
        raise UnsupportedLayerError(
            f"This {kind} has weights on the device 'meta', which hold no values; load them with "
            "model.load_state_dict(weights, assign=True)."
        )
    if any(tensor.is_complex() for tensor in tensors):
        raise UnsupportedLayerError(
            f"This {kind} has complex weights; let it compute with real and imaginary parts as channels."
        )
    _check_arguments(module)


def _check_arguments(module: torch.nn.Module) -> None:
    """Raise `UnsupportedLayerError` for a module without `forward`, or one that needs more than images."""
    kind, forward = type(module).__name__, module.forward
    if getattr(forward, "__name__", "") == "_forward_unimplemented":
        raise UnsupportedLayerError(
            f"This {kind} has no forward, so that the order of its parts is not known; give a module that "
            "has one, such as torch.nn.Sequential(*parts)."
        )
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):  # not every callable tells its arguments
        return
    needed = [
        p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    first = next((p for p in needed if p.kind is not p.KEYWORD_ONLY), None)
    others = [repr(p.name) for p in needed if p is not first]
    if others:
        raise UnsupportedLayerError(
            f"The forward of {kind} needs {', '.join(others)} besides a batch of images, and a circuit takes "
            "images alone. Give a module whose forward calls this one, with constants there."
        )


def refusal(module: torch.nn.Module, shape: Shape, error: Exception, *, ran: bool) -> UnsupportedLayerError:
    """Return what to say of an error by a module for images of `shape`; `ran` says that it runs, untraced."""
    kind, text = type(module).__name__, str(error)
    line = _line(error)
    if ran and "data-dependent" in text:
        return UnsupportedLayerError(
            f"{kind} cannot be a circuit: its path depends on the values of the image, or it reads one as a "
            f"number{line}. A circuit has no branches and knows no values while it runs: compute with "
            "tensors alone (torch.where, clamp), and check values before encryption."
        )
    if ran and ".numpy()" in text:
        return UnsupportedLayerError(
            f"{kind} cannot be traced: it turns tensors into arrays of numpy{line}. Compute with torch "
            "alone, and take out hooks that collect activations."
        )
    unknown = re.search(r"Found <class '(.*)'> in output", text)
    if ran and unknown:
        name = unknown[1].rpartition(".")[2]
        return UnsupportedLayerError(
            f"{kind} returns an object of the class {name}, which torch.export does not know. Let it return "
            "a tensor, a tuple or a dict; a dataclass becomes known by torch.export.register_dataclass."
        )
    if ran:
        return UnsupportedLayerError(
            f"{kind} runs on images of shape {shape}, but torch.export cannot follow it: {said(error)}{line}."
            " Change that, until torch.export.export(model.eval(), (images,)) works."
        )
    return UnsupportedLayerError(
        f"{kind} cannot be run on images of shape {shape}: {said(error)}{line}. {_next(module, text)}"
    )


def _next(module: torch.nn.Module, text: str) -> str:
    """Return the next step after a module failed to run."""
    if re.search("quint8|qint8|Quantized", text):
        return (
            "It computes with torch's own quantized tensors; give the model as torch.ao.quantization "
            "prepared it and you trained it, before it was converted."
        )
    types = sorted({str(p.dtype) for p in module.parameters() if p.is_floating_point()})
    if re.search("compiled with CUDA|NVIDIA|on the same device", text):
        return "Take .cuda() and .to('cuda') out of forward: it follows the images with x.to(x.device)."
    if len(types) > 1:
        return f"Its weights are of types {', '.join(types)}; give model.float()."
    return "Calibrate on images as the model takes them."


def said(error: Exception) -> str:
    """Return the beginning of an error, in one line.

    Example:
        >>> said(ValueError())
        'ValueError'
    """
    text = " ".join((str(error).strip() or type(error).__name__).split("\n\n")[0].split()).removesuffix(".")
    return text if len(text) <= MOST_SAID else f"{text[:MOST_SAID]}…"


def _line(error: Any) -> str:
    """Return where the user's code raised an error, "" if the error came from elsewhere."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.line and not frame.filename.startswith(_OURS)
    ]
    if not frames:
        return ""
    last = frames[-1]
    return f" ({Path(last.filename).name}, line {last.lineno}: {' '.join(str(last.line).split())})"
