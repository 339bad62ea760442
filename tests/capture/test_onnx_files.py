"""Models from ONNX files, compared with torch, with ONNX's reference and with ONNX's own test cases."""

import importlib
import pkgutil
import re
import sys
from typing import Any

import numpy as np
import onnx
import onnx.backend.test.case.node as onnx_cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from torch import nn

import fheconv
from fheconv import ArtifactError, UnsupportedLayerError
from fheconv.capture.onnx_operators import OPERATORS
from tests.support import nets
from tests.support.captured import check
from tests.support.onnx_files import EXPORTERS, exported, reference, written

node = helper.make_node


def outputs(model: nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(images)).numpy()


# What torch exports.


@pytest.mark.sampled(11)
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize(
    "blocks",
    [
        ("conv", "residual", "concatenation"),
        ("depthwise", "shuffle", "max pool"),
        ("slice", "pool before", "residual of activations"),
    ],
)
def test_an_export_of_torch_is_the_model(tmp_path, blocks, exporter):
    module, images = nets.random_net(len(exporter), *blocks, size=(2, 8, 8))
    path = exported(module, torch.tensor(images), tmp_path / "m.onnx", exporter)
    model = fheconv.from_onnx(path)
    for count in (1, 3, len(images)):
        expected = outputs(module, images[:count])
        np.testing.assert_allclose(outputs(model, images[:count]), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(reference(path, images[:2]), outputs(model, images[:2]), rtol=1e-6, atol=1e-6)
    of_torch, of_file = nets.quantize(module, images), nets.quantize(model, images)
    x = nets.real_images(of_torch, nets.integer_images(of_torch, 0, 4))
    np.testing.assert_array_equal(of_file.integers(x), of_torch.integers(x))


def test_all_weights_are_parameters_with_their_names(tmp_path):
    module = nn.Sequential(nn.Conv2d(1, 2, 2), nn.PReLU(2), nn.Flatten(), nn.Linear(18, 3))
    path = exported(module.eval(), torch.rand(1, 1, 4, 4), tmp_path / "m.onnx", "old, one image")
    model = fheconv.from_onnx(path)
    names = {f"weights.{name.replace('.', '_')}" for name, _ in module.named_parameters() if name[0] != "1"}
    assert names < dict(model.named_parameters()).keys()
    model(torch.rand(5, 1, 4, 4)).square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in model.parameters())
    assert sum(weight.numel() for weight in model.parameters()) == sum(w.numel() for w in module.parameters())


def test_a_model_shows_itself_in_a_line(tmp_path):
    weights = {f"weight of a long name {number}": np.ones((2, 2), np.float32) for number in range(40)}
    values = ["x", *(f"value {number}" for number in range(39)), "y"]
    nodes = [
        node("MatMul", [before, weight], [after])
        for before, weight, after in zip(values, weights, values[1:], strict=False)
    ]
    shown = repr(fheconv.from_onnx(written(tmp_path / "m.onnx", nodes, ("n", 2), weights)))
    assert shown == "OnnxModel: x (2,) → y, 40 nodes, 160 numbers in weights"


def test_statistics_and_single_numbers_are_not_trained(tmp_path):
    nodes = [node("BatchNormalization", ["x", "s", "b", "m", "v"], ["z"]), node("Mul", ["z", "two"], ["y"])]
    numbers = np.array([0.5, 2.0], np.float32)
    weights = dict.fromkeys("sbmv", numbers) | {"two": np.float32(2)}
    model = fheconv.from_onnx(written(tmp_path / "m.onnx", nodes, ("n", 2, 3), weights))
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == {
        "weights.s",
        "weights.b",
    }


def test_weights_in_another_file_are_read(tmp_path):
    x = np.random.default_rng(0).random((2, 2), np.float32)
    path = written(tmp_path / "m.onnx", [node("MatMul", ["x", "w"], ["y"])], ("n", 2), {"w": x})
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.data", size_threshold=0)
    np.testing.assert_allclose(outputs(fheconv.from_onnx(str(path)), x), x @ x, rtol=1e-6)
    (tmp_path / "w.data").write_bytes(b"short")
    with pytest.raises(ArtifactError, match=r"m\.onnx"):
        fheconv.from_onnx(path)


