"""What the owner of the keys has to know of a circuit: how images become its integers, and results numbers.

It holds no weight of the network's but the last layer's biases.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fheconv.basics.arrays import Array, Shape, along_channels
from fheconv.lowering.lanes import Lanes
from fheconv.networks.floats import Finish, real_results
from fheconv.networks.quantization import Quantization, integer_images


@dataclass(frozen=True, kw_only=True, eq=False)
class Interface:
    """Images (N, *`input_shape`) to what a circuit takes, and its results to real numbers.

    `inputs` (n,) are the flat positions of what is encrypted of an image, `outputs` (m,) those of the results
    in the last accumulators' planes (K·p, *Out), p of them a channel. Results count from `start` (K·p,), and
    accumulators (K, *Out) are Σ `factors` (p,) · plane + `bias`. They stand for the real numbers
    accumulator · `scale`, of which `finish` makes the model's outputs. `bias` and `scale` broadcast to
    `shape`, (K, *Out).
    """

    input: Quantization
    input_shape: Shape
    inputs: Array
    shape: Shape
    outputs: Array
    start: Array
    factors: Array
    bias: Array
    scale: Array
    finish: Finish | None
    lanes: Lanes = field(default_factory=lambda: Lanes.of(1, 1))

    @cached_property
    def output_shape(self) -> Shape:
        """The shape of the float results of one image, that of torch's."""
        return self.dequantize(np.zeros((1, *self.shape), np.int64)).shape[1:]

    def quantize_input(self, x: Any) -> tuple[Array, bool]:
        """Return the images as an int64 batch (N, *input_shape), and whether `x` was a batch.

        Raises `InputRangeError` for a wrong shape or a value that cannot be represented, naming it.
        """
        return integer_images(x, self.input, self.input_shape)

    def prepare(self, q: Array) -> Array:
        """Return what the circuit takes for integer images (N, C, *S): (⌈N / lanes⌉, n)."""
        read = q.reshape(len(q), math.prod(self.input_shape))[:, self.inputs]
        return self.lanes.pack(read, self.input.zero_point)

    def accumulators(self, results: Array, images: int) -> Array:
        """Return the accumulators (N, K, *Out), bias included, of the circuit's results for N images."""
        channels, *size = self.shape
        shape = (channels * len(self.factors), *size)
        y = np.zeros((images, math.prod(shape)), np.int64)
        y[:, self.outputs] = self.lanes.unpack(results, images)
        parts = y.reshape(images, *shape) + along_channels(self.start, len(shape))
        return recombined(parts, self.factors) + self.bias

    def dequantize(self, accumulators: Array) -> Array:
        """Return the model's outputs (float64) that accumulators (N, K, *Out) stand for."""
        return real_results(accumulators, self.scale, self.finish)


def recombined(planes: Array, factors: Array) -> Array:
    """Return Σ factors[p] · plane p, (N, K, *S), of a batch's planes (N, K·p, *S)."""
    images, channels, *size = planes.shape
    count = len(factors)
    return np.tensordot(planes.reshape(images, channels // count, count, *size), factors, axes=(2, 0))
