"""Splits a model into a part that the client runs in clear, and a part that runs encrypted."""

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from fheconv.basics.errors import InvalidArgumentError, UnsupportedLayerError
from fheconv.basics.keywords import answers_keywords

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from torch.fx import Graph, Node
    from torch.nn import Module


@answers_keywords
def split(model: "Module", *, after: str) -> "tuple[Module, Module]":
    """Return the part of a torch model up to the module named `after`, and the part behind it.

    The client runs the first part in clear, on images (n, C, *S), and encrypts what it returns. The second
    part is for `fheconv.quantize`, with the results of the first as images. So lookups are spent on the
    second part only. Both are copies, in evaluation mode, whose weights do not train.

    **The first part is public:** whoever encrypts needs its weights. The model's owner keeps only the second
    part secret from clients. Images stay secret from the server either way.

    Clients without torch run the first part as an ONNX file (`torch.onnx.export(public, (images,), file)`),
    for example with onnxruntime. A model of `fheconv.from_onnx` is split as a file, with
    `onnx.utils.extract_model`.

    Raises `InvalidArgumentError` for a model that has no such module, or calls it more than once, or takes
    more than one input. Raises `UnsupportedLayerError` if something behind the module needs more than its
    result, or if torch cannot trace the model (`torch.fx`).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> public, private = split(model, after="1")
        >>> image = torch.rand(1, 1, 4, 4)
        >>> public(image).shape
        torch.Size([1, 4, 2, 2])
        >>> torch.equal(private(public(image)), model(image))
        True
    """
    from torch import nn
    from torch.fx import Graph

    from fheconv.capture.onnx_model import OnnxModel

    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(f"split takes a torch.nn.Module, not {type(model).__name__}.")
    if isinstance(model, OnnxModel):
        raise InvalidArgumentError(
            "split takes modules that torch can trace, and this is an ONNX file; split the file with "
            "onnx.utils.extract_model, and read its second part with from_onnx."
        )
    names = [name for name, _ in model.named_modules() if name]
    if after not in names:
        raise InvalidArgumentError(f"after={after!r:.80}; the model's modules are {', '.join(names):.500}.")
    model = deepcopy(model).eval().requires_grad_(False)
    graph = _traced(model, after)
    cut = _cut(graph, after)
    nodes = list(graph.nodes)
    place = nodes.index(cut)
    public, private = Graph(), Graph()
    copies: dict[Node, Node] = {}
    for node in nodes[: place + 1]:
        copies[node] = public.node_copy(node, copies.__getitem__)
    public.output(copies[cut])
    behind: dict[Node, Node] = {cut: private.placeholder("x")}
    for node in nodes[place + 1 :]:
        for needed in node.all_input_nodes:
            if needed.op == "get_attr" and needed not in behind:  # weights that the model itself holds
                behind[needed] = private.node_copy(needed)
            elif needed not in behind:
                raise UnsupportedLayerError(
                    f"{node.name} needs {needed.name} besides the result of {after!r}: the model cannot be "
                    "split there. Choose a module through which everything goes."
                )
        behind[node] = private.node_copy(node, behind.__getitem__)
    return _module(model, public), _module(model, private)


def _module(model: "Module", graph: "Graph") -> "Module":
    """Return a module with those weights of a model that a graph needs for its result."""
    from torch.fx import GraphModule

    needed = GraphModule(model, graph)
    needed.graph.eliminate_dead_code()
    return GraphModule(model, needed.graph)  # anew, because the first one got the weights of dead code, too


def _traced(model: "Module", after: str) -> "Graph":
    """Return the graph of a model. Only the modules around `after` are taken apart."""
    from torch.fx import Tracer

    class Around(Tracer):
        """Leaves all modules whole but those that hold `after`."""

        def is_leaf_module(self, m: "Module", module_qualified_name: str) -> bool:
            return not after.startswith(f"{module_qualified_name}.")

    try:
        return Around().trace(model)
    except Exception as error:  # torch raises errors of every kind for what it cannot trace
        raise UnsupportedLayerError(
            f"torch.fx cannot trace the model around {after!r}: {error!r:.300}. Write the two parts as two "
            "modules."
        ) from error


def _cut(graph: "Graph", after: str) -> "Any":
    """Return the only call of the module."""
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == after]
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(calls) != 1 or len(inputs) != 1:
        raise InvalidArgumentError(
            f"The model calls {after!r} {len(calls)} times and takes {len(inputs)} inputs; a model that is "
            "split calls it once and takes one."
        )
    return calls[0]
