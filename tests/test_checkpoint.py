import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fheconv
from fheconv import ArtifactError, Conv, InvalidArgumentError
from fheconv.checkpoint import load_layer


def layer_file(folder: Path, weight: torch.Tensor, entry: dict | None = None, **tensors) -> Path:
    path = folder / "m.safetensors"
    save_file({"c.weight": weight, **tensors}, path)
    if entry is not None:
        card = {"architecture": [{"name": "c", **entry}]}
        path.with_suffix(".json").write_text(json.dumps(card))
    return path


def same(one: Conv, two: Conv) -> bool:
    return one.geometry == two.geometry and np.array_equal(one.weight, two.weight)


@pytest.mark.parametrize(
    "entry",
    [
        {"transposed": True, "stride": 2, "padding": 1, "output_padding": 1},
        {"kind": "ConvTranspose2d", "stride": [2, 1], "output_padding": [1, 0]},
        {"kind": "ConvTranspose2d", "transposed": True, "dilation": 2},
        {"kind": "Conv2d", "padding_mode": "circular", "padding": 1, "stride": 2},
        {"padding": "same"},
        {"groups": 2, "padding": [1, 2]},
    ],
)
def test_every_option_of_the_card_is_used(tmp_path, entry):
    weight = torch.arange(36.0).reshape(2, 2, 3, 3)
    options = {name: value for name, value in entry.items() if name != "kind"}
    options["transposed"] = entry.get("transposed", "Transpose" in entry.get("kind", ""))
    assert same(load_layer(layer_file(tmp_path, weight, entry), "c"), Conv.of(weight, **options))


def test_a_transposed_layer_from_a_file_computes_what_torch_computes(tmp_path):
    module = torch.nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
    entry = {"kind": "ConvTranspose2d", "stride": 2, "padding": 1, "output_padding": 1, "groups": 2}
    path = layer_file(tmp_path, module.weight.data, entry, **{"c.bias": module.bias.data})
    image = np.random.default_rng(0).random((4, 5, 5))
    config = fheconv.QuantConfig(weight_bits=8, input_bits=8)
    from_file = fheconv.quantize(load_layer(path, "c"), image, config)
    np.testing.assert_array_equal(from_file(image), fheconv.quantize(module, image, config)(image))


def test_a_transposed_layer_with_another_padding_mode_is_refused_not_computed_as_something_else(tmp_path):
    entry = {"transposed": True, "padding_mode": "circular", "stride": 2, "padding": 1}
    with pytest.raises(InvalidArgumentError, match="padding_mode='circular'"):
        load_layer(layer_file(tmp_path, torch.ones(1, 1, 3, 3), entry), "c")


def test_options_given_win_over_the_card(tmp_path):
    path = layer_file(tmp_path, torch.ones(1, 2, 3, 3), {"kind": "ConvTranspose2d", "stride": 2})
    assert same(load_layer(path, "c", transposed=False, stride=1), Conv.of(torch.ones(1, 2, 3, 3)))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"strides": 2}, "'strides', which fheconv does not know"),
        ({"stride": "2"}, "stride='2'; it must be of type int or list"),
        ({"stride": None}, "stride=None"),
        ({"groups": True}, "groups=True"),
        ({"transposed": "false"}, "transposed='false'"),
        ({"padding_mode": 1}, "padding_mode=1"),
        ({"kind": "Linear"}, "kind='Linear'"),
        ({"kind": ["Conv2d"]}, r"kind=\['Conv2d'\]"),
        ({"kind": "Conv2d", "transposed": True}, "kind='Conv2d' and transposed=True"),
    ],
)
def test_what_the_card_says_and_fheconv_does_not_understand_is_refused(tmp_path, entry, words):
    with pytest.raises(ArtifactError, match=words):
        load_layer(layer_file(tmp_path, torch.ones(1, 1, 3, 3), entry), "c")


@pytest.mark.parametrize("text", ["[" * 100_000, "{", '{"architecture": [3]}', "[]", "\ud800"])
def test_a_file_that_is_no_card_is_named(tmp_path, text):
    path = layer_file(tmp_path, torch.ones(1, 1, 3, 3))
    path.with_suffix(".json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ArtifactError, match=r"m\.json"):
        load_layer(path, "c")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int8])
def test_weights_of_every_number_type_that_numpy_can_hold_are_read(tmp_path, dtype):
    weight = torch.arange(-4, 5).reshape(1, 1, 3, 3)
    bias = torch.ones(1)
    layer = load_layer(layer_file(tmp_path, weight.to(dtype), None, **{"c.bias": bias.to(dtype)}), "c")
    np.testing.assert_array_equal(layer.weight, weight)
    np.testing.assert_array_equal(layer.bias, bias)


def test_fp8_weights_are_refused_by_name(tmp_path):
    path = layer_file(tmp_path, torch.ones(1, 1, 3, 3).to(torch.float8_e4m3fn))
    with pytest.raises(InvalidArgumentError, match=r"c\.weight of .* is not an array of numbers"):
        load_layer(path, "c")


def test_an_fp8_layer_does_not_stand_in_the_way_of_the_others(tmp_path):
    other = {"d.weight": torch.ones(1, 1, 3, 3).to(torch.float8_e4m3fn)}
    assert load_layer(layer_file(tmp_path, torch.ones(1, 1, 2, 2), None, **other), "c").in_channels == 1


def test_a_folder_is_no_safetensors_file(tmp_path):
    with pytest.raises(ArtifactError, match="cannot be read as safetensors"):
        load_layer(tmp_path, "c")
