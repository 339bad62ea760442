"""Spells what numpy and Concrete call differently: one function runs on both."""

from typing import Any

import numpy as np

from fheconv.arithmetic import OUTSIDE, conv
from fheconv.basics.arrays import Array
from fheconv.networks.integers import Lookup
from fheconv.networks.quantization import twos_complement_bits


def hint(x: Any, bits: int) -> Any:
    """Tell Concrete the width of a value. Without it, Concrete knows only the values seen at compilation."""
    if isinstance(x, np.ndarray):
        return x
    from concrete import fhe

    return fhe.hint(x, bit_width=max(bits, 1))


def plus(x: Any, constants: Array) -> Any:
    """Return the sums of x (N, n) and `constants` (n,). Zeros alone are not added.

    Constants below zero are subtracted, because Concrete gives one with a sign a bit more.
    """
    if not constants.any():
        return x
    return x + constants[None] if constants.max() > 0 else x - -constants[None]


def look_up(table: Lookup, which: Array, x: Any, blank: Array) -> Any:
    """Return the activations of accumulators (N, m) in offset form, by the rows `which` (m,) of the table.

    `blank` (m,) are the accumulators of the blank image, from whose activations the results are counted.
    Constants take no lookup. Concrete would compute some of them itself, and then without the opposite sign
    outside the window.
    """
    blanks = table.rows(blank, which)
    if isinstance(x, np.ndarray):
        return table.rows(x, which) - blanks
    varying = np.flatnonzero(~table.constant[which])
    if not len(varying):  # Concrete needs results that depend on the image
        return x * 0
    some = len(varying) < len(which)
    if some:
        x = hint(take(x, varying), table.bits)
    y = plus(_looked_up(table, which[varying], x), (table.centers[which] - blanks)[varying])
    if some:
        places = np.full(len(which), OUTSIDE)
        places[varying] = np.arange(len(varying))
        y = take(y, places)
    return y


def _looked_up(table: Lookup, which: Array, x: Any) -> Any:
    """Return activations, counted from the center, by rows that are not constant, in Concrete."""
    from concrete import fhe

    if table.dropped_bits:
        x = fhe.round_bit_pattern(
            x,
            lsbs_to_remove=table.dropped_bits,
            overflow_protection=False,
            exactness=fhe.Exactness.APPROXIMATE,
        )
        # Without a hint the rounded value gets the width seen at compilation, and Concrete clips the table.
        x = fhe.hint(x, bit_width=table.bits)
    # Rounding leaves the kept bits in their place, and Concrete indexes by that value. So each entry is
    # repeated 2^dropped_bits times, and Concrete reads one of them.
    rows = np.repeat(table.tables - table.centers[:, None], 1 << table.dropped_bits, axis=1)
    used, at = np.unique(which, return_inverse=True)
    tables = [fhe.LookupTable(rows[row].tolist()) for row in used]
    each: Any = tables[0]
    if len(tables) > 1:
        by_place = np.empty((1, len(which)), object)
        for place, row in enumerate(at):
            by_place[0, place] = tables[row]
        each = fhe.LookupTable(by_place)
    # Outside the window, the entries have the opposite sign.
    greatest = int(np.abs(rows).max())
    return hint(each[x], twos_complement_bits(int(rows.min()), greatest))


def gathers(index: Array, width: int) -> bool:
    """Return True if `take` does more than give all `width` values another shape."""
    places = index.ravel()
    return len(places) != width or bool((places != np.arange(width)).any())


def take(x: Any, index: Array) -> Any:
    """Return the values of x (N, n) at `index`, (N, *index.shape), and 0 where `index` is `OUTSIDE`."""
    places, width = index.ravel(), x.shape[1]
    outside = places == OUTSIDE
    if isinstance(x, np.ndarray):
        values = x[:, places]
        values[:, outside] = 0
        return values.reshape(len(x), *index.shape)
    from concrete import fhe

    flat = x.reshape((width,))
    if outside.any():
        flat = np.concatenate((flat, fhe.zeros((1,))))
        places = np.where(outside, width, places)
    if gathers(places, flat.shape[0]):
        flat = flat[places]
    return flat.reshape((1, *index.shape))


def convolve(x: Any, weight: Array, stride: tuple[int, ...], dilation: tuple[int, ...], groups: int) -> Any:
    """Return the convolution (N, K, *Out) of x (N, C, *S), in one, two or three dimensions or none."""
    images, channels, *sizes = x.shape
    if not sizes:  # a linear layer, as an image of one pixel
        if groups > 1 and not isinstance(x, np.ndarray):
            # Concrete takes minutes to compile a convolution of hundreds of groups.
            each = weight.reshape(groups, -1, channels // groups)
            y = np.sum(x.reshape((groups, 1, channels // groups)) * each, axis=2)
            return y.reshape((1, len(weight)))
        x, weight = x.reshape((images, channels, 1)), weight[..., None]
        return convolve(x, weight, (1,), (1,), groups).reshape((images, len(weight)))
    if isinstance(x, np.ndarray):
        return conv(x, weight, stride=stride, dilation=dilation, groups=groups)
    from concrete import fhe

    if len(sizes) == 1:  # as an image of one row
        y = fhe.conv(
            x.reshape((images, channels, 1, *sizes)),
            weight[:, :, None],
            strides=(1, *stride),
            dilations=(1, *dilation),
            group=groups,
        )
        return y.reshape((images, len(weight), y.shape[-1]))
    if len(sizes) == 2:
        return fhe.conv(x, weight, strides=stride, dilations=dilation, group=groups)
    # The taps along the depth become channels, and the output's depth the batch: one 2-d convolution.
    outputs = (sizes[0] - (weight.shape[2] - 1) * dilation[0] - 1) // stride[0] + 1
    taps = np.flatnonzero(weight.any(axis=(0, 1, 3, 4)))
    flat = fhe.zeros((outputs, channels * len(taps), *sizes[1:]))
    for number, tap in enumerate(taps.tolist()):
        start = tap * dilation[0]
        slab = x[0, :, start : start + (outputs - 1) * stride[0] + 1 : stride[0]]
        flat[:, number :: len(taps)] = slab.transpose((1, 0, 2, 3))
    y = fhe.conv(
        flat,
        weight[:, :, taps].reshape(len(weight), -1, *weight.shape[3:]),
        strides=stride[1:],
        dilations=dilation[1:],
        group=groups,
    )
    return y.transpose((1, 0, 2, 3)).reshape((1, len(weight), outputs, *y.shape[2:]))
