"""Turns a torch module into a float network, by the graph of `torch.export`."""

import operator
import warnings
from typing import Any

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from fheconv.basics.arrays import Shape
from fheconv.basics.errors import InputRangeError, InvalidArgumentError, UnsupportedLayerError
from fheconv.basics.samples import channel_remedy
from fheconv.capture.calls import BATCH, Call
from fheconv.capture.eager import as_floats
from fheconv.capture.folding import MIXES, Folded, folds, followed
from fheconv.capture.graph import Final, Graph, Pending, Pooled, Unsupported, Value
from fheconv.capture.last import after
from fheconv.capture.numbers import Reading, Repeating
from fheconv.capture.operators import HANDLERS, NEAREST, RANDOM, nearest
from fheconv.capture.outputs import Outputs, described, encrypted_node, pick, picked_node
from fheconv.capture.probing import leaves, linear
from fheconv.capture.quantizers import as_trained
from fheconv.capture.refusals import refusal, said
from fheconv.capture.tidying import operator_name, tidy
from fheconv.capture.tracing import check_channels, dependence, evaluate, quiet, traceable
from fheconv.networks.floats import Network
from fheconv.networks.grids import ROUNDING_OPERATORS


def export(module: torch.nn.Module | ExportedProgram, input_shape: Shape, outputs: Outputs = None) -> Network:
    """Return the float network of a module in evaluation mode. The module keeps its own mode.

    An `ExportedProgram` keeps the mode and the image size of its export. `outputs` is the index or the name
    of one of several results.

    Raises `UnsupportedLayerError` naming the layer and the operator that cannot be compiled, or for images
    whose channel axis is missing or last, `InvalidArgumentError` for `outputs` that the model does not have,
    and `InputRangeError` for images of another shape than an ONNX file says.
    """
    if isinstance(module, ExportedProgram):
        module = _unflattened(module, input_shape)
    floats = (p for p in module.parameters() if p.is_floating_point())
    like = next(floats, torch.zeros(()))
    example = torch.zeros(BATCH, *input_shape, dtype=like.dtype, device=like.device)
    module = as_floats(module, example)
    training = [part for part in module.modules() if part.training]
    depends: str | None = None  # until it has run
    try:
        evaluate(module)
        with warnings.catch_warnings(), traceable(module):
            warnings.simplefilter("ignore")
            # Its error about a wrong shape is clearer than that of export.
            depends = dependence(lambda x: pick(module(x), outputs), BATCH, input_shape, like)
            program = _traced(module, example)
            results = _results(program)
            if outputs is None and len(results) > 1 and (only := encrypted_node(program, results)):
                number = results.index(only)
                depends = dependence(
                    lambda x: pytree.tree_leaves(module(x))[number], BATCH, input_shape, like
                )
    except (InvalidArgumentError, InputRangeError):  # the second is that of a model from an ONNX file
        raise
    except Exception as error:  # the user's forward can raise anything
        check_channels(module, example)
        raise refusal(module, input_shape, error, ran=depends is not None) from error
    finally:
        for part in training:
            part.training = True
    if depends:
        check_channels(module, example)
    network = network_of(program, input_shape, outputs)
    if depends:  # last, because the graph may name the operator
        raise UnsupportedLayerError(f"{type(module).__name__} cannot be compiled: {depends}.")
    return network


def _traced(module: torch.nn.Module, example: torch.Tensor) -> ExportedProgram:
    """Return the program of a module that runs on an example, with the numbers that it reads from weights."""
    with Reading(module) as reading:
        module(example.clone())
    with quiet(), Repeating(reading.reads):
        program = torch.export.export(module, (example,), strict=False)
        if _is_plain(program.graph):
            return program
        # Nothing is decomposed, but a change through a view becomes an operator. It takes long.
        return program.run_decompositions({})


def _is_plain(graph: torch.fx.Graph) -> bool:
    """Return whether every operator is known as it is, and gives one new tensor, no change and no views."""
    return all(_is_known(node) for node in graph.nodes if node.op == "call_function")


def _is_known(node: Node) -> bool:
    if not isinstance(node.target, OpOverload) or operator_name(node) not in HANDLERS:
        return False
    schema = node.target._schema
    return not schema.is_mutable and [str(one.type) for one in schema.returns] == ["Tensor"]


