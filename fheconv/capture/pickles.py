"""Says what to do with files and results of `torch.save`, which are pickles. Nothing is unpickled."""

import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fheconv.basics.errors import InvalidArgumentError
from fheconv.basics.files import check_regular

# The usual endings of files of `torch.save`, which are pickles.
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
# At most this much of a pickle is looked at, to see what it makes.
MOST_LOOKED_AT = 2**22
# The modules of what a state_dict consists of: tensors in a dict.
PLAIN = ("collections", "torch", "torch._utils", "torch.storage", "torch._tensor", "numpy", "builtins")
# Where the keys of a checkpoint hold the weights.
USUAL_KEYS = ("state_dict", "model_state_dict", "model", "net", "weights")


def check_no_pickle(path: Path) -> None:
    """Raise `InvalidArgumentError` for a file of `torch.save`, and say what to do with it."""
    kind = None if path.suffix.lower() == ".pt2" else _kind(path)
    if kind is None and path.suffix.lower() not in PICKLES:
        return
    raise InvalidArgumentError(
        f"{path} looks like a file of torch.save, which runs what is in it when it is loaded. "
        f"{_FIRST.get(kind, _UNKNOWN).format(file=str(path))} Then, in Python, call "
        "fheconv.quantize(model, images). For the shell, write the model there with "
        "torch.export.save(torch.export.export(model, (images,)), 'model.pt2'), or the weights with "
        "safetensors.torch.save_file(model.state_dict(), 'model.safetensors') and a card."
    )


# What to do first with each kind of file.
_STATE = (
    "make the model of your own class and load them into it: "
    "model.load_state_dict(torch.load({file!r}, weights_only=True)); model.eval()."
)
_FIRST: dict[Any, str] = {
    "weights": f"It holds weights (a state_dict) and no model: {_STATE}",
    "script": "It holds a program of TorchScript, whose layers cannot be read: take the model that it was "
    "made from. Or, only if you trust whoever wrote it: torch.onnx.export(torch.jit.load({file!r}), "
    "(images,), 'model.onnx', dynamo=False), and model = fheconv.from_onnx('model.onnx').",
    "model": "It holds a whole pickled model. Only if you trust whoever wrote it: model = "
    "torch.load({file!r}, weights_only=False).eval(). Else ask for its weights (a state_dict).",
}
_UNKNOWN = f"If it holds weights (a state_dict), {_STATE}"


def _kind(path: Path) -> str | None:
    """Return what a file of `torch.save` holds: "weights", "model", "script", or None if it does not show."""
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if any(name.endswith("/constants.pkl") for name in names):
                return "script"
            (name,) = (name for name in names if name.endswith("data.pkl"))
            with archive.open(name) as file:
                data = file.read(MOST_LOOKED_AT)
        return "model" if _classes(data) else "weights"
    except Exception:  # the file may hold anything; older files of torch.save are no zip archives
        return None


def _classes(data: bytes) -> list[str]:
    """Return the classes that a pickle makes, besides those of tensors and dicts."""
    found, strings = [], []
    for opcode, argument, _ in pickletools.genops(data):
        if isinstance(argument, str):
            strings.append(argument)
        if opcode.name == "GLOBAL":
            found.append(str(argument).partition(" ")[0])
        elif opcode.name == "STACK_GLOBAL":
            found.append(strings[-2])
    return [module for module in found if module not in PLAIN]


def check_no_checkpoint(value: Any) -> None:
    """Raise `InvalidArgumentError` for a path, a state_dict or a checkpoint in place of a model.

    Example:
        >>> check_no_checkpoint("model.onnx")
        Traceback (most recent call last):
        fheconv.basics.errors.InvalidArgumentError: 'model.onnx' is a path, and no model. ...
    """
    if isinstance(value, str | Path):
        path = Path(value)
        if path.suffix.lower() in PICKLES:
            check_no_pickle(path)
        raise InvalidArgumentError(
            f"{str(value)!r} is a path, and no model. Load it first: fheconv.from_onnx('model.onnx'), "
            "torch.export.load('model.pt2') if you trust it, or fheconv's command line for safetensors."
        )
    if not isinstance(value, Mapping):
        return
    inside = [key for key in value if key in USUAL_KEYS and isinstance(value[key], Mapping)]
    key = f"[{inside[0]!r}]" if inside else ""
    raise InvalidArgumentError(
        f"This {type(value).__name__} with the keys {', '.join(map(str, list(value)[:3]))}... is no model. "
        f"If it holds the weights of one, make the model of your own class, load them with "
        f"model.load_state_dict(this{key}), and give model.eval()."
    )
