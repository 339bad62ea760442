"""Loads layers and models from files.

There are three kinds of files. Safetensors files hold weights; a JSON card beside one describes its layers.
Files with the suffix `.onnx` hold models (see `onnx_file`). Files with the suffix `.pt2` hold programs that
`torch.export.save` wrote.
"""

import json
import zipfile
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fheconv.basics.arrays import as_array
from fheconv.basics.errors import ArtifactError, InvalidArgumentError, UnsupportedLayerError
from fheconv.basics.files import check_regular
from fheconv.capture.pickles import check_no_pickle
from fheconv.networks.floats import Conv

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

# The entry of a layer in a card may hold these options of `Conv.of`, with their types, and descriptions.
OPTIONS: dict[str, tuple[type, ...]] = {
    "stride": (int, list),
    "padding": (int, list, str),
    "dilation": (int, list),
    "groups": (int,),
    "padding_mode": (str,),
    "transposed": (bool,),
    "output_padding": (int, list),
}
DESCRIPTIONS = ("name", "kind", "weight", "bias", "channels")
# The kinds of convolutions, and whether each is transposed.
KINDS = {f"Conv{word}{axes}d": bool(word) for word in ("", "Transpose") for axes in (1, 2, 3)}
# The other kinds of layers of a model, with the options of each.
_WINDOW: dict[str, tuple[type, ...]] = {
    "kernel_size": (int, list),
    "stride": (int, list),
    "padding": (int, list),
}
MODULES: dict[str, dict[str, tuple[type, ...]]] = {
    "Linear": {},
    "ReLU": {},
    "Flatten": {},
    **{f"BatchNorm{axes}d": {"eps": (int, float)} for axes in (1, 2, 3)},
    **{f"{pool}Pool{axes}d": _WINDOW for pool in ("Avg", "Max") for axes in (1, 2, 3)},
    **{f"AdaptiveAvgPool{axes}d": {"output_size": (int, list)} for axes in (1, 2, 3)},
}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
PARTS = ("weight", "bias", *STATISTICS)
# A file of `torch.export.save` holds one of these, in a folder whose name depends on the file.
PROGRAMS = ("models/model.json", "serialized_exported_program.json")


def load_model(path: Path, layer: str | None = None, *, trusted: bool = False) -> Any:
    """Return the model of a file, for `fheconv.quantize`.

    A safetensors file holds only data. It gives the convolution `layer`, or, without `layer`, a sequence of
    all layers in the card's list "architecture". An `.onnx` file holds only data too; `fheconv.from_onnx`
    reads it. A `.pt2` file gives the program that `torch.export.save` wrote. It must be `trusted`, because
    loading it runs code: torch unpickles its contents, evaluates its expressions and calls the functions
    that it names.

    Raises `ArtifactError` for a file or a card that cannot be read or has no such layer, or if weights and
    card do not fit together. Raises `UnsupportedLayerError` for a kind of layer outside `KINDS` and
    `MODULES`, and `InvalidArgumentError` for a `.pt2` file that is not trusted, for a `layer` of a whole
    model, and for a file of `torch.save`. For `.onnx` files it raises what `fheconv.from_onnx` does.
    """
    check_no_pickle(path)
    kind = path.suffix.lower()
    if kind not in (".pt2", ".onnx"):
        return _sequence(path) if layer is None else load_layer(path, layer)
    if layer is not None:
        raise InvalidArgumentError(
            f"{path} is a whole model, of which no layer can be taken; leave {layer!r} out."
        )
    if kind == ".onnx":
        from fheconv.capture.onnx_file import from_onnx

        return from_onnx(path)
    if not trusted:
        raise InvalidArgumentError(
            f"Loading {path} would run what is in it: torch unpickles it. If it comes from people you trust, "
            "say so with --trusted (trusted=True); else ask for the weights as safetensors."
        )
    return _program(path)


def load_layer(path: Path, layer: str, **options: Any) -> Conv:
    """Return the convolution `layer` of a safetensors file: `<layer>.weight` and, if there, `<layer>.bias`.

    `options` are those of `Conv.of`. Options that are None come from the card (`<file>.json`, its list
    "architecture") if there is one; otherwise torch's defaults apply.

    Raises `ArtifactError` for a file that cannot be read or has no such layer, or if the card's entry has an
    unknown field. Raises `InvalidArgumentError` for a type of numbers that numpy does not have (such as fp8).
    """
    check_no_pickle(path)
    names, found = _tensors(path, (f"{layer}.weight", f"{layer}.bias"))
    arrays = {name: as_array(tensor, f"{name} of {path}") for name, tensor in found.items()}
    weight = arrays.get(f"{layer}.weight")
    if weight is None:
        layers = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
        raise ArtifactError(f"{path} has no {layer}.weight; its layers are {', '.join(layers) or 'none'}.")
    if weight.ndim < 3:
        raise ArtifactError(
            f"{layer}.weight of {path} has shape {weight.shape}; a convolution's is "
            "(out_channels, in_channels/groups, height, width)."
        )
    card = path.with_suffix(".json")
    entries = _entries(card) if card.exists() else []
    entry = next((entry for entry in entries if entry.get("name") == layer), {})
    where = f"The card {card} says of layer {layer!r}"
    if "kind" in entry and entry["kind"] not in [*KINDS]:
        raise ArtifactError(f"{where} kind={entry['kind']!r}; a convolution's is one of {', '.join(KINDS)}.")
    known = _options(entry, OPTIONS, where)
    known.update({name: value for name, value in options.items() if value is not None})
    return Conv.of(weight, arrays.get(f"{layer}.bias"), name=layer, **known)