def _unflattened(program: ExportedProgram, input_shape: Shape) -> torch.nn.Module:
    """Return the module of a program, for batches of any size.

    If it was exported for one batch size, running another size shows whether it depends on the size.
    """
    wanted: Any = ()
    try:
        (image,) = program.graph_signature.user_inputs
        (node,) = (node for node in program.graph.nodes if node.name == image)
        like = node.meta["val"]
        own, *_ = wanted = like.shape
        example = torch.zeros(own if isinstance(own, int) else BATCH, *input_shape, dtype=like.dtype)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program.module()(example)  # torch raises if images cannot have this size
            module = torch.export.unflatten(program)
            module.check_input_constraints = False
            module(torch.zeros(BATCH, *input_shape, dtype=like.dtype))
    except Exception as error:  # the program can raise anything
        remedy = channel_remedy((BATCH, *input_shape), wanted[1], len(wanted) - 1) if len(wanted) > 2 else ""
        raise UnsupportedLayerError(
            f"The exported program cannot be run on images of shape {input_shape}: "
            f"{said(error)}.{remedy} Export a model of one argument, a batch of any "
            'size (dynamic_shapes=({0: torch.export.Dim("batch")},)), and calibrate on images of the size '
            "that it was exported for."
        ) from error
    return module


def network_of(program: Any, input_shape: Shape, outputs: Outputs = None) -> Network:
    """Return the float network of a functional `ExportedProgram` for a batch of `BATCH` images.

    Raises `UnsupportedLayerError` naming the layer and the operator that cannot be compiled, and
    `InvalidArgumentError` if it does not have the `outputs`.
    """
    tidy(program.graph)
    results = _results(program)
    node = encrypted_node(program, results) if outputs is None else picked_node(program, results, outputs)
    if node is not None:
        results = [node]
        _keep_only(program.graph, results)
    (image,) = program.graph_signature.user_inputs
    graph = Graph(input_shape)
    values: dict[Node, Any] = {}
    rounds = False
    constants = _constants(program)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = graph.source(0, node.name) if node.name == image else constants.get(node.name)
        elif node.op == "get_attr":
            values[node] = getattr(program.graph_module, node.target)
        elif node.op == "call_function" and node.users:  # unread results, such as assertions, are left out
            values[node] = _result(graph, node, values)
            rounds = rounds or (
                operator_name(node) in ROUNDING_OPERATORS and isinstance(values[node], torch.Tensor)
            )
    result = values.get(results[0]) if len(results) == 1 else None
    if isinstance(result, Folded):
        raise UnsupportedLayerError(
            f"The model's output of shape {result.shape} cannot be compiled: {MIXES}. Return a batch of "
            "results."
        )
    if not isinstance(result, Value | Final):
        raise UnsupportedLayerError(
            f"The model returns {_count(program, results)}; a circuit has one result, which depends on the "
            "image. Choose one by its index or name, as in outputs=0, or wrap the model so that it returns "
            "the tensor you need."
        )
    try:
        return as_trained(graph.network(result), rounds_weights=rounds)
    except Unsupported as error:
        raise UnsupportedLayerError(f"The model's output cannot be compiled: {error}.") from error


def _results(program: Any) -> list[Any]:
    """Return the nodes of the model's results, without the buffers that it changes."""
    (output,) = program.graph.find_nodes(op="output")
    specs = program.graph_signature.output_specs
    return [
        node for node, spec in zip(output.args[0], specs, strict=True) if spec.kind == OutputKind.USER_OUTPUT
    ]


def _count(program: Any, results: Any) -> str:
    if len(results) == 1:
        return "a constant"
    return described(pytree.tree_unflatten(range(len(results)), program.call_spec.out_spec))


def _keep_only(graph: torch.fx.Graph, results: list[Any]) -> None:
    """Remove what is computed for other results than the given ones."""
    (output,) = graph.find_nodes(op="output")
    output.args = (tuple(results),)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)


def _constants(program: Any) -> dict[str, Any]:
    signature = program.graph_signature
    targets = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    held = {**program.constants, **program.state_dict}
    return {name: held[target] for name, target in targets.items()}


