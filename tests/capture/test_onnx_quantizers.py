"""QuantizeLinear and DequantizeLinear: the integers of a file are taken over."""

import numpy as np
import pytest
import torch
from onnx import helper

import fheconv
from fheconv import UnsupportedLayerError
from tests.support.onnx_files import reference, written

RNG = np.random.default_rng(0)
IMAGES = np.linspace(-1, 2, 12 * 36).reshape(12, 1, 6, 6)
IMAGES = RNG.permuted(IMAGES, axis=0).astype(np.float32)


def node(operator, inputs, output, **options):
    return helper.make_node(operator, inputs, [output], **options)


def rounded(name, source):
    """A quantizer of an activation, as those who write such files put it."""
    return [
        node("QuantizeLinear", [source, f"{name}_s", f"{name}_z"], f"{name}_q"),
        node("DequantizeLinear", [f"{name}_q", f"{name}_s", f"{name}_z"], name),
    ]


def file(path, kind=np.uint8):
    """A convolution and a linear layer with integer weights, and images and activations of integers."""
    constants = {
        "i_s": np.float32(0.012),
        "i_z": kind(40),
        "a_s": np.float32(0.0707),  # no sum is in the middle between two integers
        "a_z": kind(0),
        "w_q": RNG.integers(-3, 4, (3, 1, 3, 3)).astype(np.int8),
        "w_s": np.array([0.1, 0.2, 0.15], np.float32),
        "w_z": np.zeros(3, np.int8),
        "v_q": RNG.integers(-3, 4, (48, 4)).astype(np.int8),
        "v_s": np.float32(0.05),
        "b_q": RNG.integers(-30, 30, 3).astype(np.int32),
        "b_s": np.float32(0.012) * np.array([0.1, 0.2, 0.15], np.float32),
    }
    nodes = [
        *rounded("i", "x"),
        node("DequantizeLinear", ["w_q", "w_s", "w_z"], "w", axis=0),
        node("DequantizeLinear", ["b_q", "b_s"], "b", axis=0),
        node("DequantizeLinear", ["v_q", "v_s"], "v"),
        node("Conv", ["i", "w", "b"], "c", strides=[1, 1], pads=[0, 0, 0, 0]),
        node("Relu", ["c"], "r"),
        *rounded("a", "r"),
        node("Flatten", ["a"], "f"),
        node("MatMul", ["f", "v"], "y"),
    ]
    return written(path, nodes, ("n", 1, 6, 6), constants, opset=21)


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
def test_the_integers_of_a_file_are_taken_over(tmp_path, kind):
    path = file(tmp_path / "q.onnx", kind)
    network = fheconv.quantize(fheconv.from_onnx(path), IMAGES[:1])
    assert network.input.scale == np.float32(0.012)
    assert len(network.layers) == 2  # none for images, which the client quantizes
    np.testing.assert_allclose(network(IMAGES), reference(path, IMAGES), atol=1e-4)


@pytest.mark.parametrize("named", [2, 3, None])
def test_the_type_of_the_integers_is_that_of_the_zero_point_or_named(tmp_path, named):
    options = {} if named is None else {"output_dtype": named}
    nodes = [
        node("QuantizeLinear", ["x", "s"], "q", **options),
        node("DequantizeLinear", ["q", "s"], "d"),
        node("Neg", ["d"], "y"),
    ]
    path = written(tmp_path / "q.onnx", nodes, ("n", 1, 6, 6), {"s": np.float32(0.005)}, opset=21)
    model = fheconv.from_onnx(path)
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.tensor(IMAGES)), reference(path, IMAGES), atol=1e-6)


def test_scales_of_blocks_are_refused(tmp_path):
    nodes = [node("QuantizeLinear", ["x", "s"], "q", block_size=3), node("Cast", ["q"], "y", to=1)]
    scales = {"s": np.ones((1, 1, 2, 6), np.float32)}
    path = written(tmp_path / "q.onnx", nodes, ("n", 1, 6, 6), scales, opset=21)
    with pytest.raises(UnsupportedLayerError, match="a scale for each block"):
        fheconv.quantize(fheconv.from_onnx(path), IMAGES[:1])


def test_weights_are_held_once(tmp_path):
    weight = np.ones((4, 1, 3, 3), np.float32)
    path = written(tmp_path / "c.onnx", [node("Conv", ["x", "w"], "y")], ("n", 1, 6, 6), {"w": weight})
    model = fheconv.from_onnx(path)
    held = [
        value
        for part in vars(model).values()
        if isinstance(part, dict)
        for value in part.values()
        if isinstance(value, np.ndarray) and value.size == weight.size
    ]
    assert held == []
    assert [tuple(p.shape) for p in model.parameters()] == [weight.shape]
