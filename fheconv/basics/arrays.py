"""Turns images and weights that users pass into numpy arrays, and holds common operations on arrays."""

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fheconv.basics.errors import InvalidArgumentError

Shape: TypeAlias = tuple[int, ...]
Array: TypeAlias = npt.NDArray[Any]

# What users may give for an array: an array, nested lists of numbers, a torch tensor.
if TYPE_CHECKING:  # torch takes seconds to import
    from torch import Tensor

    ArrayLike: TypeAlias = npt.ArrayLike | Tensor
else:
    ArrayLike = Any


def as_array(value: Any, name: str) -> Array:
    """Return `value` (array, torch tensor, nested list) as a real numeric array, without a copy if possible.

    Raises `InvalidArgumentError` if it is not numeric, is complex, or is ragged.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise InvalidArgumentError(f"{name} is a masked array; fill what is masked, or leave it out.")
    try:
        if hasattr(value, "detach"):  # a torch tensor, recognised without importing torch
            value = value.detach().cpu()
            if str(value.dtype) == "torch.bfloat16":  # numpy has no bfloat16
                value = value.float()
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:  # torch raises any of them
        raise InvalidArgumentError(f"{name} is not an array of numbers: {error}.") from error
    if array.dtype.kind not in "biuf":
        raise InvalidArgumentError(
            f"{name} has dtype {array.dtype}; an array of real numbers is needed: integers or floats."
        )
    return array.copy() if min(array.strides, default=0) < 0 else array  # torch takes none that run backwards


def first_position(mask: Array) -> tuple[int, ...]:
    """Return the index of the first True in `mask`, in C order."""
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(mask)), mask.shape))


def channel_vector(value: Any, channels: int) -> Array:
    """Return a bias as an array (channels,). Raises `InvalidArgumentError` for another shape."""
    bias = as_array(value, "bias")
    if bias.shape != (channels,):
        raise InvalidArgumentError(f"bias has shape {bias.shape}, out_channels is {channels}.")
    return bias


def along_channels(values: Array, axes: int) -> Array:
    """Return `values` (C,) as (C, 1, …) with `axes` axes, to broadcast with a tensor (C, *S)."""
    return values.reshape(-1, *[1] * (axes - 1))


def channel_means(values: Array) -> Array:
    """Return the mean of each channel of a batch (N, C, *S), as (C, *1)."""
    means: Array = values.mean(axis=(0, *range(2, values.ndim)))
    return along_channels(means, values.ndim - 1)


def frozen(array: Array) -> Array:
    """Return a read-only copy of `array`."""
    copy = array.copy()
    copy.setflags(write=False)
    return copy
