"""Makes lookup tables.

For every accumulator that can enter it, a table holds the integer of the activation. The table includes the
layer's scale, bias and zero-points, BatchNorm, the activation function, and the scale of its integers.
"""

import numpy as np

from fheconv.basics.arrays import Array, along_channels, frozen
from fheconv.basics.errors import CalibrationError
from fheconv.networks.expression import Expression
from fheconv.networks.integers import Lookup
from fheconv.networks.quantization import Quantization
from fheconv.quantizer.windows import Window


def lookup(
    name: str, activation: Expression, output: Quantization, window: Window, *, step: Array, bias: Array
) -> Lookup:
    """Return the tables of a layer whose accumulator `a` means the real number a · step + bias.

    `step` and `bias` have the layer's shape (C, *S). Values with equal step, bias and constants share a
    table.

    Raises `CalibrationError` if the activation gives NaN.
    """
    shape = step.shape
    bits, dropped, minimum = window.bits, window.dropped_bits, window.start
    start = np.broadcast_to(along_channels(minimum, len(shape)), shape)
    offset = bias + step * start
    constants = [np.broadcast_to(array, shape) for array in activation.arrays()]
    gain = np.broadcast_to(window.gain, minimum.shape)
    lattice = [np.broadcast_to(along_channels(one, len(shape)), shape) for one in (gain, minimum % gain)]
    keys = np.stack([values.ravel() for values in (step, offset, *lattice, *constants)])
    _, first, which = np.unique(keys, axis=1, return_index=True, return_inverse=True)
    columns = _means(np.arange(2 ** (bits - dropped)), dropped, *keys[2:4, first, None].astype(np.int64))
    real = keys[0, first, None] * columns + keys[1, first, None]
    values = activation.at(shape, first)(real)
    if np.isnan(values).any():
        row, column = np.argwhere(np.isnan(values))[0]
        raise CalibrationError(
            f"The activation {activation} of layer {name!r} is not a number at {real[row, column]:g}, which "
            "its accumulator can reach; clamp what enters it."
        )
    return Lookup(
        tables=frozen(output.nearest(values)),
        which=frozen(compressed(which.reshape(shape))),
        minimum=frozen(minimum),
        bits=bits,
        dropped_bits=dropped,
        output=output,
        proved=window.proved,
    )


def _means(columns: Array, dropped: int, gain: Array, start: Array) -> Array:
    """Return the mean of the accumulators in offset form that round to each column, (rows, columns).

    In offset form, accumulators are multiples of `gain` minus `start` (rows, 1).
    """
    step = 1 << dropped
    least, greatest = columns * step - step // 2 + start, columns * step + (step - 1) // 2 + start
    first, last = -(-least // gain), greatest // gain
    means: Array = np.where(first <= last, gain * (first + last) / 2, (least + greatest) / 2) - start
    return means


def compressed(values: Array) -> Array:
    """Return (C, *S) as (C, *1) if every channel has a single value."""
    first = along_channels(values.reshape(len(values), -1)[:, 0], values.ndim)
    return first if (values == first).all() else values
