"""Reads ONNX files, and turns their graphs into torch modules."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fheconv.basics.arrays import Array
from fheconv.basics.errors import ArtifactError, MissingExtraError, UnsupportedLayerError
from fheconv.basics.files import check_regular, read_file
from fheconv.capture.graph import Unsupported
from fheconv.capture.onnx_model import OnnxModel
from fheconv.capture.onnx_moves import of_any_batch
from fheconv.capture.onnx_node import MOST_VALUES, SHAPES, STATIC, Node, computed
from fheconv.capture.onnx_operators import OPERATORS, nearest

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

# The most bytes of a file, and of all that it refers to: what a protobuf message can hold.
MOST_BYTES = 2**31 - 1
# The newest version of ONNX's operators that are known here, and the oldest that mean the same.
OPSETS = range(7, 29)


def from_onnx(path: str | os.PathLike[str]) -> OnnxModel:
    """Return the model of an ONNX file as a torch module, for `fheconv.quantize` and `fheconv.tune`.

    path: a file with one input, a batch of images (N, *S), and one output or more. If it was exported for one
        batch size, the module takes batches of any size all the same. Images have the layout of the file:
        Keras's are (N, M, N, C). Weights may be in other files of the same folder.

    The module computes in float32, or in float64 if a weight of the file has that. All weights are parameters
    with their names in the file, so that torch can train them; BatchNorm keeps its statistics. A file with
    several outputs gives a dict of tensors by their names, of which `outputs` of `quantize` picks one.

    Loading a file runs nothing that is in it.

    Raises `UnsupportedLayerError` naming the node that cannot be computed and what is supported nearest,
    `ArtifactError` for a file that is damaged, too large, or refers to files outside of its folder, and
    `MissingExtraError` without the package onnx.

    Example:
        >>> from onnx import helper, save
        >>> ends = [helper.make_tensor_value_info(name, 1, ("n", 1, 4, 4)) for name in ("x", "y")]
        >>> graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
        >>> save(helper.make_model(graph), "relu.onnx")
        >>> import fheconv, torch
        >>> fheconv.from_onnx("relu.onnx")(torch.tensor([[[[-1.0, 0.0, 1.0, 2.0]] * 4]])).sum()
        tensor(12.)
    """
    file = Path(path)
    graph, opset = _loaded(file)
    arrays = {tensor.name: _array(tensor, file) for tensor in graph.initializer}
    if graph.sparse_initializer:
        raise UnsupportedLayerError(f"{file} has sparse weights; export them as dense ones.")
    image, sizes = _image(graph, arrays, file)
    nodes = _unfolded(graph, opset, arrays, image, file)
    outputs = [output.name for output in graph.output]
    if not outputs:
        raise ArtifactError(f"{file} has no outputs; export the model again.")
    read = {name for node in nodes for name in node.inputs}.union(outputs)
    constants = {name: value for name, value in arrays.items() if name in read}
    model = OnnxModel(nodes, constants, (image, sizes), outputs).eval()
    _check_shapes(model, file)
    return model


def _unfolded(
    graph: "GraphProto", opset: int, arrays: dict[str, Array], image: str, file: Path
) -> list[Node]:
    """Return the nodes that need the image or its shape. What the others make is added to the `arrays`."""
    nodes, size = [], 0
    of_image, of_shape = {image}, set[str]()  # the values that depend on the image, or on its shape alone
    wanted = {name for proto in graph.node for name in proto.input} | {value.name for value in graph.output}
    wanted.discard("")  # an input that is left out
    for number, proto in enumerate(graph.node):
        node = _node(proto, number, opset, file)
        while node.outputs and node.outputs[-1] not in wanted:
            node = replace(node, outputs=node.outputs[:-1])
        if not node.outputs:
            continue
        read = {name for name in node.inputs if name}
        if missing := read - arrays.keys() - of_image - of_shape:
            raise ArtifactError(f"{file}: {node} reads {', '.join(missing)}, which no node before it makes.")
        if node.operator == "Constant":
            arrays[node.outputs[0]] = _value(node, file)
        elif node.operator in STATIC and read <= arrays.keys():
            made = _folded(node, arrays, file)
            arrays.update(made)
            size += sum(array.size for array in made.values())
            if size > MOST_VALUES:
                raise UnsupportedLayerError(
                    f"{file} makes {size:,} values of its constants, up to {node}, and at most "
                    f"{MOST_VALUES:,} are made. Export the model with constants folded."
                )
        else:
            if node.operator == "Reshape" and node.inputs[0] in of_image and node.inputs[1] in arrays:
                name = f"{node.inputs[1]} for {node.outputs[0]}"
                arrays[name] = of_any_batch(arrays[node.inputs[1]])
                node = replace(node, inputs=(node.inputs[0], name))
            nodes.append(node)
            shapes = node.operator in SHAPES or (node.operator in STATIC and not read & of_image)
            if not shapes and node.operator not in OPERATORS:
                raise _unsupported(node, "", file)
            (of_shape if shapes else of_image).update(name for name in node.outputs if name)
    return nodes


def _loaded(file: Path) -> "tuple[GraphProto, int]":
    """Return the graph of a file with all its weights, and the version of its operators."""
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError(f'ONNX files need onnx: pip install "fheconv[onnx]" ({error}).') from error
    from google.protobuf.message import DecodeError

    data = read_file(file, "A model", MOST_BYTES)
    if len(data) > MOST_BYTES:
        raise ArtifactError(
            f"{file} has more than {MOST_BYTES:,} bytes, the most that an ONNX file can have."
        )
    try:
        model = onnx.load_model_from_string(data)
        del data
        _load_weights(model, file)
        _check_operators(model.graph, file)
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError, ValueError, TypeError, OSError) as error:
        said = " ".join(str(error).split("\n\n")[0].split()).rstrip(".")
        raise ArtifactError(
            f"{file} cannot be read as an ONNX file: {said}. Export the model again, with all of its files."
        ) from error
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset not in OPSETS:
        raise UnsupportedLayerError(
            f"{file} has operators of ONNX's opset {opset}; {OPSETS[0]} to {OPSETS[-1]} are supported. "
            "Export the model with one of them, such as opset_version=18."
        )
    return model.graph, opset


def _load_weights(model: "ModelProto", file: Path) -> None:
    """Load the weights that are in other files of the same folder.

    Raises `ValueError` or `OSError` for files outside of it, and for more bytes than a file may have.
    """
    from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

    folder, total = file.absolute().parent.resolve(), model.ByteSize()
    for tensor in _tensors(model.graph):
        if uses_external_data(tensor):
            entries = {entry.key: entry.value for entry in tensor.external_data}
            other = (folder / entries.get("location", "")).resolve()
            if not other.is_relative_to(folder):
                raise ValueError(f"its weights {tensor.name!r} are in {other}, outside of its folder")
            check_regular(other)
            total += int(entries.get("length", other.stat().st_size))
            if total > MOST_BYTES:
                raise ValueError(f"its weights have more than {MOST_BYTES:,} bytes")
            load_external_data_for_tensor(tensor, str(folder))
            tensor.data_location = type(tensor).DEFAULT  # older versions of onnx leave that to the caller
            del tensor.external_data[:]


def _tensors(graph: "GraphProto") -> "Iterator[TensorProto]":
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t


def _image(
    graph: "GraphProto", arrays: Mapping[str, Array], file: Path
) -> tuple[str, tuple[int | None, ...]]:
    """Return the name of the input, and the sizes of its axes behind the batch."""
    inputs: list[ValueInfoProto] = [value for value in graph.input if value.name not in arrays]
    if len(inputs) != 1 or not inputs[0].type.HasField("tensor_type"):
        names = ", ".join(repr(value.name) for value in inputs) or "none"
        raise UnsupportedLayerError(
            f"{file} has the inputs {names}; a circuit takes one tensor, a batch of images. Export a "
            "model of one argument."
        )
    tensor_type = inputs[0].type.tensor_type
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor_type.shape.dim]
    if len(sizes) < 2:
        raise UnsupportedLayerError(
            f"The input {inputs[0].name!r} of {file} has {len(sizes)} axes; a batch of images has a first "
            "axis for the batch and one or more for an image."
        )
    return inputs[0].name, tuple(sizes[1:])


def _node(proto: "NodeProto", number: int, opset: int, file: Path) -> Node:
    from onnx import helper

    if not all(isinstance(name, str) for name in (proto.name, *proto.input, *proto.output)):
        raise ArtifactError(f"{file}: node {number} ({proto.op_type}) has names that are no text.")
    try:
        attributes = {one.name: helper.get_attribute_value(one) for one in proto.attribute}
    except ValueError as error:
        raise ArtifactError(f"{file}: node {proto.name!r} has a damaged attribute ({error}).") from error
    return Node(
        name=proto.name or f"{proto.op_type}_{number}",
        operator=proto.op_type,
        inputs=tuple(proto.input),
        outputs=tuple(proto.output),
        attributes=attributes,
        opset=opset,
    )


def _check_operators(graph: "GraphProto", file: Path) -> None:
    """Raise `UnsupportedLayerError` for an operator that is in no table."""
    for number, proto in enumerate(graph.node):
        own = proto.domain in ("", "ai.onnx")
        if not own or proto.op_type not in OPERATORS.keys() | STATIC | {"Constant"}:
            raise _unsupported(_node(proto, number, 0, file), proto.domain, file)


def _unsupported(node: Node, domain: str, file: Path) -> UnsupportedLayerError:
    kind = f"{node.operator} of {domain!r}" if domain else node.operator
    return UnsupportedLayerError(
        f"{node} of {file} cannot be compiled: there is no {kind} of images here; the nearest that is "
        f"supported: {nearest(node.operator)}."
    )


def _value(node: Node, file: Path) -> Array:
    """Return the value of a node Constant."""
    for name, value in node.attributes.items():
        if name == "value":
            return _array(value, file)
        if name in ("value_float", "value_floats"):
            return np.asarray(value, np.float32)
        if name in ("value_int", "value_ints"):
            return np.asarray(value, np.int64)
    raise UnsupportedLayerError(f"{node} of {file} holds no dense numbers; export the model with plain ones.")


def _array(tensor: "TensorProto", file: Path) -> Array:
    """Return the numbers of a tensor."""
    from onnx import numpy_helper

    try:
        array = numpy_helper.to_array(tensor)
        return array if array.dtype.kind in "biuf" else array.astype(np.float32)  # such as bfloat16
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{file}: the numbers of {tensor.name!r} cannot be read: {error}.") from error


def _folded(node: Node, arrays: Mapping[str, Array], file: Path) -> dict[str, Array]:
    """Return what a node makes of constants."""
    try:
        results = computed(node, [arrays[name] if name else None for name in node.inputs])
    except Exception as error:  # ONNX's reference can raise anything for inputs that do not fit
        known = isinstance(error, Unsupported)
        reason = f"{error}" if known else f"ONNX's reference cannot compute it ({error})"
        raise UnsupportedLayerError(
            f"{node} of {file} cannot be compiled: {reason}. Export the model with constants folded."
        ) from error
    return dict(zip(node.outputs, results, strict=False))


def _check_shapes(model: OnnxModel, file: Path) -> None:
    """Raise `UnsupportedLayerError` naming a node that does not take what it is given.

    The model runs on shapes alone, without numbers, if the file says how large images are.
    """
    if None in model.input_shape:
        return
    state = {name: value.to("meta") for name, value in model.state_dict().items()}
    images = torch.zeros(2, *map(int, filter(None, model.input_shape)), dtype=model.dtype, device="meta")
    try:
        torch.func.functional_call(model, state, (images,))
    except UnsupportedLayerError as error:
        raise UnsupportedLayerError(f"{file}: {error}") from error
