"""Runs the nodes of an ONNX graph with torch, as a module whose weights can be trained."""

from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fheconv.basics.arrays import Array, Shape
from fheconv.basics.errors import InputRangeError, UnsupportedLayerError
from fheconv.basics.report import MOST_LETTERS
from fheconv.capture.graph import Unsupported
from fheconv.capture.onnx_node import MOST_VALUES, SHAPES, STATIC, Node, computed
from fheconv.capture.onnx_operators import OPERATORS


class OnnxNode(nn.Module):
    """Computes what a node of an ONNX graph computes. Capture takes the layer's name from this module's."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node

    def forward(self, *inputs: Any) -> Any:
        """Return the result of the node for tensors and constants."""
        return OPERATORS[self.node.operator].function(self.node, *inputs)

    def extra_repr(self) -> str:
        """Return the operator."""
        return self.node.operator


class OnnxModel(nn.Module):
    """Computes what an ONNX graph computes, for a batch of images of any size of the batch.

    Its state consists of the constants of the graph that are floats, in `weights`, by their names in the file
    (with "_" for "."). BatchNorm keeps to the statistics of the file, in training mode too.

    It returns a tensor, or a dict of tensors by their names if the graph has several outputs.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        constants: Mapping[str, Array],
        image: tuple[str, tuple[int | None, ...]],
        outputs: Sequence[str],
    ) -> None:
        super().__init__()
        self.input_name, self.input_shape = image  # the sizes of the axes behind the batch; None: any size
        self.output_names = tuple(outputs)
        doubles = any(value.dtype == np.float64 for value in constants.values())
        self.dtype = torch.float64 if doubles else torch.float32
        self.weights = nn.ParameterDict()
        self._keys: dict[str, str] = {}  # of `weights`, by the names of the constants
        self._constants: dict[str, Array] = {}
        self._steps: list[tuple[str, Node]] = []
        statistics = {n for node in nodes if node.operator == "BatchNormalization" for n in node.inputs[3:5]}
        # What shapes may depend on stays an array, because a weight has no value while it is traced.
        static = {
            name
            for node in nodes
            for number, name in enumerate(node.inputs)
            if node.operator in STATIC or number in OPERATORS[node.operator].static
        }
        for name, value in constants.items():
            self._add_constant(name, value, trained=name not in statistics, static=name in static)
        for node in nodes:
            key = node.name.replace(".", "_") or node.operator
            while hasattr(self, key):
                key += "_"
            self.add_module(key, OnnxNode(node))
            self._steps.append((key, node))

    def __repr__(self) -> str:
        shape = tuple("any" if size is None else size for size in self.input_shape)
        count = sum(weight.numel() for weight in self.weights.values())
        outputs = ", ".join(self.output_names)
        shown = shorten(f"{self.input_name} {shape} → {outputs}", MOST_LETTERS, placeholder=" …")
        return f"OnnxModel: {shown}, {len(self._steps):,} nodes, {count:,} numbers in weights"

    def _add_constant(self, name: str, value: Array, *, trained: bool, static: bool) -> None:
        """Keep a constant as a weight if it is one, else as an array. Single numbers are not trained."""
        is_weight = value.dtype.kind == "f" and value.size > 0
        if static or not is_weight:
            self._constants[name] = value
        if is_weight:
            key = name.replace(".", "_")
            while key in self.weights or hasattr(self.weights, key):
                key += "_"
            weight = torch.tensor(value, dtype=self.dtype)
            self.weights[key] = nn.Parameter(weight, requires_grad=trained and value.size > 1)
            self._keys[name] = key

    def forward(self, images: Tensor) -> Any:
        """Return the outputs for images (N, *S).

        Raises `InputRangeError` for images of another shape, and `UnsupportedLayerError` naming the node that
        cannot be computed.
        """
        self._check_shape(tuple(images.shape[1:]))
        # A tensor depends on the image, an array on shapes alone.
        values: dict[str, Tensor | Array] = {self.input_name: images}
        for key, node in self._steps:
            try:
                results = self._results(key, node, values)
                if len(results) < len(node.outputs):
                    raise Unsupported(f"its output {node.outputs[len(results)]!r} is not supported")
                for name, result in zip(node.outputs, results, strict=False):
                    size = result.numel() if isinstance(result, Tensor) else result.size
                    if size > MOST_VALUES * max(1, len(images)):
                        raise Unsupported(f"its result has more than {MOST_VALUES:,} values an image")
                    values[name] = result
            except Exception as error:  # torch and numpy can raise anything for arguments that do not fit
                reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
                raise UnsupportedLayerError(f"{node} cannot be computed with torch: {reason}.") from error
        found = {name: self._tensor(name, values) for name in self.output_names}
        return found if len(found) > 1 else found[self.output_names[0]]

    def _check_shape(self, shape: Shape) -> None:
        """Raise `InputRangeError` for images of another shape than those of the file, and say what to do."""
        wanted = self.input_shape
        if len(shape) == len(wanted) and all(w in (None, n) for w, n in zip(wanted, shape, strict=True)):
            return
        remedy = ""
        if tuple(size for size in wanted if size != 1) == shape:
            remedy = f" Give them all axes: images.reshape(-1, {', '.join(map(str, wanted))})."
        elif wanted == (*shape[-1:], *shape[:-1]):
            remedy = " Move their channels to the front: numpy.moveaxis(images, -1, 1)."
        elif wanted == (*shape[1:], *shape[:1]):
            remedy = " Move their channels to the end: numpy.moveaxis(images, 1, -1)."
        there, here = (
            ", ".join("any" if size is None else str(size) for size in sizes) for sizes in (wanted, shape)
        )
        raise InputRangeError(
            f"The images have shape (n, {here}), and the input {self.input_name!r} of the ONNX file takes "
            f"(n, {there}).{remedy}"
        )

    def _results(self, key: str, node: Node, values: dict[str, Tensor | Array]) -> Sequence[Any]:
        known = [values.get(name, self._constants.get(name)) for name in node.inputs]
        if node.operator in SHAPES and isinstance(known[0], Tensor):
            shape = np.array(known[0].shape, np.int64)
            whole = node.operator == "Shape"
            return [shape[node.get("start", 0) : node.get("end")] if whole else np.prod(shape)]
        arrays = [value for value in known if not isinstance(value, Tensor)]
        if node.operator in STATIC and len(arrays) == len(known):
            return computed(node, arrays)
        arguments: list[Any] = []
        for number, name in enumerate(node.inputs):
            if number not in OPERATORS[node.operator].static or not name:
                arguments.append(self._tensor(name, values) if name else None)
            elif isinstance(known[number], Tensor):
                raise Unsupported(f"its input {number} must be a constant, and depends on the image")
            else:
                arguments.append(known[number])
        made = getattr(self, key)(*arguments)
        return made if isinstance(made, tuple | list) else [made]

    def _tensor(self, name: str, values: dict[str, Tensor | Array]) -> Tensor:
        """Return a value as a tensor, with the images' type if it is of floats."""
        value = values.get(name)
        if isinstance(value, Tensor):
            return value
        if value is None and name in self._keys:
            return self.weights[self._keys[name]]
        array = self._constants[name] if value is None else value
        images: Any = values[self.input_name]
        dtype = images.dtype if array.dtype.kind == "f" and images.is_floating_point() else None
        return torch.tensor(array, dtype=dtype, device=images.device)
