"""ONNX files: exported by torch, or written node by node."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator


def exported(module: torch.nn.Module, images: torch.Tensor, path: Path, exporter: str) -> Path:
    """Write a module with one of torch's exporters, for any batch size or for that of one image."""
    options: dict[str, Any] = {"dynamo": exporter.startswith("new"), "verbose": False}
    if exporter == "new, any batch":
        options["dynamic_shapes"] = ({0: torch.export.Dim("n", min=1, max=64)},)
    elif exporter == "old, any batch":
        options |= {"input_names": ["x"], "dynamic_axes": {"x": {0: "n"}}}
    images = images[:2] if exporter.endswith("any batch") else images[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (images,), path, **options)
    return path


EXPORTERS = ("old, one image", "old, any batch", "new, one image", "new, any batch")


def written(
    path: Path, nodes: list[Any], shape: tuple[Any, ...], weights: dict[str, Any], opset: int = 18
) -> Path:
    """Write a graph from the input x to the output y; `weights` are its constants."""
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, size)
        for name, size in (("x", shape), ("y", ()))
    )
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "graph", [x], [y], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def reference(path: Path, images: np.ndarray) -> np.ndarray:
    """What ONNX's own reference computes, image by image."""
    evaluator = ReferenceEvaluator(onnx.load(path))
    (name,) = evaluator.input_names
    return np.concatenate([evaluator.run(None, {name: image[None]})[0] for image in images])
