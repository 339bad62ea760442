"""A network in exact integers: what is proved, compiled and run.

An image becomes integers, each layer sums integer products (its accumulators) and looks the sums up in a
table of integers, and the last accumulators become real numbers again. No float is computed in between, so
that clear, simulated and encrypted runs agree on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self, TypeAlias

import numpy as np

from fheconv.basics.arrays import Array, Shape, along_channels
from fheconv.basics.config import QuantConfig
from fheconv.networks.floats import Maximum, Network, real_results
from fheconv.networks.linear import Kernel, Term
from fheconv.networks.quantization import CalibratedInput, Quantization, integer_images


@dataclass(frozen=True, kw_only=True, eq=False)
class Lookup:
    """What turns accumulators into the integers of an activation: row `which` of `tables`.

    `minimum` (C,) is subtracted first, which leaves 0 to 2^bits − 1; then `dropped_bits` low
    bits are rounded away, half up; what remains is the column. `which` broadcasts to the layer's shape.
    `proved` says that no input leads outside; otherwise `bits` is what calibration observed, with a margin.
    """

    tables: Array
    which: Array
    minimum: Array
    bits: int
    dropped_bits: int
    output: Quantization
    proved: bool

    @property
    def column_bits(self) -> int:
        """The width of what enters the lookup, after rounding."""
        return self.bits - self.dropped_bits

    def __call__(self, accumulators: Array) -> Array:
        """Return the activations (N, C, *S)."""
        offset = accumulators - along_channels(self.minimum, accumulators.ndim - 1)
        return self.rows(offset, self.which)

    def rows(self, offset: Array, which: Array) -> Array:
        """Return the activations for accumulators in offset form, by the rows `which`."""
        columns = offset
        if self.dropped_bits:
            columns = (offset + (1 << (self.dropped_bits - 1))) >> self.dropped_bits
        if self.proved:
            return self.tables[which, columns]
        # As a lookup on the torus does: what lies outside comes out with the opposite sign.
        turns, columns = np.divmod(columns, self.tables.shape[1])
        return self.tables[which, columns] * np.where(turns % 2, -1, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedLayer:
    """A layer in integers: accumulators Σ terms + `bias`, then a lookup, or none in the last layer.

    The terms' weights are int64, their inputs the raw integers of the tensors they read, padded with their
    zero-point. `inputs` are those tensors' quantizations, one a term. The real value of accumulator `a` is
    `a · scale`: `bias` holds the layer's own bias in steps, and minus what the zero-points add up to. Where a
    lookup follows, all that is in the table instead, exactly, and `bias` is 0. `real_bias` is the layer's own
    bias in real numbers. The three broadcast to `shape`. `weight_range` is the range of the weights' data
    type.
    """

    name: str
    shape: Shape
    terms: tuple[Term, ...]
    inputs: tuple[Quantization, ...]
    scale: Array
    bias: Array
    real_bias: Array
    weight_range: tuple[int, int]
    lookup: Lookup | None

    @property
    def sources(self) -> tuple[int, ...]:
        """The tensors that it reads."""
        return tuple(term.source for term in self.terms)

    @cached_property
    def convolution(self) -> Kernel | None:
        """The one convolution that the layer is, if it is no more than that."""
        if len(self.terms) == 1 and len(self.terms[0].steps) == 1:
            (step,) = self.terms[0].steps
            return step if isinstance(step, Kernel) else None
        return None

    @property
    def taps(self) -> int:
        """How many products one accumulator sums, those of pooling windows not counted."""
        kernels = (term.steps[at] for term in self.terms for at in term.inexact())
        return sum(int(np.prod(kernel.weight.shape[1:])) for kernel in kernels if isinstance(kernel, Kernel))

    def accumulate(self, tensors: Sequence[Array]) -> Array:
        """Return the int64 accumulators (N, C, *S), given the batch's tensors."""
        return self.bias + sum(
            term.apply(tensors[term.source], quantization.zero_point)
            for term, quantization in zip(self.terms, self.inputs, strict=True)
        )

    def output(self, tensors: Sequence[Array]) -> Array:
        """Return the layer's integers (N, C, *S)."""
        accumulators = self.accumulate(tensors)
        return accumulators if self.lookup is None else self.lookup(accumulators)