# What Keras exports, and other graphs.


def keras(path):
    """A network as tf2onnx writes it: images (N, M, N, C), and transposes around what reads channels."""
    rng = np.random.default_rng(0)
    nodes = [
        node("Transpose", ["x"], ["a"], perm=[0, 3, 1, 2]),
        node("Conv", ["a", "w", "b"], ["c"], auto_pad="SAME_UPPER", strides=[2, 2], kernel_shape=[3, 3]),
        node("LeakyRelu", ["c"], ["d"], alpha=0.3),
        node("MaxPool", ["d"], ["e"], kernel_shape=[2, 2], strides=[1, 1], auto_pad="SAME_UPPER"),
        node("Transpose", ["e"], ["f"], perm=[0, 2, 3, 1]),
        node("Mul", ["f", "gain"], ["g"]),
        node("Reshape", ["g", "shape"], ["h"]),
        node("MatMul", ["h", "m"], ["i"]),
        node("Add", ["i", "k"], ["y"]),
    ]
    shapes = {"w": (2, 1, 3, 3), "b": (2,), "gain": (2,), "m": (8, 3), "k": (3,)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return written(path, nodes, ("n", 4, 4, 1), {**weights, "shape": np.array([-1, 8])})


IMAGES = np.random.default_rng(1).random((6, 4, 4, 1), np.float32)


def test_an_export_of_keras_takes_its_own_images(tmp_path):
    path = keras(tmp_path / "k.onnx")
    model = fheconv.from_onnx(path)
    np.testing.assert_allclose(outputs(model, IMAGES), reference(path, IMAGES), rtol=1e-5, atol=1e-6)
    network = check(model, (4, 4, 1), lookups=8)  # after the convolution; maxima are not counted
    np.testing.assert_allclose(network(IMAGES), reference(path, IMAGES), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_an_export_of_keras_runs_encrypted(tmp_path):
    model = fheconv.from_onnx(keras(tmp_path / "k.onnx"))
    network = fheconv.quantize(model, IMAGES, fheconv.QuantConfig(accumulator_bits=5))
    circuit = fheconv.compile(network)
    circuit.keygen()
    assert circuit.verify(IMAGES[:1]).ok


def test_a_shape_that_the_file_computes_is_computed(tmp_path):
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"], axis=0),
        node("Unsqueeze", ["n", "axes"], ["first"]),
        node("Concat", ["first", "rest"], ["shape"], axis=0),
        node("Reshape", ["x", "shape"], ["y"]),
    ]
    constants = {"zero": np.array(0), "axes": np.array([0]), "rest": np.array([2, -1])}
    model = fheconv.from_onnx(written(tmp_path / "m.onnx", nodes, ("n", 4, None), constants))
    for count in (1, 3):
        x = np.random.default_rng(0).random((count, 4, 5), np.float32)
        np.testing.assert_array_equal(outputs(model, x), x.reshape(count, 2, 10))


@given(first=st.sampled_from([-1, 0, 1]), rest=st.sampled_from([(12,), (3, 4), (2, 2, 3), (-1,), (4, -1)]))
def test_a_reshape_keeps_the_batch_that_it_was_exported_without(tmp_path_factory, first, rest):
    if first == -1 and -1 in rest:
        first = 1
    path = tmp_path_factory.mktemp("reshape") / "m.onnx"
    nodes = [node("Reshape", ["x", "shape"], ["y"])]
    model = fheconv.from_onnx(written(path, nodes, (1, 3, 4), {"shape": np.array([first, *rest])}))
    x = np.random.default_rng(0).random((3, 3, 4), np.float32)
    np.testing.assert_array_equal(outputs(model, x), reference(path, x))


def test_old_files_mean_what_they_meant(tmp_path):
    nodes = [
        node("Pad", ["x"], ["a"], pads=[0, 0, 1, 0, 0, 0, 0, 0], value=2.0),
        node("Unsqueeze", ["a"], ["b"], axes=[1]),
        node("Upsample", ["b", "scales"], ["c"], mode="nearest"),
        node("Dropout", ["c"], ["d"], ratio=0.5),
        node("Softmax", ["d"], ["y"], axis=1),
    ]
    scales = np.array([1, 1, 1, 2, 1], np.float32)
    path = written(tmp_path / "m.onnx", nodes, ("n", 2, 3, 2), {"scales": scales}, opset=9)
    x = np.random.default_rng(0).random((3, 2, 3, 2), np.float32)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 0), (0, 0)), constant_values=2).repeat(2, axis=2)
    expected = torch.tensor(padded).flatten(1).softmax(1).reshape(3, 1, 2, 8, 2)  # of all axes from the first
    np.testing.assert_allclose(outputs(fheconv.from_onnx(path), x), expected, rtol=1e-6)


