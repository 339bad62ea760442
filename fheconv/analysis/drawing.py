"""Prepares arrays and filter matrices so that matplotlib can draw them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize

from fheconv.basics.arrays import Array, as_array
from fheconv.basics.checks import check_integer
from fheconv.basics.errors import InvalidArgumentError

# The colours of what fits, of what does not, of what was observed, of limits, and of windows of lookups.
FITS, OVER, OBSERVED, LIMIT, WINDOW = "#a9c8e8", "#f2b0a6", "#1f4e79", "#a01c1c", "#e4eef8"
# matplotlib's own red and blue maps have a grey middle; here zero is white.
SIGNED = ("#053061", "#4393c3", "#ffffff", "#d6604d", "#67001f")
# The most rows and columns of dots in a picture of the filter matrix. The lines in it are one entry thin:
# they would vanish if a larger matrix were only scaled down.
DOTS = 250


def check_mapping(value: Any, name: str, kind: str) -> None:
    """Raise `InvalidArgumentError` unless `value` maps names to things of a kind, and is not empty."""
    if not isinstance(value, Mapping):
        raise InvalidArgumentError(f"{name} is a {type(value).__name__}; it must be {{title: {kind}}}.")
    if not value:
        raise InvalidArgumentError(f"{name} is empty; give at least one, as {{title: {kind}}}.")


def check_block(block: Any) -> None:
    """Raise `InvalidArgumentError` unless `block` is two sizes."""
    if block is None:
        return
    if not isinstance(block, tuple | list) or len(block) != 2:
        raise InvalidArgumentError(
            f"block={block!r} must be two integers, (width of the image, width of the output)."
        )
    for name, width in zip(("block[0]", "block[1]"), block, strict=True):
        check_integer(name, width, 1)


def as_matrix(value: Any, name: str) -> Any:
    """Return a filter matrix, dense or sparse. Raises `InvalidArgumentError` for anything else."""
    matrix = value if scipy.sparse.issparse(value) else as_array(value, name)
    if len(matrix.shape) != 2 or 0 in matrix.shape:
        raise InvalidArgumentError(f"{name} has shape {matrix.shape}; it must have two axes, none of them 0.")
    return matrix


def dots(matrix: Any) -> Array:
    """Return the matrix in at most DOTS rows and columns. Each dot is the largest weight under it."""
    step = -(-max(matrix.shape) // DOTS)
    entries = scipy.sparse.coo_array(matrix)
    at = entries.row // step, entries.col // step
    positive, negative = np.zeros((2, *(-(-size // step) for size in matrix.shape)))
    np.maximum.at(positive, at, entries.data)
    np.minimum.at(negative, at, entries.data)
    return np.where(positive >= -negative, positive, negative)


def as_picture(value: Any, title: str) -> Array:
    """Return an image as (M, N) or (M, N, 3). Raises `InvalidArgumentError` for anything else."""
    array = as_array(value, f"The picture {title!r}")
    array = array[0] if array.ndim == 3 and len(array) == 1 else array
    if array.ndim != 2 or array.size == 0:
        raise InvalidArgumentError(
            f"The picture {title!r} has shape {array.shape}; a picture is (M, N) or (1, M, N), so take one "
            "image and one channel."
        )
    return array.astype(np.float64)


def colours(values: Array, *, signed: bool | None = None) -> tuple[str | Colormap, Normalize]:
    """Return a colour map and a scale for values: grey, or diverging with a white zero."""
    low, high = float(values.min()), float(values.max())
    if low < 0 if signed is None else signed:
        end = max(-low, high) or 1.0
        return LinearSegmentedColormap.from_list("signed", SIGNED), Normalize(-end, end)
    return "gray", Normalize(low, high if high > low else low + 1.0)