def comparison(quantization: Quantization) -> Lookup:
    """Return the lookup of max(d, 0) for differences d of such integers: max(a, b) = b + max(a − b, 0)."""
    steps = quantization.maximum - quantization.minimum
    bits = (2 * steps).bit_length()
    return Lookup(
        tables=np.clip(np.arange(2**bits) - steps, 0, steps)[None],
        which=np.zeros((), np.int64),
        minimum=np.array([-steps]),
        bits=bits,
        dropped_bits=0,
        output=replace(quantization, zero_point=0, minimum=0, maximum=steps),
        proved=True,
    )


def blank_images(quantization: Quantization, shape: Shape) -> Array:
    """Return the integer images (n, C, *S) that show the sign of a network's inputs, and no more of them."""
    ends = [quantization.minimum, quantization.maximum] if quantization.minimum < 0 else [0]
    return np.stack([np.full(shape, end, np.int64) for end in ends])


AnyLayer: TypeAlias = QuantizedLayer | Maximum


@dataclass(frozen=True, kw_only=True, eq=False)
class IntegerNetwork:
    """Computes exact integers between float images and float results.

    `observed` holds, for each layer, the per-channel (minimum, maximum) of its accumulators on the
    calibration images (None: nobody looked), `source` the float network it was made from, `calibrated` the
    images' range.
    """

    config: QuantConfig
    input: Quantization
    calibrated: CalibratedInput
    layers: tuple[AnyLayer, ...]
    observed: tuple[tuple[Array, Array] | None, ...]
    source: Network

    @property
    def input_shape(self) -> Shape:
        """The shape (C, *S) of an image."""
        return self.source.input_shape

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The shape of each tensor: the image, and each layer's output."""
        return (self.input_shape, *(layer.shape for layer in self.layers))

    @cached_property
    def quantizations(self) -> tuple[Quantization, ...]:
        """How each tensor but the last is quantized."""
        found = [self.input]
        for layer in self.layers[:-1]:
            if isinstance(layer, Maximum):
                found.append(found[layer.source])
            elif layer.lookup is not None:
                found.append(layer.lookup.output)
        return tuple(found)

    @property
    def last(self) -> QuantizedLayer:
        """The layer whose accumulators are decrypted."""
        layer = self.layers[-1]
        if not isinstance(layer, QuantizedLayer):
            raise TypeError("A network ends in accumulators.")
        return layer

    @property
    def accumulator_shape(self) -> Shape:
        """The shape (K, *Out) of the integer results of one image."""
        return self.last.shape

    @cached_property
    def output_shape(self) -> Shape:
        """The shape of the float results of one image, that of torch's."""
        return self.dequantize(np.zeros((1, *self.accumulator_shape), np.int64)).shape[1:]

    def quantize_input(self, x: Any) -> tuple[Array, bool]:
        """Return the images as an int64 batch (N, *input_shape), and whether `x` was a batch.

        Raises `InputRangeError` for a wrong shape or a value that cannot be represented, naming it.
        """
        return integer_images(x, self.input, self.input_shape)

    def tensors(self, q: Array) -> list[Array]:
        """Return every tensor for integer images (N, *input_shape), the accumulators last."""
        tensors = [q]
        for layer in self.layers:
            tensors.append(layer.output(tensors))
        return tensors

    def accumulate(self, q: Array) -> Array:
        """Return the last accumulators (N, K, *Out) for integer images (N, *input_shape)."""
        return self.tensors(q)[-1]

    def dequantize(self, accumulators: Array) -> Array:
        """Return the real results (float64) that the last accumulators (N, K, *Out) stand for."""
        return real_results(accumulators, self.last.scale, self.source.finish)

    def integers(self, x: Any) -> Array:
        """Return the last accumulators for float images, (N, K, *Out) or (K, *Out).

        Raises `InputRangeError` like `quantize_input`.
        """
        q, batched = self.quantize_input(x)
        y = self.accumulate(q)
        return y if batched else y[0]

    def __call__(self, x: Any) -> Array:
        """Return the float results for float images, through the exact integers."""
        q, batched = self.quantize_input(x)
        y = self.dequantize(self.accumulate(q))
        return y if batched else y[0]

    @classmethod
    def of(cls, network: "IntegerNetwork") -> Self:
        """Return the same network as an object of this class: itself if it is one."""
        if type(network) is cls:
            return network
        return cls(**{field.name: getattr(network, field.name) for field in fields(network)})