def _tensors(path: Path, wanted: Collection[str] | None = None) -> tuple[list[str], "dict[str, Tensor]"]:
    """Return the names of all tensors in a safetensors file, and the wanted tensors (None: all)."""
    # Torch reads the file, because numpy has no bfloat16.
    from safetensors import SafetensorError, safe_open

    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            return names, {name: file.get_tensor(name) for name in names if wanted is None or name in wanted}
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read as safetensors: {error}.") from error


def _entries(card: Path) -> list[dict[str, Any]]:
    """Return the entries of a card's architecture."""
    try:
        check_regular(card)
        entries = json.loads(card.read_text())["architecture"]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise TypeError("its architecture is not a list of objects")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"The card {card} is not what a card should be: {error!r}.") from error
    return entries


def _options(entry: dict[str, Any], allowed: dict[str, tuple[type, ...]], where: str) -> dict[str, Any]:
    """Return the options in the entry of a layer, after checking their names and types."""
    descriptions = DESCRIPTIONS if allowed is OPTIONS else (*DESCRIPTIONS, *STATISTICS)
    unknown = [name for name in entry if name not in allowed and name not in descriptions]
    if unknown:
        raise ArtifactError(
            f"{where} {', '.join(map(repr, unknown))}, which fheconv does not know; what it "
            f"knows is {', '.join((*descriptions, *allowed))}."
        )
    options = {name: entry[name] for name in allowed if name in entry}
    for name, value in options.items():
        # type() and not isinstance(), because True is an int.
        if type(value) not in allowed[name]:
            wanted = " or ".join(kind.__name__ for kind in allowed[name])
            raise ArtifactError(f"{where} {name}={value!r}; it must be of type {wanted}.")
    kind = entry.get("kind")
    if kind in KINDS and options.setdefault("transposed", KINDS[kind]) != KINDS[kind]:
        raise ArtifactError(f"{where} kind={kind!r} and transposed={options['transposed']}; correct one.")
    return options


def _sequence(path: Path) -> "nn.Sequential":
    """Return the sequence of the layers of a card, with the weights of the file."""
    from torch import nn

    card = path.with_suffix(".json")
    _, tensors = _tensors(path)
    if not card.exists():
        raise ArtifactError(
            f"There is no card {card} to say what to do with the weights of {path}; name one layer of it, or "
            "write the model to an .onnx file with torch.onnx.export."
        )
    modules: dict[str, nn.Module] = {}
    for number, entry in enumerate(_entries(card)):
        name = entry.get("name", str(number))
        where = f"The card {card} says of layer {name!r}"
        own = {part: tensors.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in tensors}
        key = str(name).replace(".", "_")  # torch allows no dots in names
        if key in modules or hasattr(nn.Sequential(), key):
            raise ArtifactError(f"{where} a name that another has, or torch uses itself; give it its own.")
        modules[key] = _module(entry, own, where)
    if tensors or not modules:
        raise ArtifactError(
            f"The card {card} has no layers for {', '.join(tensors) or 'anything'} of {path}; describe all "
            "of them, or take one layer by its name."
        )
    return nn.Sequential(OrderedDict(modules)).eval()


def _module(entry: dict[str, Any], tensors: "dict[str, Tensor]", where: str) -> "nn.Module":
    """Return the layer of a card's entry, in double precision, with its own tensors."""
    from torch import nn

    kind = entry.get("kind")
    if not isinstance(kind, str) or (kind not in KINDS and kind not in MODULES):
        raise UnsupportedLayerError(
            f"{where} kind={kind!r}, and a model's is one of {', '.join((*KINDS, *MODULES))}. Write "
            "other models to an .onnx file with torch.onnx.export."
        )
    options = _options(entry, OPTIONS if kind in KINDS else MODULES[kind], where)
    transposed = options.pop("transposed", False)
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    shapes = {part: list(tensor.shape) for part, tensor in tensors.items()}
    for part in PARTS:
        if part in entry and entry[part] != shapes.get(part):
            raise ArtifactError(f"{where} {part}={entry[part]}, and the file's has {shapes.get(part)}.")
    if "weight" not in tensors and (kind in KINDS or kind == "Linear"):
        raise ArtifactError(f"{where} kind={kind!r}, and the file has no such weights; correct its name.")
    shape = tuple(tensors["weight"].shape) if "weight" in tensors else ()
    sizes: dict[str, Any] = {}
    try:
        if kind in KINDS:
            one, other, *kernel = shape
            other *= options.get("groups", 1)
            channels = (one, other) if transposed else (other, one)
            sizes = {"in_channels": channels[0], "out_channels": channels[1], "kernel_size": kernel}
        elif kind == "Linear":
            sizes = {"in_features": shape[1], "out_features": shape[0]}
        elif kind.startswith("BatchNorm"):
            sizes = {"num_features": shape[0]}
        if kind in KINDS or kind == "Linear":
            sizes["bias"] = "bias" in tensors
        module: nn.Module = getattr(nn, kind)(**sizes, **options).double()
        module.load_state_dict(tensors)
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"{where} {entry!r:.200}, which does not go with weights of shape {shape}: {error}."
        ) from error
    return module


def _program(path: Path) -> "ExportedProgram":
    """Return the program that `torch.export.save` wrote."""
    import torch

    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:  # for other files, torch would print pages of text
            if not any(name.endswith(PROGRAMS) for name in archive.namelist()):
                raise zipfile.BadZipFile("it holds no program")
        return torch.export.load(path)
    except Exception as error:  # the file can make torch raise anything
        raise ArtifactError(
            f"{path} cannot be read as a program of torch.export.save: {str(error) or repr(error)}."
        ) from error