def test_one_of_several_outputs_is_picked_by_its_name(tmp_path):
    path = tmp_path / "m.onnx"
    written(path, [node("Relu", ["x"], ["y"]), node("Neg", ["x"], ["other"])], ("n", 1, 3, 3), {})
    model = onnx.load(path)
    model.graph.output.append(helper.make_tensor_value_info("other", 1, ()))
    onnx.save(model, path)
    x = np.random.default_rng(0).normal(size=(4, 1, 3, 3))
    network = fheconv.quantize(fheconv.from_onnx(path), x, outputs="other")
    np.testing.assert_allclose(network(x), -x, atol=float(network.input.scale))


# ONNX's own cases.

# Why a case is refused: options that no exporter of models writes, or images of a batch that are mixed.
REFUSED = (
    "select_last_index|dilations are|in evaluation mode|output 'z'|puts the images of a batch|mode CRD|"
    "without axes it runs over|outside of the 2 of axis 0|it drops an axis|to these sizes|keeps the ratio|"
    r"same reduction dim|invalid for input of size|[Mm]ismatch|takes \(n, 0, 4\)|"
    "a scale for each block|no type of 8 or 16 bits"
)


def own_cases() -> list[Any]:
    """The cases of one supported operator, whose first input is a batch of floats."""
    names = {operator.lower() for operator in OPERATORS} - {"cast"}
    for module in pkgutil.iter_modules(onnx_cases.__path__):
        if module.name.replace("_", "") in names:
            with np.errstate(all="ignore"):  # of infinite results, which some cases have
                importlib.import_module(f"{onnx_cases.__name__}.{module.name}")
    found = []
    for case in onnx_cases._NodeTestCases:
        inputs = case.data_sets[0][0]
        if not all(isinstance(one, np.ndarray) and one.dtype.kind in "biuf" for one in inputs):
            continue  # numbers of four or eight bits that numpy does not have
        first = inputs[0]
        single = len(case.model.graph.node) == 1 and case.model.graph.node[0].op_type in OPERATORS
        if single and first.ndim > 1 and first.dtype.kind == "f":
            found.append(case)
    return found


@pytest.mark.slow
def test_onnxs_own_cases_are_computed_or_refused_with_their_node(tmp_path):
    computed, refused, path = set(), {}, tmp_path / "m.onnx"
    for case in own_cases():
        inputs, expected = case.data_sets[0]
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        names = [value.name for value in model.graph.input]
        for name, value in zip(names[1:], inputs[1:], strict=True):
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        del model.graph.input[1:]
        onnx.save(model, path)
        operator = model.graph.node[0].op_type
        try:
            module = fheconv.from_onnx(path)
            with torch.no_grad():
                got = module(torch.tensor(inputs[0]).to(module.dtype))
        except fheconv.FheConvError as error:
            refused[case.name] = str(error)
            continue
        found = [*got.values()] if isinstance(got, dict) else [got]
        for one, other in zip(found, expected, strict=True):
            eps = 1e-2 if inputs[0].dtype == np.float16 else 1e-4
            assert one.shape == other.shape, case.name
            np.testing.assert_allclose(one.double(), other.astype(float), eps, eps, err_msg=case.name)
        computed.add(operator)
    unexplained = {name: said for name, said in refused.items() if not re.search(REFUSED, said)}
    assert unexplained == {}
    assert all(re.search(r"Node '.*' \(|images have shape", said) for said in refused.values())
    # The others have cases of several images as inputs alone, or of whole numbers.
    assert len(computed) >= 0.75 * len(OPERATORS), sorted(OPERATORS.keys() - computed)


