"""Removes from a graph what changes no result: copies, assertions, and what is there for gradients alone."""

from collections import Counter
from typing import Any

import torch
from torch.fx import Graph, Node

_SIGNS: dict[Any, int] = {torch.ops.aten.add.Tensor: 1, torch.ops.aten.sub.Tensor: -1}


def operator_name(node: Node) -> str:
    """Return torch's name of an operator, without overload and underscores."""
    return getattr(node.target, "__name__", str(node.target)).split(".")[0].strip("_")


def tidy(graph: Graph) -> None:
    """Remove assertions and copies. The readers of a copy, such as dropout makes, then read the original.

    After this, the users of a node are all the readers of its value. PT2E gives each reader of an activation
    a node of its own that says what its integers stand for: one is enough. Of x + (round(x) − x), which is a
    straight-through estimator, round(x) is left.
    """
    first: dict[Any, Node] = {}
    sums: dict[Node, Counter[Node]] = {}
    for node in graph.nodes:
        name = operator_name(node) if node.op == "call_function" else ""
        same = node
        if name == "dequantize_per_tensor":
            same = first.setdefault((node.target, node.args, *sorted(node.kwargs.items())), node)
        elif name in ("alias", "clone", "detach", "lift_fresh_copy"):
            same = node.args[0]
        elif node.target in _SIGNS and not node.kwargs:
            same = _what_is_left(node, sums)
        if same is not node:
            node.replace_all_uses_with(same)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)


def _what_is_left(node: Node, sums: dict[Node, Counter[Node]]) -> Node:
    """Return the one tensor that a sum or difference is, after what is added and subtracted; or the node.

    `sums` has the parts of the sums before it, with how often each is in it, and gets those of this one.
    """
    parts = [part for part in node.args if isinstance(part, Node)]
    if len(parts) < 2:  # the other one is a number
        return node
    total: Counter[Node] = Counter()
    for part, sign in zip(parts, (1, _SIGNS[node.target]), strict=True):
        for leaf, count in sums.get(part, {part: 1}).items():
            total[leaf] += sign * count
    sums[node] = Counter({leaf: count for leaf, count in total.items() if count})
    if len(total) == 1 or [*sums[node].values()] != [1]:
        return node
    (left,) = sums[node]
    made, kept = node.meta["val"], left.meta["val"]
    return left if (made.shape, made.dtype) == (kept.shape, kept.dtype) else node
