"""Turns images as torch users have them into arrays: tensors, pairs, loaders, datasets, batches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from fheconv.basics.arrays import Array, ArrayLike, Shape, as_array
from fheconv.basics.errors import InvalidArgumentError

# What users may give for images (N, C, *S), with their classes or without.
if TYPE_CHECKING:  # torch takes seconds to import
    from torch.utils.data import Dataset

    Data: TypeAlias = ArrayLike | Iterable[Any] | Dataset[Any]
else:
    Data = Any

# Of a loader, a dataset or batches, this many images are kept to calibrate on. More change scales little.
MOST_CALIBRATED = 1000
# Where all images count, more than this is refused, before it fills the memory.
MOST_BYTES = 2**31


class Samples(NamedTuple):
    """Holds images (N, C, *S), and what was given with them: their classes (N, …), or None."""

    images: Array
    classes: Any


def images_of(data: Data, name: str, axes: int | None = None, keep: int | None = None) -> Array:
    """Return the images of `data` as one array. What is given with them, such as classes, is ignored.

    See `samples`.
    """
    return samples(data, name, axes, keep).images


def samples(data: Data, name: str, axes: int | None = None, keep: int | None = None) -> Samples:
    """Return the images of `data` as one array, and their classes if it has them.

    `data` is one of these:

    - an array, a tensor or nested lists: images;
    - a pair (images, classes) of them;
    - a `Dataset`: each item is an image, or a tuple that begins with an image and its class;
    - a `DataLoader`, or another iterable: each item is a batch, or a tuple that begins with a batch and its
      classes. A list may also hold single images.

    `axes` is the number of axes of an image (C, *S), if it is known; it tells images from batches in an
    iterable. Of a dataset, `keep` images are kept, spread evenly; of an iterable, the first `keep`. It is not
    read further. Arrays are returned whole.

    Raises `InvalidArgumentError` for what holds no images, images of several sizes, and items of more than
    `MOST_BYTES`.

    Example:
        >>> batches = [(np.zeros((2, 1, 4, 4)), [0, 1]), (np.ones((1, 1, 4, 4)), [1])]
        >>> found = samples(batches, "data", axes=3)
        >>> found.images.shape, found.classes.tolist()
        ((3, 1, 4, 4), [0, 1, 1])
    """
    if _is_pair(data):
        pair: Any = data
        return Samples(as_array(pair[0], name), pair[1])
    has_items = hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    nested = isinstance(data, list | tuple) and not _holds_items(data)
    _check_no_mapping(data, name)
    if not has_items or nested or _is_array(data) or isinstance(data, str | bytes):
        return Samples(as_array(data, name), None)
    return _read(data, name, axes, keep)


def _check_no_mapping(value: Any, name: str) -> None:
    """Raise `InvalidArgumentError` for a dict, as other libraries have them, or a list of some."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, Mapping):
        raise InvalidArgumentError(
            f"{name} is a dict of {', '.join(map(repr, value))}; give pairs of images and classes, such as "
            '[(item["image"], item["label"]) for item in data].'
        )


def channel_remedy(given: Shape, channels: int, axes: int) -> str:
    """Return what to do about the channel axis of a batch of images of shape `given`, or "".

    `channels` and `axes` are those of an image (C, *S) that is taken.

    Example:
        >>> channel_remedy((100, 8, 8), 1, 3)
        ' The channel axis is missing: give images[:, None].'
        >>> channel_remedy((100, 32, 32, 3), 3, 3)
        ' The channel axis is last: give images.transpose(0, 3, 1, 2) (of a tensor, permute).'
    """
    last = len(given) > 2 and given[-1] == channels
    if len(given) == axes and channels == 1 and given[0] != 1:  # else it is an image, of another size
        return " The channel axis is missing: give images[:, None]."
    if len(given) == axes and channels != given[0] and not last:
        return f" The channel axis is missing: give images with {channels} channels, (n, {channels}, ...)."
    if last and len(given) in (axes, axes + 1) and given[-axes] != channels:
        order = [axes - 1, *range(axes - 1)] if len(given) == axes else [0, axes, *range(1, axes)]
        moved = f"images.transpose({', '.join(map(str, order))})"
        return f" The channel axis is last: give {moved} (of a tensor, permute)."
    return ""


def with_classes(x: Data, y: ArrayLike | None, axes: int) -> tuple[Array, ArrayLike]:
    """Return images and their classes. `x` holds the classes if `y` is None, as a loader does.

    `axes` is the number of axes of an image. Raises `InvalidArgumentError` if there are no classes.

    Example:
        >>> images, classes = with_classes([(np.zeros((2, 1, 4, 4)), [0, 1])], None, 3)
        >>> images.shape, classes.tolist()
        ((2, 1, 4, 4), [0, 1])
    """
    images, classes = samples(x, "x", axes)
    if y is None and classes is None:
        raise InvalidArgumentError(
            "score needs the right classes: give y, or a loader or dataset of pairs (images, classes)."
        )
    return images, classes if y is None else y


def share_right(outputs: Array, classes: ArrayLike) -> float:
    """Return the share of outputs (n, classes) whose highest score is at the right one of `classes` (n,).

    Raises `InvalidArgumentError` like `which_right`.

    Example:
        >>> share_right(np.array([[0.1, 0.9], [0.8, 0.2]]), [1, 1])
        0.5
    """
    return float(which_right(outputs, classes).mean())


