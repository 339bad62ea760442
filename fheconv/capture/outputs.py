"""Picks one of several outputs that a model returns."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

from torch.utils import _pytree as pytree

from fheconv.basics.errors import InvalidArgumentError

# Which output of a model is meant: its index or its name, or several of them, from the outside to the inside.
Outputs: TypeAlias = "int | str | tuple[int | str, ...] | None"


def pick(result: Any, outputs: Outputs) -> Any:
    """Return what a model's result has at an index or a name; `result` itself for None.

    Raises `InvalidArgumentError`, which names the choices, if there is none, or if it is not one tensor.

    Example:
        >>> import torch
        >>> pick({"boxes": torch.zeros(2, 4), "scores": torch.ones(2, 3)}, "scores").shape
        torch.Size([2, 3])
    """
    if outputs is None:
        return result
    found = result
    for key in outputs if isinstance(outputs, tuple) else (outputs,):
        choices = _choices(found)
        if isinstance(key, int) and key not in choices and -len(choices) <= key < len(choices):
            key = [*choices][key]  # of a dict or a dataclass, in their order
        if not choices or key not in choices:
            raise InvalidArgumentError(f"outputs={outputs!r}: the model returns {described(result)}.")
        found = choices[key]
    if _choices(found):
        raise InvalidArgumentError(
            f"outputs={outputs!r} is not one tensor but {described(found)}; pick one of these, as in "
            f"outputs=({outputs!r}, {next(iter(_choices(found)))!r})."
        )
    return found


def picked_node(program: Any, nodes: list[Any], outputs: Outputs) -> Any:
    """Return the node among the `nodes` of a program's results that `outputs` means.

    Raises `InvalidArgumentError` like `pick`.
    """
    numbers = pytree.tree_unflatten(range(len(nodes)), program.call_spec.out_spec)
    return nodes[pick(numbers, outputs)]


def encrypted_node(program: Any, nodes: list[Any]) -> Any:
    """Return the one node among the `nodes` of a program's results that depends on the image, or None.

    Brevitas returns scales and widths beside its results.
    """
    (image,) = program.graph_signature.user_inputs
    depending: set[Any] = set()
    for node in program.graph.nodes:
        if node.name == image or depending.intersection(node.all_input_nodes):
            depending.add(node)
    found = [node for node in nodes if node in depending]
    return found[0] if len(found) == 1 else None


def described(result: Any) -> str:
    """Return what a result consists of, in words.

    Example:
        >>> import torch
        >>> described((torch.zeros(2, 3), torch.zeros(2, 4)))
        '2 values, 0 and 1'
    """
    names = [repr(name) for name in _choices(result)]
    if not names:
        return "one tensor, so that outputs has nothing to choose"
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{len(names)} value{'s' if len(names) > 1 else ''}, {listed}"


def _choices(result: Any) -> dict[Any, Any]:
    """Return the parts of a result by their names, or by their indices if they have none."""
    if isinstance(result, Mapping):
        return dict(result)
    if hasattr(result, "_fields"):  # a named tuple
        return dict(zip(result._fields, result, strict=True))
    if is_dataclass(result) and not isinstance(result, type):
        return {field.name: getattr(result, field.name) for field in fields(result)}
    return dict(enumerate(result)) if isinstance(result, list | tuple) else {}