# What is refused.


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([node("LSTM", ["x", "w", "w"], ["y"], "the lstm")], r"'the lstm' \(LSTM\).*nearest.*convolution"),
        ([node("MatMulInteger", ["x", "x"], ["y"], "q")], r"'q' \(MatMulInteger\).*the float model"),
        ([node("Relu", ["x"], ["y"], "r", domain="my.own")], r"'r' \(Relu\).*Relu of 'my\.own'"),
        ([node("Relux", ["x"], ["y"], "r")], r"'r' \(Relux\).*no Relux .*nearest.*Relu"),
        ([node("Relu", ["x"], ["a"]), node("Gather", ["w", "a"], ["y"], "g")], r"'g' \(Gather\).*input 1"),
        ([node("Flatten", ["x"], ["y"], "f", axis=0)], r"'f' \(Flatten\).*axis=1"),
        ([node("Squeeze", ["x", "zero"], ["y"], "s")], r"'s' \(Squeeze\).*batch"),
        ([node("MatMul", ["x", "four"], ["y"], "m")], r"'m' \(MatMul\) cannot be computed with torch"),
        ([node("ConstantOfShape", ["huge"], ["y"], "c")], r"'c' \(ConstantOfShape\).*at most"),
        ([node("Split", ["huge"], ["y"], "s", num_outputs=2**40)], r"'s' \(Split\).*at most"),
        ([node("Resize", ["x", "", "factors"], ["y"], "r")], r"'r' \(Resize\).*at most"),
        ([node("Pad", ["x", "pads"], ["y"], "p", mode="edge")], r"'p' \(Pad\).*at most"),
        ([node("Tile", ["x", "huge"], ["y"], "t")], r"'t' \(Tile\).*values an image"),
    ],
)
def test_a_refusal_names_the_node(tmp_path, nodes, words):
    constants = {
        "w": np.ones((3, 2), np.float32),
        "four": np.ones((4, 2), np.float32),
        "one": np.float32(1),
        "zero": np.array([0]),
        "huge": np.array([1, 2**20, 2**20, 1]),
        "factors": np.array([1, 1, 1, 2**40], np.float32),
        "pads": np.array([0, 0, 0, 0, 0, 0, 0, 2**40]),
    }
    path = written(tmp_path / "m.onnx", nodes, ("n", 1, 3, 3), constants)
    with pytest.raises(UnsupportedLayerError, match=words):
        fheconv.from_onnx(path)


def test_what_capture_refuses_names_the_node(tmp_path):
    nodes = [node("Neg", ["x"], ["a"]), node("Transpose", ["a"], ["b"], perm=[0, 1, 3, 2])]
    nodes.append(node("Pow", ["x", "b"], ["y"], "gate/Pow.1"))
    model = fheconv.from_onnx(written(tmp_path / "m.onnx", nodes, ("n", 1, 3, 3), {}))
    with pytest.raises(UnsupportedLayerError, match=r"'gate/Pow_1'.*two encrypted values"):
        fheconv.quantize(model, np.ones((2, 1, 3, 3)))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 1, 4, 5), r"takes \(n, 4, 5, 1\)\. Move .*: numpy\.moveaxis\(images, 1, -1\)"),
        ((2, 4, 5), r"images\.reshape\(-1, 4, 5, 1\)"),
        ((2, 3, 5, 1), r"\(n, 3, 5, 1\), and the input 'x' .* takes \(n, 4, 5, 1\)\.$"),
    ],
)
def test_images_of_another_shape_are_refused_with_what_to_do(tmp_path, shape, words):
    model = fheconv.from_onnx(written(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], ("n", 4, 5, 1), {}))
    with pytest.raises(fheconv.InputRangeError, match=words):
        fheconv.quantize(model, np.ones(shape))