def _result(graph: Graph, node: Node, values: dict[Node, Any]) -> Any:
    """Return the value of an operator's node; torch computes it if all arguments are constants."""
    operation = operator_name(node)
    arguments, options = torch.fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    encrypted = [leaf for leaf in leaves((arguments, options)) if isinstance(leaf, Value | Final | Folded)]
    name, kind = _where(node)
    call = Call(
        graph=graph,
        node=node,
        name=name,
        operation=operation,
        read_once=all(_is_read_once(n, values) for n in node.all_input_nodes),
        real=all(
            _is_real(n)
            for n in (node, *(n for n in node.all_input_nodes if isinstance(values[n], Value | Folded)))
        ),
    )
    try:
        if node.target is operator.getitem:
            return _item(*arguments)
        if _draws(call, arguments):
            raise Unsupported(RANDOM)
        if not encrypted:
            with torch.no_grad():
                made = call.target(*arguments, **options)
            # What no one wrote may be anything: zeros, as in `new_empty`.
            return made.zero_() if operation.startswith("empty") else made
        for value in encrypted:
            if isinstance(value, Final):
                return after(call, value, arguments, options)
        if any(isinstance(size, torch.SymInt) for size in getattr(node.meta.get("val"), "shape", ())):
            raise Unsupported(
                "how many values it gives depends on the image; the nearest that is supported: all values, "
                "with zeros in place of some (torch.where)"
            )
        if folds(call, (arguments, options)):
            return followed(call, arguments, options)
        return _handled(call, arguments, options)
    except Unsupported as error:
        reason = str(error)
        cause: Exception = error
    except Exception as error:  # an unknown option, or a tensor in place of a number
        reason = f"it is called in a way that is not supported ({said(error)})"
        cause = error
    layer = f"Layer {name!r} ({kind})" if kind else f"Node {name!r} of the model's own forward"
    raise UnsupportedLayerError(f"{layer}, operator {operation!r}, cannot be compiled: {reason}.") from cause


def _draws(call: Call, arguments: Any) -> bool:
    """Return whether an operator draws at random."""
    if "dropout" in call.operation:
        _, share, train = (*arguments, False)[:3]
        return bool(train) and share != 0
    tags = getattr(call.node.target, "tags", ())
    # Whether attention drops anything depends on an option, and is found out where it is probed.
    return torch.Tag.nondeterministic_seeded in tags and call.operation not in (*HANDLERS, *NEAREST)


def _is_real(node: Node) -> bool:
    """Return whether a node is one tensor of floats, or of pairs of them: complex numbers."""
    example = node.meta.get("val")
    return isinstance(example, torch.Tensor) and (example.is_floating_point() or example.is_complex())


def _handled(call: Call, arguments: Any, options: Any) -> Any:
    """Return what a handler makes of a call, or what is left: whatever torch shows to be linear."""
    if call.operation not in HANDLERS:
        made = linear(call, arguments, options)
        if made is None:
            raise Unsupported(nearest(call.operation))
        return made
    try:
        return HANDLERS[call.operation](call, *arguments, **options)
    except Exception as error:
        try:
            made = linear(call, arguments, options)
        except Unsupported:
            made = None
        if made is None:
            raise error from None
        return made


def _is_read_once(node: Node, values: dict[Node, Any]) -> bool:
    """Return whether a single operator reads the activation or maximum of a node, also through views."""
    looked_up = _functions(values[node])
    if not looked_up:
        return True
    viewed = [n for n in node.all_input_nodes if looked_up & _functions(values[n])]
    return len(node.users) == 1 and all(_is_read_once(n, values) for n in viewed)


def _functions(value: Any) -> set[Any]:
    """Return identifiers of the activations and maxima in a node's value."""
    parts = [v for leaf in leaves(value) for v in (leaf.values if isinstance(leaf, Folded) else (leaf,))]
    pending = {(id(part.base), id(part.function)) for part in parts if isinstance(part, Pending)}
    return pending | {id(part) for part in parts if isinstance(part, Pooled)}


def _item(several: Any, number: Any) -> Any:
    if isinstance(several, list | tuple) and number >= len(several):
        raise Unsupported("only the values are supported, not the indices where they are")
    return several[number]


def _where(node: Node) -> tuple[str, str]:
    """Return the name and the kind of the module in the user's model that a node belongs to."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack or not stack[-1][0]:
        return node.name, ""
    path, kind = stack[-1]
    return path.partition("@")[0], getattr(kind, "__name__", str(kind)).rpartition(".")[2]
