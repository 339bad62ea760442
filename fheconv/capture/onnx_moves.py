"""Moves values as ONNX's operators of shapes and places do, with torch.

The first axis is the batch, which may have any size.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fheconv.basics.arrays import Array
from fheconv.capture.graph import Unsupported
from fheconv.capture.onnx_node import Node, check_size


def _list(values: Any) -> list[int]:
    return [int(value) for value in np.atleast_1d(values)]


def axes_of(node: Node, axes: Array | None, count: int) -> list[int] | None:
    """Return the axes of an input or an attribute, from 0; None if it gives none."""
    given = node.get("axes") if axes is None else axes
    return None if given is None else [axis % count for axis in _list(given)]


def take(x: Tensor, axis: int, places: Sequence[int]) -> Tensor:
    """Return the values at some places of an axis."""
    if list(places) == list(range(x.shape[axis])):
        return x
    return x.index_select(axis, torch.tensor(list(places), dtype=torch.int64, device=x.device))


def of_any_batch(shape: Array) -> Array:
    """Return the shape of a Reshape, which holds the batch size of the export, for batches of any size.

    Example:
        >>> of_any_batch(np.array([1, 400])), of_any_batch(np.array([1, 16, -1]))
        (array([ -1, 400]), array([ 0, 16, -1]))
    """
    if shape.ndim != 1 or not len(shape):
        return shape
    # The batch axis is what the others do not take. Where another one is free, it is that of the input.
    free = 0 if (shape[1:] == -1).any() else -1
    return np.concatenate([[free], shape[1:]])


def padded(x: Tensor, axis: int, pair: tuple[int, int], mode: str) -> Tensor:
    """Return a tensor with values of its own before and after an axis, chosen as numpy's pad does."""
    check_size(sum(pair))
    places: Any = np.pad(np.arange(x.shape[axis]), pair, mode)  # type: ignore[call-overload]
    return take(x, axis, places.tolist())


def reshape(node: Node, x: Tensor, shape: Array) -> Tensor:
    """Compute Reshape."""
    wanted = _list(shape)
    if not node.get("allowzero", 0):
        wanted = [x.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    return x.reshape(wanted)


def flatten(node: Node, x: Tensor) -> Tensor:
    """Compute Flatten."""
    axis = node.get("axis", 1)
    axis += x.ndim if axis < 0 else 0
    if axis == 0:
        raise Unsupported("with axis=0 it puts the images of a batch into one row; give axis=1")
    return x.reshape(-1, math.prod(x.shape[axis:]))


def squeeze(node: Node, x: Tensor, axes: Array | None = None) -> Tensor:
    """Compute Squeeze. The batch axis stays, whatever its size."""
    wanted = axes_of(node, axes, x.ndim)
    if wanted is None:
        wanted = [axis for axis in range(1, x.ndim) if x.shape[axis] == 1]
    if any(x.shape[axis] != 1 for axis in wanted):
        raise Unsupported("it drops an axis of more than one element, such as that of the batch")
    return x.squeeze(tuple(wanted))


def unsqueeze(node: Node, x: Tensor, axes: Array | None = None) -> Tensor:
    """Compute Unsqueeze."""
    given = _list(node.get("axes") if axes is None else axes)
    for axis in sorted(axis % (x.ndim + len(given)) for axis in given):
        x = x.unsqueeze(axis)
    return x


def transpose(node: Node, x: Tensor) -> Tensor:
    """Compute Transpose."""
    return x.permute(node.get("perm", list(range(x.ndim))[::-1]))


def concat(node: Node, *parts: Tensor) -> Tensor:
    """Compute Concat. A constant that was exported for one image goes to each of the batch."""
    axis = node.get("axis") % parts[0].ndim
    batch = max(part.shape[0] for part in parts)
    if axis:
        parts = tuple(part.expand(batch, *part.shape[1:]) if part.shape[0] == 1 else part for part in parts)
    return torch.cat(parts, axis)


def split(node: Node, x: Tensor, sizes: Array | None = None) -> tuple[Tensor, ...]:
    """Compute Split."""
    axis = node.get("axis", 0) % x.ndim
    given = node.get("split") if sizes is None else sizes
    if given is None:
        count = node.get("num_outputs", len(node.outputs))
        return torch.split(x, -(-x.shape[axis] // count), axis)
    return torch.split(x, _list(given), axis)


def slices(
    node: Node, x: Tensor, starts: Array | None = None, ends: Array | None = None, axes: Array | None = None,
    steps: Array | None = None,
) -> Tensor:  # fmt: skip
    """Compute Slice."""
    first = _list(node.get("starts") if starts is None else starts)
    last = _list(node.get("ends") if ends is None else ends)
    along = axes_of(node, axes, x.ndim) or list(range(len(first)))
    by = [1] * len(first) if steps is None else _list(steps)
    for axis, start, end, step in zip(along, first, last, by, strict=True):
        places = range(*slice(start, end, step).indices(x.shape[axis]))
        x = x.narrow(axis, places.start, len(places)) if step == 1 and places else take(x, axis, places)
    return x


def gather(node: Node, x: Tensor, indices: Array) -> Tensor:
    """Compute Gather at constant places."""
    axis, size = node.get("axis", 0) % x.ndim, x.shape[node.get("axis", 0)]
    if ((indices < -size) | (indices >= size)).any():
        raise Unsupported(f"it reads places outside of the {size} of axis {axis}")
    places = np.where(indices < 0, indices + size, indices)
    taken = x.index_select(axis, torch.tensor(places.ravel(), device=x.device))
    return taken.reshape(*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])


def gather_nd(node: Node, x: Tensor, indices: Array) -> Tensor:
    """Compute GatherND at constant places."""
    if node.get("batch_dims", 0):
        raise Unsupported("its batch_dims are not supported; 0 is")
    return x[tuple(torch.tensor(along, device=x.device) for along in np.moveaxis(indices, -1, 0))]


def expand(node: Node, x: Tensor, shape: Array) -> Tensor:
    """Compute Expand."""
    return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(_list(shape))))


