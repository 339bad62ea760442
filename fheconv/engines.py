"""How a convolution without padding is computed, by numpy and by Concrete alike.

Tensors are (N, C, *S), numpy arrays, or (1, C, *S), Concrete's tracers.
"""

from typing import Any

import numpy as np

from fheconv.arithmetic import OUTSIDE, conv
from fheconv.arrays import Array
from fheconv.errors import InvalidArgumentError
from fheconv.pruning import Plain

# Microseconds of one multiply-add, measured by tests/benchmarks/engines.py. Only their ratios matter: they
# choose the engine.
UNIT_COST = {"conv": 1.2, "separable": 2.6, "shifts": 2.7, "matrix": 0.3}
WHY = {
    "conv": "It has no weights, or reads nothing but padding.",
    "shifts": "It has no weights, or reads nothing but padding.",
    "separable": "Two passes need 2-d filters that read one channel each and have rank one.",
}


def run(engine: str, plain: Plain, x: Any, every: int = 1) -> Any:
    """Return the convolution of x (N, C', *S'), (N, K', *Out'). `every` multiplies its constant."""
    return _ENGINES[engine](plain, x, plain.constant * every)


def take(x: Any, index: Array, pad: int) -> Any:
    """Return (N, *index.shape) of x (N, n): the values at `index`, and `pad` where it is `OUTSIDE`."""
    places, width = index.ravel(), x.shape[1]
    outside = places == OUTSIDE
    if isinstance(x, np.ndarray):
        values = x[:, places]
        values[:, outside] = pad
        return values.reshape(len(x), *index.shape)
    from concrete import fhe

    flat = x.reshape((width,))
    if outside.any():
        flat = np.concatenate((flat, fhe.zeros((1,)) if pad == 0 else pad * fhe.ones((1,))))
        places = np.where(outside, width, places)
    if len(places) != flat.shape[0] or (places != np.arange(len(places))).any():
        flat = flat[places]
    return flat.reshape((1, *index.shape))


def _conv_engine(plain: Plain, x: Any, constant: Array) -> Any:
    return _conv(x, plain.weight, constant, plain.stride, plain.dilation, plain.groups)


def _separable_engine(plain: Plain, x: Any, constant: Array) -> Any:
    separated = plain.separated()
    if separated is None:
        raise InvalidArgumentError(WHY["separable"])
    columns, rows = separated
    none = np.zeros_like(constant)
    down, across = ((plain.stride[0], 1), (1, plain.stride[1]))
    half = _conv(x, columns, none, down, (plain.dilation[0], 1), plain.groups)
    return _conv(half, rows, constant, across, (1, plain.dilation[1]), len(plain.weight))


def _shifts_engine(plain: Plain, x: Any, constant: Array) -> Any:
    output = plain.outputs.shape[1:]
    ones = (1,) * len(output)
    y = None
    for tap in plain.nonzero_taps():
        window = tuple(
            slice(t * d, t * d + (o - 1) * s + 1, s)
            for t, o, s, d in zip(tap, output, plain.stride, plain.dilation, strict=True)
        )
        weight = plain.weight[(slice(None), slice(None), *(slice(t, t + 1) for t in tap))]
        bias = constant if y is None else np.zeros_like(constant)
        term = _conv(x[(slice(None), slice(None), *window)], weight, bias, ones, ones, plain.groups)
        y = term if y is None else y + term
    return y


_ENGINES = {"conv": _conv_engine, "separable": _separable_engine, "shifts": _shifts_engine}


def _conv(
    x: Any, weight: Array, bias: Array, stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> Any:
    images, channels, *sizes = x.shape
    if not sizes:  # a linear layer, as an image of one pixel
        x, weight = x.reshape((images, channels, 1)), weight[..., None]
        return _conv(x, weight, bias, (1,), (1,), groups).reshape((images, len(weight)))
    if isinstance(x, np.ndarray):
        return conv(x, weight, bias, stride=stride, dilation=dilation, groups=groups)
    from concrete import fhe

    if len(sizes) == 1:  # as an image of one row
        y = fhe.conv(
            x.reshape((images, channels, 1, *sizes)),
            weight[:, :, None],
            bias,
            strides=(1, *stride),
            dilations=(1, *dilation),
            group=groups,
        )
        return y.reshape((images, len(weight), y.shape[-1]))
    if len(sizes) == 2:
        return fhe.conv(x, weight, bias, strides=stride, dilations=dilation, group=groups)
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
        bias,
        strides=stride[1:],
        dilations=dilation[1:],
        group=groups,
    )
    return y.transpose((1, 0, 2, 3)).reshape((1, len(weight), outputs, *y.shape[2:]))