def test_channels_that_are_last_are_moved_to_where_the_file_has_them(tmp_path):
    model = fheconv.from_onnx(written(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], ("n", 3, 4, 5), {}))
    with pytest.raises(fheconv.InputRangeError, match=r"numpy\.moveaxis\(images, -1, 1\)"):
        model(torch.ones(2, 4, 5, 3))


def test_damaged_files_are_refused(tmp_path):
    path, damaged = keras(tmp_path / "k.onnx"), tmp_path / "damaged.onnx"
    data, said = path.read_bytes(), []
    rng = np.random.default_rng(0)
    for _ in range(40):
        start, length = int(rng.integers(len(data))), int(rng.integers(1, 60))
        damaged.write_bytes(data[:start] + rng.bytes(length) + data[start + length :])
        try:
            fheconv.from_onnx(damaged)
        except (ArtifactError, UnsupportedLayerError) as error:
            said.append(str(error))
    assert len(said) > 10
    assert all("damaged.onnx" in one for one in said)
    for end in (10, len(data) // 2, len(data) - 1):
        damaged.write_bytes(data[:end])
        with pytest.raises(ArtifactError, match=r"damaged\.onnx cannot be read as an ONNX file"):
            fheconv.from_onnx(damaged)
    with pytest.raises(ArtifactError, match=r"none\.onnx"):
        fheconv.from_onnx(tmp_path / "none.onnx")


def without_outputs(graph):
    del graph.output[:]


def without_a_node(graph):
    del graph.node[1]


def with_a_shape_of_two_axes(graph):
    (shape,) = (value for value in graph.initializer if value.name == "shape")
    shape.dims[:] = [1, 2]


def with_numbers_of_no_type(graph):
    graph.initializer[0].data_type = 99


@pytest.mark.parametrize(
    "change", [without_outputs, without_a_node, with_a_shape_of_two_axes, with_numbers_of_no_type]
)
def test_graphs_that_make_no_sense_are_refused(tmp_path, change):
    path = keras(tmp_path / "k.onnx")
    model = onnx.load(path)
    change(model.graph)
    path.write_bytes(model.SerializeToString())
    with pytest.raises((ArtifactError, UnsupportedLayerError), match=r"k\.onnx"):
        fheconv.from_onnx(path)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "link"])
def test_weights_outside_of_the_folder_are_not_read(tmp_path, location):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(16))
    (folder / "link").symlink_to(tmp_path / "secret")
    weight = np.ones((2, 2), np.float32)
    path = written(folder / "m.onnx", [node("MatMul", ["x", "w"], ["y"])], ("n", 2), {"w": weight})
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.data", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    (entry,) = (e for e in model.graph.initializer[0].external_data if e.key == "location")
    entry.value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="outside of its folder"):
        fheconv.from_onnx(path)


def test_a_model_of_two_inputs_is_refused(tmp_path):
    path = written(tmp_path / "m.onnx", [node("Add", ["x", "z"], ["y"])], ("n", 2), {})
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("z", 1, ("n", 2)))
    onnx.save(model, path)
    with pytest.raises(UnsupportedLayerError, match=r"inputs 'x', 'z'.*one argument"):
        fheconv.from_onnx(path)


def test_without_onnx_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(fheconv.MissingExtraError, match=r"fheconv\[onnx\]"):
        fheconv.from_onnx(tmp_path / "m.onnx")


def test_a_path_in_place_of_a_model_is_answered(tmp_path):
    with pytest.raises(fheconv.InvalidArgumentError, match="from_onnx"):
        fheconv.quantize(str(tmp_path / "m.onnx"), np.ones((2, 1, 3, 3)))