def tile(node: Node, x: Tensor, repeats: Array) -> Tensor:
    """Compute Tile."""
    return x.repeat(_list(repeats))


def pad(
    node: Node, x: Tensor, pads: Array | None = None, value: Array | None = None, axes: Array | None = None
) -> Tensor:
    """Compute Pad."""
    given = _list(node.get("pads") if pads is None else pads)
    along = axes_of(node, axes, x.ndim) or list(range(x.ndim))
    mode = node.get("mode", b"constant").decode()
    pairs = dict(zip(along, zip(given[: len(along)], given[len(along) :], strict=True), strict=True))
    if mode == "constant":
        flat = [size for axis in reversed(range(x.ndim)) for size in pairs.get(axis, (0, 0))]
        while flat and flat[-2:] == [0, 0]:
            del flat[-2:]
        border = node.get("value", 0.0) if value is None else float(np.asarray(value).item())
        return torch.nn.functional.pad(x, flat, value=border) if flat else x
    if mode not in ("edge", "reflect", "wrap") or min(given) < 0:
        raise Unsupported(f"its mode {mode!r} with pads {given} is not supported")
    for axis, pair in pairs.items():
        x = padded(x, axis, pair, mode)
    return x


def depth_to_space(node: Node, x: Tensor) -> Tensor:
    """Compute DepthToSpace in both of its modes."""
    n, c, h, w = x.shape
    b = node.get("blocksize")
    if node.get("mode", b"DCR") == b"DCR":
        moved = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        moved = x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return moved.reshape(n, c // b**2, h * b, w * b)


def space_to_depth(node: Node, x: Tensor) -> Tensor:
    """Compute SpaceToDepth."""
    n, c, h, w = x.shape
    b = node.get("blocksize")
    if node.get("mode", b"DCR") != b"DCR":
        raise Unsupported("its mode CRD is not supported; DCR is")
    moved = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return moved.reshape(n, c * b**2, h // b, w // b)


def resize(
    node: Node, x: Tensor, roi: Array | None = None, scales: Array | None = None, sizes: Array | None = None
) -> Tensor:
    """Compute Resize and Upsample."""
    if node.operator == "Upsample":
        roi, scales = None, node.get("scales") if roi is None else roi
    mode = node.get("mode", b"nearest").decode()
    along = axes_of(node, None, x.ndim) or list(range(x.ndim))
    if sizes is not None and len(sizes):
        new = dict(zip(along, _list(sizes), strict=True))
        factors = {axis: new[axis] / x.shape[axis] for axis in along}
    else:
        given = [] if scales is None else np.asarray(scales, float).tolist()
        factors = dict(zip(along, given, strict=True))
        new = {axis: math.floor(x.shape[axis] * factors[axis]) for axis in along}
    new.pop(0, None)  # the batch
    check_size(max(new.values(), default=0))
    changed = [axis for axis in new if new[axis] != x.shape[axis]]
    if node.get("keep_aspect_ratio_policy", b"stretch") != b"stretch" or node.get("antialias", 0):
        raise Unsupported("it keeps the ratio of sides, or smooths; give the sizes, and no antialias")
    if mode == "nearest":
        for axis in changed:
            x = take(x, axis, _nearest(node, x.shape[axis], new[axis], factors[axis]))
        return x
    return _interpolated(node, x, {axis: new[axis] for axis in changed}, factors)


def _interpolated(node: Node, x: Tensor, new: dict[int, int], factors: dict[int, float]) -> Tensor:
    """Return an image of other sizes, linear or cubic between the corners or the centres of pixels."""
    mode, how = node.get("mode").decode(), _coordinates(node)
    corners = how == "align_corners"
    centres = how in ("half_pixel", "pytorch_half_pixel") and 1 not in new.values()
    exact = all(abs(factors[axis] * x.shape[axis] - new[axis]) < 1e-3 for axis in new)
    names = {("linear", 3): "linear", ("linear", 4): "bilinear", ("linear", 5): "trilinear"}
    if node.get("cubic_coeff_a", -0.75) == -0.75 and not node.get("exclude_outside", 0):
        names["cubic", 4] = "bicubic"
    name = names.get((mode, x.ndim))
    if not name or not (corners or centres) or not exact or 1 in new:
        raise Unsupported(
            f"mode {mode!r} with coordinates {how!r} to these sizes is not supported; export it with "
            "nearest, or with linear by a whole factor"
        )
    size = [new.get(axis, x.shape[axis]) for axis in range(2, x.ndim)]
    return torch.nn.functional.interpolate(x, size, mode=name, align_corners=corners)


def _coordinates(node: Node) -> str:
    old = node.operator == "Upsample" or node.opset < 11
    given: bytes = node.get("coordinate_transformation_mode", b"asymmetric" if old else b"half_pixel")
    return given.decode()


def _nearest(node: Node, size: int, new: int, factor: float) -> list[int]:
    """Return which place each new one of an axis shows."""
    places = np.arange(new, dtype=float)
    how = _coordinates(node)
    match how:
        case "asymmetric":
            places = places / factor
        case "half_pixel" | "pytorch_half_pixel":
            alone = how == "pytorch_half_pixel" and new == 1
            places = np.zeros(1) if alone else (places + 0.5) / factor - 0.5
        case "align_corners":
            places = places * (size - 1) / max(1, new - 1)
        case _:
            raise Unsupported(f"coordinates {how!r} are not supported; asymmetric and half_pixel are")
    old = node.operator == "Upsample" or node.opset < 11
    rounding = node.get("nearest_mode", b"floor" if old else b"round_prefer_floor").decode()
    match rounding:
        case "floor":
            places = np.floor(places)
        case "ceil":
            places = np.ceil(places)
        case "round_prefer_floor":
            places = np.ceil(places - 0.5)
        case _:
            places = np.floor(places + 0.5)
    return [int(place) for place in np.clip(places, 0, size - 1)]
