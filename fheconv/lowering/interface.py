"""Turns images into a circuit's integers, and its results into real numbers.

This is all that the owner of the keys must know about a circuit. Of the network's parameters it holds only
the biases and the scale of the last layer.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fheconv.basics.arrays import Array, Shape, along_channels
from fheconv.basics.samples import Data
from fheconv.lowering.lanes import Lanes
from fheconv.networks.floats import Finish, real_results
from fheconv.networks.quantization import Quantization, integer_images


@dataclass(frozen=True, kw_only=True, eq=False)
class Interface:
    """Turns images (N, *`input_shape`) into a circuit's inputs, and its results into real numbers.

    `inputs` (n,) are the flat positions of the image values that are encrypted. `outputs` (m,) are the flat
    positions of the results in the planes of the last accumulators (K·p, *Out), with p planes for each
    channel. Results count from `start` (K·p,). The accumulators (K, *Out) are Σ `factors` (p,) · plane +
    `bias`. They stand for the real numbers accumulator · `scale`, and `finish` turns these into the model's
    outputs. `bias` and `scale` broadcast to `shape`, (K, *Out).
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
        """The shape of the float results of one image, the same as in torch."""
        # No image costs nothing, however large the shape is that a file declares.
        return self.dequantize(np.zeros((0, *self.shape), np.int64)).shape[1:]

    def quantize_input(self, x: Data) -> tuple[Array, bool]:
        """Return the images as an int64 batch (N, *input_shape), and whether `x` was a batch.

        Raises `InputRangeError`, which names a wrong shape or a value that cannot be represented.
        """
        return integer_images(x, self.input, self.input_shape)

    def prepare(self, q: Array) -> Array:
        """Return the circuit's inputs (⌈N / lanes⌉, n) for integer images (N, C, *S)."""
        read = q.reshape(len(q), math.prod(self.input_shape))[:, self.inputs]
        return self.lanes.pack(read, self.input.zero_point)

    def accumulators(self, results: Array, images: int) -> Array:
        """Return the accumulators (N, K, *Out), with the bias, from the circuit's results for N images."""
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
    """Return the sum Σ factors[p] · plane p, (N, K, *S), of a batch's planes (N, K·p, *S)."""
    images, channels, *size = planes.shape
    count = len(factors)
    return np.tensordot(planes.reshape(images, channels // count, count, *size), factors, axes=(2, 0))
