import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fheconv
from fheconv import ArtifactError, Conv, InvalidArgumentError, UnsupportedLayerError
from fheconv.capture.checkpoint import load_layer, load_model


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


MODEL = torch.nn.Sequential(
    *(torch.nn.Conv2d(2, 4, 3, padding=1, groups=2), torch.nn.BatchNorm2d(4, eps=0.1), torch.nn.ReLU()),
    *(torch.nn.MaxPool2d(2, stride=1), torch.nn.ConvTranspose2d(4, 2, (2, 1), stride=2, bias=False)),
    *(torch.nn.ReLU(), torch.nn.AvgPool2d(2), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()),
    torch.nn.Linear(8, 3),
)
CARD = [
    {"kind": "Conv2d", "padding": 1, "groups": 2, "weight": [4, 1, 3, 3], "bias": [4]},
    {"kind": "BatchNorm2d", "eps": 0.1, "num_batches_tracked": []},
    {"kind": "ReLU"},
    {"kind": "MaxPool2d", "kernel_size": 2, "stride": 1},
    {"kind": "ConvTranspose2d", "stride": [2, 2]},
    {"kind": "ReLU"},
    {"kind": "AvgPool2d", "kernel_size": [2, 2]},
    {"kind": "AdaptiveAvgPool2d", "output_size": 2},
    {"kind": "Flatten"},
    {"kind": "Linear"},
]


def model_file(folder: Path, changes: dict[int, dict] | None = None, **tensors: torch.Tensor) -> Path:
    """A whole model; the layers are named after their places, with a dot."""
    path = folder / "m.safetensors"
    state = {f"l.{name}": tensor for name, tensor in MODEL.state_dict().items()}
    save_file({**state, **tensors}, path)
    entries = [{"name": f"l.{at}", **entry, **(changes or {}).get(at, {})} for at, entry in enumerate(CARD)]
    path.with_suffix(".json").write_text(json.dumps({"architecture": entries}))
    return path


def test_a_whole_model_computes_what_torch_computes(tmp_path):
    x = torch.rand(2, 2, 5, 5)
    with torch.no_grad():
        expected = MODEL.eval()(x)
        torch.testing.assert_close(
            load_model(model_file(tmp_path))(x.double()), expected.double(), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({2: {"kind": "Add"}}, UnsupportedLayerError, r"'l\.2' kind='Add'.*\.onnx"),
        ({2: {"kind": ["ReLU"]}}, UnsupportedLayerError, r"kind=\['ReLU'\]"),
        ({2: {"inplace": True}}, ArtifactError, "'inplace', which fheconv does not know"),
        ({0: {"stride": "2"}}, ArtifactError, "stride='2'"),
        ({0: {"groups": 3}}, ArtifactError, "does not go with weights"),
        ({0: {"weight": [4, 2, 3, 3]}}, ArtifactError, r"weight=\[4, 2, 3, 3\], and the file's"),
        ({4: {"bias": [2]}}, ArtifactError, r"bias=\[2\], and the file's has None"),
        ({3: {"kernel_size": None}}, ArtifactError, "kernel_size=None"),
        ({3: {"kind": "ReLU"}}, ArtifactError, "kernel_size"),
        ({9: {"kind": "Flatten"}}, ArtifactError, "does not go with weights"),
        ({9: {"name": "fc"}}, ArtifactError, "'fc'.*no such weights"),
        ({3: {"name": "l.2"}}, ArtifactError, "a name that another has"),
        ({3: {"name": "append"}}, ArtifactError, "torch uses itself"),
    ],
)
def test_a_card_that_does_not_describe_the_whole_model_is_refused(tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        load_model(model_file(tmp_path, changes))


def test_weights_that_no_layer_of_the_card_has_are_refused_unless_a_layer_is_named(tmp_path):
    path = model_file(tmp_path, spare=torch.ones(1))
    with pytest.raises(ArtifactError, match="no layers for spare"):
        load_model(path)
    assert load_model(path, "l.0").in_channels == 2
    path.with_suffix(".json").unlink()
    with pytest.raises(ArtifactError, match="There is no card"):
        load_model(path)


def test_a_program_that_torch_exported(tmp_path):
    path = tmp_path / "m.pt2"
    x = torch.rand(2, 2, 5, 5)
    torch.export.save(torch.export.export(MODEL.eval(), (x,)), path)
    torch.testing.assert_close(load_model(path, trusted=True).module()(x), MODEL(x))
    with pytest.raises(InvalidArgumentError, match="would run what is in it"):
        load_model(path)
    with pytest.raises(InvalidArgumentError, match="leave 'c' out"):
        load_model(path, "c")


@pytest.mark.parametrize("content", [None, b"", b"noise", "a zip archive"])
def test_a_file_that_is_no_program_is_named(tmp_path, content, capfd):
    path = tmp_path / "m.pt2"
    if content == "a zip archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", "b")
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"m\.pt2 cannot be read as a program"):
        load_model(path, trusted=True)
    assert capfd.readouterr().err == ""