def which_right(outputs: Array, classes: ArrayLike) -> Array:
    """Return a mask (n,) of outputs (n, classes) whose highest score is at the right one of `classes` (n,).

    Raises `InvalidArgumentError` for other shapes, for classes without a score, and for no images.
    """
    right = as_array(classes, "y")
    if outputs.ndim != 2 or right.shape != (len(outputs),) or right.dtype.kind not in "iu" or not len(right):
        raise InvalidArgumentError(
            f"y has shape {right.shape} and type {right.dtype}, and the outputs have shape {outputs.shape}; "
            "score needs images (n, …), a class (n,) for each, and a network with a score for each class."
        )
    if right.min() < 0 or right.max() >= outputs.shape[1]:
        raise InvalidArgumentError(
            f"y has classes from {right.min()} to {right.max()}, and the network has scores of classes 0 to "
            f"{outputs.shape[1] - 1}; number the classes as in training."
        )
    found: Array = outputs.argmax(axis=1) == right
    return found


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") or hasattr(value, "__array_interface__")


def _is_pair(data: Any) -> bool:
    """Return whether data is (images, classes), and neither two images nor two batches.

    A tuple that begins with an array is one. In lists, and of nested lists, classes have fewer axes than
    images. A list of lists is none, but an array.
    """
    if not isinstance(data, tuple | list) or len(data) != 2:
        return False
    is_tuple, begins_with_array = isinstance(data, tuple), _is_array(data[0])
    if is_tuple == begins_with_array:
        return is_tuple
    first, second = map(_axes, data)
    return first is not None and second is not None and 0 < second < first


def _axes(value: Any) -> int | None:
    """Return the number of axes of an array or of nested lists, None for other objects."""
    if not isinstance(value, list | tuple):
        return np.ndim(value) if _is_array(value) else None
    inner = _axes(value[0]) if value and not isinstance(value[0], int | float) else 0
    return None if inner is None else inner + 1


def _holds_items(data: Sequence[Any]) -> bool:
    """Return whether a list holds arrays, or tuples that begin with one, and not numbers."""
    first = data[0] if len(data) else None
    return _is_array(first) or (isinstance(first, list | tuple) and len(first) > 0 and _is_array(first[0]))


def _read(data: Any, name: str, axes: int | None, keep: int | None) -> Samples:
    """Return the images of the items of a dataset, a loader or an iterable, and their classes."""
    images: list[Array] = []
    classes: list[Any] = []
    count = size = 0
    for item in _items(data, keep):
        _check_no_mapping(item, f"An item of {name}")
        first, second = _parts(item)
        image = as_array(first, f"An item of {name}")
        alone = _is_single(image, data, axes)
        if not alone and not image.ndim:
            raise InvalidArgumentError(f"{name} has the item {item!r:.50}; give batches of images.")
        images.append(image[None] if alone else image)
        classes.append([second] if alone else second)
        count, size = count + len(images[-1]), size + image.nbytes
        if size > MOST_BYTES:
            raise InvalidArgumentError(
                f"{name} has images of more than {MOST_BYTES:,} bytes, which would be kept in memory; give "
                "a part of it, such as a torch.utils.data.Subset."
            )
        if keep is not None and count >= keep:
            break
    shapes = {image.shape[1:] for image in images}
    if not count or len(shapes) > 1:
        raise InvalidArgumentError(
            f"{name} has images of {len(shapes)} shapes {sorted(shapes)!r:.100}; give images of one size."
            if count
            else f"{name} has no images: it is empty, or an iterator that was read before; give a list or a "
            "DataLoader."
        )
    return Samples(np.concatenate(images)[:keep], _joined(classes, keep))


def _joined(classes: list[Any], keep: int | None) -> Array | None:
    """Return the classes of all items as one array, or None if they are no numbers."""
    alone = (part for one in classes for part in (one if isinstance(one, list) else [one]))
    if any(part is None for part in alone):
        return None
    try:
        return np.concatenate([as_array(one, "classes") for one in classes])[:keep]
    except (InvalidArgumentError, ValueError):  # names, boxes, masks of several sizes
        return None


def _is_single(item: Array, data: Any, axes: int | None) -> bool:
    """Return whether an item of `data` is an image, and not a batch."""
    if getattr(data, "batch_sampler", None) is not None:  # a DataLoader that makes batches
        return False
    if _is_dataset(data):
        return True
    if axes is not None and item.ndim in (axes, axes + 1):
        return item.ndim == axes
    return isinstance(data, list | tuple)


def _is_dataset(data: Any) -> bool:
    return hasattr(data, "__getitem__") and not isinstance(data, list | tuple)


def _items(data: Any, keep: int | None) -> Iterator[Any]:
    """Yield the items of an iterable, or those of a dataset, spread evenly if it has more than `keep`."""
    if hasattr(data, "__iter__") or not hasattr(data, "__len__"):
        yield from data
        return
    size = len(data)
    count = size if keep is None else min(size, keep)
    # From the first to the last, because datasets are often sorted by class.
    for at in np.linspace(0, size - 1, count).round():
        yield data[int(at)]


def _parts(item: Any) -> tuple[Any, Any]:
    """Return the image or batch that an item begins with, and what follows it, None if nothing does."""
    if isinstance(item, list | tuple) and len(item) and _is_array(item[0]):
        return item[0], item[1] if len(item) > 1 else None
    return item, None
