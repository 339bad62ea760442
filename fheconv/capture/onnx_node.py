"""Describes a node of an ONNX graph as plain data, and computes what depends on shapes alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fheconv.basics.arrays import Array
from fheconv.capture.graph import Unsupported

# The most values that a node may make of constants, or of one image: a file of a few bytes could ask for any
# number of them.
MOST_VALUES = 2**27
# What gives the shape of an image or a constant.
SHAPES = ("Shape", "Size")
# What is computed with numpy, by the reference of ONNX, where its inputs are constants and shapes.
STATIC = frozenset((
    "Abs", "Add", "And", "Cast", "Ceil", "Clip", "Concat", "ConstantOfShape", "Div", "Equal", "Exp", "Expand",
    "Flatten", "Floor", "Gather", "Greater", "Identity", "Less", "Log", "Max", "Min", "Mod", "Mul", "Neg",
    "Not", "Or", "Pow", "Range", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "Reshape", "Round", "Shape", "Size", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Tile",
    "Transpose", "Unsqueeze", "Where",
))  # fmt: skip
# Those of them whose results are as large as all inputs broadcast together.
BROADCASTING = frozenset((
    "Add", "And", "Div", "Equal", "Greater", "Less", "Max", "Min", "Mod", "Mul", "Or", "Pow", "Sub", "Where",
))  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Node:
    """Holds a node: its name in the file, its operator and attributes, and the names of its values.

    An input that is left out has the name "". `opset` is the version of ONNX's operators that the file uses.
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    opset: int

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or `default` if the node does not have it."""
        return self.attributes.get(name, default)

    def __str__(self) -> str:
        """Return how errors name the node."""
        return f"Node {self.name!r} ({self.operator})"


def computed(node: Node, inputs: Sequence[Array | None]) -> list[Array]:
    """Return the results of a node whose operator is in `STATIC`, computed by ONNX's own reference.

    Raises `Unsupported` for more than `MOST_VALUES` values.
    """
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    check_size(_size(node, inputs))
    given = {name: value for name, value in zip(node.inputs, inputs, strict=True) if value is not None}
    graph = helper.make_graph(
        [helper.make_node(node.operator, node.inputs, node.outputs, **node.attributes)],
        "one node",
        [helper.make_empty_tensor_value_info(name) for name in given],
        [helper.make_empty_tensor_value_info(name) for name in node.outputs],
    )
    results = ReferenceEvaluator(graph, opsets={"": node.opset}).run(None, given)
    return [np.asarray(result) for result in results]


def check_size(values: int) -> None:
    """Raise `Unsupported` for more than `MOST_VALUES` values."""
    if values > MOST_VALUES:
        raise Unsupported(f"it would make {values:,} values, and at most {MOST_VALUES:,} are made")


def _size(node: Node, inputs: Sequence[Array | None]) -> int:
    """Return how many values a node makes at most, from the sizes of its inputs."""
    given = [value for value in inputs if value is not None]
    match node.operator:
        case "ConstantOfShape":
            return math.prod(map(int, given[0]))
        case "Expand":
            return math.prod(np.broadcast_shapes(given[0].shape, tuple(map(int, given[1]))))
        case "Gather":
            axis = node.get("axis", 0)
            return given[0].size // max(1, given[0].shape[axis]) * given[1].size
        case "Range":
            start, end, step = (float(value) for value in given)
            return max(0, math.ceil((end - start) / step))
        case "Tile":
            return given[0].size * math.prod(map(int, given[1]))
        case "Concat" | "Split":
            return max(sum(value.size for value in given), node.get("num_outputs", 0))
        case operator if operator in BROADCASTING:
            return math.prod(np.broadcast_shapes(*(value.shape for value in given)))
    return given[0].size
