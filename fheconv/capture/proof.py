"""Proves that a function of tensors is affine, from torch's own derivative of it.

Traced as a graph of operators, a derivative that does not read the image is the same everywhere, so its
function is affine. What is left are steps, such as floor, whose derivative is the same wherever there is one:
they are known by name, and by the types of what they give.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

# A function of tensors (N, *S), one for each argument, in double precision.
Function: TypeAlias = Callable[..., torch.Tensor]

# Functions of steps: flat, or of slope 1, almost everywhere.
_STEPS = {
    "bernoulli", "bucketize", "ceil", "copysign", "fix", "floor", "floor_divide", "fmod", "frac", "heaviside",
    "nan_to_num", "nextafter", "remainder", "rint", "round", "searchsorted", "sgn", "sign", "signbit",
    "trunc",
}  # fmt: skip
# What reads the shape of a tensor, and none of its values.
_SHAPES = {
    "empty_like", "full_like", "has_same_storage_numel", "is_same_size", "new_empty", "new_full", "new_ones",
    "new_zeros", "ones_like", "sym_size", "zeros_like",
}  # fmt: skip
# Derivatives whose first result reads the image's shape alone, and the arguments whose values it reads.
_GRADIENTS = {
    **dict.fromkeys(
        ("adaptive_avg_pool2d_backward", "adaptive_avg_pool3d_backward", "avg_pool2d_backward",
         "avg_pool3d_backward", "reflection_pad1d_backward", "reflection_pad2d_backward",
         "reflection_pad3d_backward", "replication_pad1d_backward", "replication_pad2d_backward",
         "replication_pad3d_backward"), (0,),
    ),
    "convolution_backward": (0, 2),
    "grid_sampler_2d_backward": (0, 2),
    "grid_sampler_3d_backward": (0, 2),
    "native_batch_norm_backward": (0, 2, 3, 4),  # unless it trains: then it normalizes by the image
}  # fmt: skip


def is_affine(function: Function, examples: Sequence[torch.Tensor]) -> bool:
    """Return whether a function has no steps, draws nothing, and torch's derivative reads no argument."""

    def derivative(weights: torch.Tensor, *tensors: torch.Tensor) -> Any:
        # Backwards, as in training: some operators have no other derivative, or crash for constants.
        return torch.func.vjp(function, *tensors)[1](weights)

    try:
        with torch.enable_grad():
            values = make_fx(function)(*examples).graph
            slopes = make_fx(derivative)(function(*examples), *examples).graph
    except Exception:  # whatever an operator without a derivative raises, or one whose path needs the values
        return False
    read = _depends(slopes, _inputs(slopes)[1:])
    (output,) = slopes.find_nodes(op="output")
    if any(node in read for node in output.all_input_nodes):
        return False
    if any(torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) for node in values.nodes):
        return False
    # Floats all the way: comparisons, truth values and whole numbers are steps.
    for node in _depends(values, _inputs(values)):
        result = node.meta.get("val")
        if _plain_name(node) in _STEPS or node.kwargs.get("rounding_mode") is not None:
            return False
        if isinstance(result, torch.Tensor) and not (result.is_floating_point() or result.is_complex()):
            return False
    return True


def _inputs(graph: Graph) -> list[Node]:
    return list(graph.find_nodes(op="placeholder"))


def _depends(graph: Graph, sources: Sequence[Node]) -> set[Node]:
    """Return the nodes whose values depend on those of some nodes."""
    found = set(sources)
    for node in graph.nodes:
        if _plain_name(node) not in _SHAPES and any(one in found for one in _read(node)):
            found.add(node)
    return found


def _read(node: Node) -> Sequence[Node]:
    """Return the nodes whose values an operator's first result depends on, or all if it has others."""
    name = _plain_name(node)
    if name == "getitem" and node.args[1] != 0 and isinstance(node.args[0], Node):
        return node.args[0].all_input_nodes
    if name not in _GRADIENTS or (name == "native_batch_norm_backward" and node.args[7]):
        return node.all_input_nodes
    return [one for at in _GRADIENTS[name] if isinstance(one := node.args[at], Node)]


def _plain_name(node: Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).split(".")[0].strip("_")
