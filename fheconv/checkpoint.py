"""Layers from safetensors files, with their options from the JSON card beside the file."""

import json
from pathlib import Path
from typing import Any

from fheconv.arrays import as_array
from fheconv.errors import ArtifactError
from fheconv.network import Conv

# What a layer's entry in a card may hold: options of `Conv.of` with their types, and what only describes.
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
# Whether a layer of that kind is transposed.
KINDS = {f"Conv{word}{axes}d": bool(word) for word in ("", "Transpose") for axes in (1, 2, 3)}


def load_layer(path: Path, layer: str, **options: Any) -> Conv:
    """Return the convolution `layer` of a safetensors file: `<layer>.weight` and, if there, `<layer>.bias`.

    `options` are those of `Conv.of`; those that are None come from the card (`<file>.json`, its list
    "architecture") if there is one, otherwise they are torch's defaults.

    Raises `ArtifactError` for a file that cannot be read or has no such layer, or for a card with anything
    unknown in the layer's entry, `InvalidArgumentError` for numbers that numpy does not have (such as fp8).
    """
    # Through torch, because numpy has no bfloat16.
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            found = {
                part: file.get_tensor(f"{layer}.{part}")
                for part in ("weight", "bias")
                if f"{layer}.{part}" in names
            }
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read as safetensors: {error}.") from error
    if "weight" not in found:
        layers = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
        raise ArtifactError(f"{path} has no {layer}.weight; its layers are {', '.join(layers) or 'none'}.")
    tensors = {part: as_array(tensor, f"{layer}.{part} of {path}") for part, tensor in found.items()}
    weight = tensors["weight"]
    if weight.ndim < 3:
        raise ArtifactError(
            f"{layer}.weight of {path} has shape {weight.shape}; a convolution's is "
            "(out_channels, in_channels/groups, height, width)."
        )
    known = _card_options(path.with_suffix(".json"), layer)
    known.update({name: value for name, value in options.items() if value is not None})
    return Conv.of(weight, tensors.get("bias"), name=layer, **known)


def _card_options(card: Path, layer: str) -> dict[str, Any]:
    """Return what the card says of the layer, as options of `Conv.of`; nothing without a card."""
    if not card.exists():
        return {}
    try:
        layers = json.loads(card.read_text())["architecture"]
        entry: dict[str, Any] = next((entry for entry in layers if entry.get("name") == layer), {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"The card {card} is not what a card should be: {error!r}.") from error
    where = f"The card {card} says of layer {layer!r}"
    unknown = [name for name in entry if name not in OPTIONS and name not in DESCRIPTIONS]
    if unknown:
        raise ArtifactError(
            f"{where} {', '.join(map(repr, unknown))}, which fheconv does not know; what it "
            f"knows is {', '.join((*DESCRIPTIONS, *OPTIONS))}."
        )
    options = {name: entry[name] for name in OPTIONS if name in entry}
    for name, value in options.items():
        # type(), because True is an int.
        if type(value) not in OPTIONS[name]:
            wanted = " or ".join(kind.__name__ for kind in OPTIONS[name])
            raise ArtifactError(f"{where} {name}={value!r}; it must be of type {wanted}.")
    if "kind" in entry:
        kind = entry["kind"]
        if not isinstance(kind, str) or kind not in KINDS:
            raise ArtifactError(f"{where} kind={kind!r}; a convolution's is one of {', '.join(KINDS)}.")
        if options.setdefault("transposed", KINDS[kind]) != KINDS[kind]:
            raise ArtifactError(f"{where} kind={kind!r} and transposed={options['transposed']}; correct one.")
    return options
