"""Defines a network in exact integers. Its bounds are proved, and it is compiled and run.

An image becomes integers. Each layer sums integer products (its accumulators) and looks them up in a table of
integers. The last accumulators become real numbers again. Nothing in between uses floats, so that clear,
simulated and encrypted runs agree on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Self, TypeAlias

import numpy as np

from fheconv.basics.arrays import Array, Shape, along_channels
from fheconv.basics.config import QuantConfig
from fheconv.basics.report import Brief
from fheconv.basics.samples import Data
from fheconv.networks.floats import Maximum, Network, real_results
from fheconv.networks.linear import Kernel, Term
from fheconv.networks.quantization import CalibratedInput, Quantization, integer_images


@dataclass(frozen=True, kw_only=True, eq=False)
class Lookup:
    """Turns accumulators into the integers of an activation, by row `which` of `tables`.

    It first subtracts `minimum` (C,), which gives 0 to 2^bits − 1. Then it rounds `dropped_bits` low bits
    away, half up. The result is the column of the table. `which` broadcasts to the layer's shape. `proved`
    says that no image leads outside the table. Otherwise the table repeats there, and every other time it is
    mirrored at the `centers` of its rows: the activation at one end becomes that at the other.
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

    def window(self, channel: int) -> tuple[int, int]:
        """Return the least and the greatest accumulator of a channel that the table holds."""
        start = int(self.minimum[channel])
        return start, start + 2**self.bits - 1

    @cached_property
    def centers(self) -> Array:
        """The activations from which the entries of each row are counted in the circuit, (rows,).

        Where images can leave the window, it is the middle of the first and the last entry, or as near to it
        as keeps mirrored entries in the range of `output`. Elsewhere it is the least activation.
        """
        if self.proved:
            return np.full(len(self.tables), self.output.minimum)
        least = -(-(self.tables.max(axis=1) - self.output.minimum) // 2) + self.output.minimum
        greatest = (self.tables.min(axis=1) + self.output.maximum) // 2
        centers: Array = np.clip((self.tables[:, 0] + self.tables[:, -1]) // 2, least, greatest)
        return centers

    @cached_property
    def constant(self) -> Array:
        """Whether all entries of a row are equal, (rows,). Such a row is a constant, and takes no lookup."""
        constant: Array = np.ptp(self.tables, axis=1) == 0
        return constant

    def __call__(self, accumulators: Array) -> Array:
        """Return the activations (N, C, *S)."""
        offset = accumulators - along_channels(self.minimum, accumulators.ndim - 1)
        return self.rows(offset, self.which)

    def rows(self, offset: Array, which: Array) -> Array:
        """Return the activations for accumulators in offset form, by the rows `which`."""
        columns = offset
        if self.dropped_bits:
            columns = (offset + (1 << (self.dropped_bits - 1))) >> self.dropped_bits
        # A lookup on the torus works in this way: a value outside the table gives an entry with the opposite
        # sign, counted from the center. A constant needs no lookup.
        turns, columns = np.divmod(columns, self.tables.shape[1])
        values = self.tables[which, columns]
        mirrored = (turns % 2 == 1) & ~self.constant[which]
        return np.where(mirrored, 2 * self.centers[which] - values, values)


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedLayer:
    """Computes accumulators, Σ terms + `bias`, and then a lookup; the last layer has no lookup.

    The terms' weights are int64. Their inputs are the integers of the tensors that they read, padded with the
    zero-point. `inputs` holds the quantizations of these tensors, one for each term. `gain` holds the
    integers by which the weights of each channel were multiplied to fill the window of the lookup; without a
    lookup it is 1. The real value of accumulator `a` is `a · scale / gain`: `bias` holds the layer's own bias
    in steps, minus the sum that the zero-points cause. If a lookup follows, its table includes all this
    exactly, and `bias` is 0. `real_bias` is the layer's own bias in real numbers. `scale`, `bias`,
    `real_bias` and `gain` broadcast to `shape`. `weight_range` is the range of the weights' data type,
    without gains.
    """

    name: str
    shape: Shape
    terms: tuple[Term, ...]
    inputs: tuple[Quantization, ...]
    scale: Array
    bias: Array
    real_bias: Array
    gain: Array
    weight_range: tuple[int, int]
    lookup: Lookup | None

    def __repr__(self) -> str:
        low, high = self.weight_range
        bits = "no lookup" if self.lookup is None else f"lookups of {self.lookup.column_bits} bits"
        return f"QuantizedLayer {self.name!r} → {self.shape}: weights {low} to {high}, {bits}"

    @property
    def sources(self) -> tuple[int, ...]:
        """The tensors that it reads."""
        return tuple(term.source for term in self.terms)

    @cached_property
    def convolution(self) -> Kernel | None:
        """The convolution of a layer that is a single convolution; None for other layers."""
        return self.terms[0].convolution if len(self.terms) == 1 else None

    @property
    def taps(self) -> int:
        """The number of products in one accumulator, without those of pooling windows."""
        kernels = (term.steps[at] for term in self.terms for at in term.inexact())
        return sum(int(np.prod(kernel.weight.shape[1:])) for kernel in kernels if isinstance(kernel, Kernel))

    def accumulate(self, tensors: Sequence[Array]) -> Array:
        """Return the int64 accumulators (N, C, *S), given the batch's tensors."""
        return self.bias + sum(
            term.apply(tensors[term.source], quantization.zero_point)
            for term, quantization in zip(self.terms, self.inputs, strict=True)
        )

    def zero(self, shapes: Sequence[Shape]) -> Array:
        """Return the accumulators (C, *S) of real inputs that are zero. `shapes` are those of all tensors."""
        zeros = {source: q.zero_point for source, q in zip(self.sources, self.inputs, strict=True)}
        blank = [np.full((1, *shape), zeros.get(n, 0), np.int64) for n, shape in enumerate(shapes)]
        accumulators: Array = self.accumulate(blank)[0]
        return accumulators

    def output(self, tensors: Sequence[Array]) -> Array:
        """Return the layer's integers (N, C, *S)."""
        accumulators = self.accumulate(tensors)
        return accumulators if self.lookup is None else self.lookup(accumulators)


def comparison(quantization: Quantization) -> Lookup:
    """Return the lookup of max(d, 0), for the difference d of two such integers.

    With it, max(a, b) is computed as b + max(a − b, 0).
    """
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


def blank_image(quantization: Quantization, shape: Shape) -> Array:
    """Return the integer image (1, *shape) that shows Concrete whether inputs can be negative.

    Its real values are zeros; if inputs can be negative, each is −1 step.
    """
    return np.full((1, *shape), -1 if quantization.minimum < 0 else quantization.zero_point, np.int64)


AnyLayer: TypeAlias = QuantizedLayer | Maximum


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class IntegerNetwork(Brief):
    """Computes float results from float images, through exact integers.

    `observed` holds, for each layer, the per-channel (minimum, maximum) of its accumulators on the
    calibration images (None: not observed). `evidence` holds, for each layer, how many independent images its
    weights were fitted to (None: they were not fitted to images). `source` is the float network that it was
    made from, `calibrated` describes the calibration images.
    """

    config: QuantConfig
    input: Quantization
    calibrated: CalibratedInput
    layers: tuple[AnyLayer, ...]
    observed: tuple[tuple[Array, Array] | None, ...]
    evidence: tuple[float | None, ...]
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
        """The quantization of each tensor except the last."""
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
            raise TypeError("The last layer of a network must be a layer of accumulators, not a Maximum.")
        return layer

    @property
    def accumulator_shape(self) -> Shape:
        """The shape (K, *Out) of the integer results of one image."""
        return self.last.shape

    @cached_property
    def output_shape(self) -> Shape:
        """The shape of the float results of one image, as in torch."""
        return self.dequantize(np.zeros((1, *self.accumulator_shape), np.int64)).shape[1:]

    def quantize_input(self, x: Data) -> tuple[Array, bool]:
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
        """Turn the last accumulators (N, K, *Out) into real results (float64)."""
        return real_results(accumulators, self.last.scale, self.source.finish)

    def integers(self, x: Data) -> Array:
        """Return the last accumulators for float images, (N, K, *Out) or (K, *Out).

        Raises `InputRangeError` like `quantize_input`.
        """
        q, batched = self.quantize_input(x)
        y = self.accumulate(q)
        return y if batched else y[0]

    def outside(self, x: Data) -> dict[str, float]:
        """Return the share of accumulators outside their window, for float images, by the names of layers.

        Only layers whose windows images can leave are named. Raises `InputRangeError` like `quantize_input`.
        """
        tensors, shares = self.tensors(self.quantize_input(x)[0]), {}
        for layer in self.layers:
            if isinstance(layer, QuantizedLayer) and (table := layer.lookup) and not table.proved:
                offset = layer.accumulate(tensors) - along_channels(table.minimum, len(layer.shape))
                shares[layer.name] = float(((offset < 0) | (offset >= 2**table.bits)).mean())
        return shares

    def __call__(self, x: Data) -> Array:
        """Return the float results for float images, computed in exact integers."""
        q, batched = self.quantize_input(x)
        y = self.dequantize(self.accumulate(q))
        return y if batched else y[0]

    def _summary(self) -> tuple[str, list[tuple[str, ...]]]:
        rows: list[tuple[str, ...]] = []
        for layer, source in zip(self.layers, self.source.layers, strict=True):
            bits, looked_up = "", "decrypted"
            if isinstance(layer, Maximum):
                looked_up = f"lookups of {comparison(self.quantizations[layer.source]).bits} bits"
            else:
                bits = f"{self.config.of_layer('weight_bits', layer.name)}-bit weights"
                if layer.lookup is not None:
                    looked_up = f"lookups of {layer.lookup.column_bits} bits"
            rows.append((layer.name, source.kind, "×".join(map(str, layer.shape)), bits, looked_up))
        shapes = f"{self.input_shape} → {self.output_shape}"
        return f"{type(self).__name__}: {shapes}, images of {self.input.bits} bits", rows

    @classmethod
    def of(cls, network: "IntegerNetwork") -> Self:
        """Return the same network as an object of this class: itself if it is one."""
        if type(network) is cls:
            return network
        return cls(**{field.name: getattr(network, field.name) for field in fields(network)})
