"""Builds the integer network layer by layer, from rounded weights to lookup tables."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fheconv.basics.arrays import Array, first_position, frozen
from fheconv.basics.config import QuantConfig
from fheconv.basics.errors import AccumulatorOverflowError, CalibrationError
from fheconv.networks.bounds import layer_bounds
from fheconv.networks.floats import Layer, Maximum, Network
from fheconv.networks.integers import AnyLayer, IntegerNetwork, QuantizedLayer, blank_images
from fheconv.networks.quantization import CalibratedInput, Quantization
from fheconv.quantizer.tables import Budget, Window, compressed, lookup, reserve, width
from fheconv.quantizer.weights import IntegerTerms

# The integers of a bias are computed in float64, and must stay exact there.
BIAS_LIMIT = 2**53


class Building:
    """Builds an integer network: layers are added in order, each on the results of those before it.

    `quantizations` says how each tensor becomes integers (None: the last). `tensors` holds the integer
    tensors of the layers added so far, for the images (N, C, *S).
    """

    def __init__(
        self,
        source: Network,
        config: QuantConfig,
        quantizations: Sequence[Quantization | None],
        calibrated: CalibratedInput,
        images: Array,
    ) -> None:
        if quantizations[0] is None:
            raise TypeError("The first tensor is the image, which must have a quantization.")
        self.source, self.config, self.calibrated = source, config, calibrated
        self.quantizations = quantizations
        self.image = quantizations[0]
        self.tensors = [self.image.integers(images)]
        self._blanks = [blank_images(self.image, source.input_shape)]
        self._layers: list[AnyLayer] = []
        self._observed: list[tuple[Array, Array] | None] = []
        self._evidence: list[float | None] = []

    def inputs(self, layer: Layer) -> list[Quantization]:
        """Return the quantization of the tensor that each term of a layer reads."""
        return [q for source in layer.sources if (q := self.quantizations[source]) is not None]

    def budget(self, layer: Layer) -> Budget | None:
        """Return the greatest allowed span of a layer's accumulators, None if there is no limit."""
        looks_up = layer.activation is not None
        limit = self.config.accumulator_bits_of(layer.name, looks_up=looks_up)
        if limit is None:
            return None
        rounding_bits = self.rounding_bits(layer)
        return Budget(2**limit - 1 - reserve(limit, rounding_bits), rounding_bits)

    def rounding_bits(self, layer: Layer) -> int | None:
        """Return how many bits enter a layer's lookup after rounding, None for all."""
        return None if layer.activation is None else self.config.of_layer("rounding_bits", layer.name)

    def add_maximum(self, layer: Maximum) -> None:
        """Add a layer of maxima."""
        self._append(layer, None, None)

    def add(self, layer: Layer, rounded: IntegerTerms, bias: Array) -> None:
        """Add a layer with integer weights; `bias` (C, *S) is added to its sums, in real numbers.

        Raises `AccumulatorOverflowError` if the layer does not fit `accumulator_bits`, and `CalibrationError`
        if a bias or a step is outside the range of numbers.
        """
        bare = self._bare(layer, rounded)
        zero, sums = self._zero(bare), bare.accumulate(self.tensors)
        step = _steps(layer, rounded.step, bias)
        counted = np.zeros((1,) * len(layer.shape), np.int64)
        if layer.activation is None:
            counted = compressed(_bias_in_steps(layer, bias, step) - zero)
        quantized = replace(
            bare, scale=frozen(compressed(step)), bias=frozen(counted), real_bias=frozen(compressed(bias))
        )
        accumulators = np.moveaxis(sums + counted, 1, 0).reshape(layer.shape[0], -1)
        observed = accumulators.min(axis=1), accumulators.max(axis=1)
        bounds = layer_bounds(bare, self.source.shapes)
        minimum, span, proved = bounds.channel_minimum, bounds.channel_span, True
        output = self.quantizations[len(self.tensors)]
        rounding_bits = self.rounding_bits(layer)
        if layer.activation is None or output is None:
            bits = bounds.offset_bits
        else:
            if self.config.overflow == "calibrated" and not self._feeds_maxima():
                least, expected = self._expected(quantized, *observed)
                if expected.max() < span.max():
                    minimum, span, proved = least, expected, False
            bits = width(layer.name, int(span.max()), rounding_bits)
            table = lookup(
                layer.name,
                layer.activation,
                output,
                Window(minimum=minimum, span=span, bits=bits, rounding_bits=rounding_bits, proved=proved),
                step=step,
                bias=bias - step * zero,
            )
            quantized = replace(quantized, lookup=table)
        limit = self.config.accumulator_bits_of(layer.name, looks_up=layer.activation is not None)
        if limit is not None and bits > limit:
            raise AccumulatorOverflowError(
                f"Layer {layer.name!r} needs {bits} accumulator bits, and accumulator_bits={limit} are "
                'allowed; use method="accumulator", which keeps to them.',
                layer=layer.name,
                value=int(span.max()),
                limit=2**limit - 1,
                remedy='method="accumulator"',
            )
        self._append(quantized, observed, min(rounded.evidence, default=None))

    def network(self) -> IntegerNetwork:
        """Return the network, after every layer was added."""
        return IntegerNetwork(
            config=self.config,
            input=self.image,
            calibrated=self.calibrated,
            layers=tuple(self._layers),
            observed=tuple(self._observed),
            evidence=tuple(self._evidence),
            source=self.source,
        )

    def _append(self, layer: AnyLayer, observed: tuple[Array, Array] | None, evidence: float | None) -> None:
        self._layers.append(layer)
        self._observed.append(observed)
        self._evidence.append(evidence)
        self.tensors.append(layer.output(self.tensors))
        self._blanks.append(layer.output(self._blanks))

    def _bare(self, layer: Layer, rounded: IntegerTerms) -> QuantizedLayer:
        none = np.zeros((1,) * len(layer.shape), np.int64)
        return QuantizedLayer(
            name=layer.name,
            shape=layer.shape,
            terms=rounded.terms,
            inputs=tuple(self.inputs(layer)),
            scale=none,
            bias=none,
            real_bias=none,
            weight_range=rounded.range,
            lookup=None,
        )

    def _zero(self, layer: QuantizedLayer) -> Array:
        """Return the accumulators (C, *S) when every real input is zero."""
        zeros = {source: q.zero_point for source, q in zip(layer.sources, layer.inputs, strict=True)}
        blank = [np.full((1, *s), zeros.get(n, 0), np.int64) for n, s in enumerate(self.source.shapes)]
        zero: Array = layer.accumulate(blank)[0]
        return zero

    def _feeds_maxima(self) -> bool:
        """Return whether maxima are taken of the next tensor.

        Maxima are right only for values in range; for a value that wrapped around, the result is unknown.
        """
        number = len(self.tensors)
        return any(isinstance(one, Maximum) and one.source == number for one in self.source.layers)

    def _expected(self, layer: QuantizedLayer, least: Array, greatest: Array) -> tuple[Array, Array]:
        """Return the start and the span that calibration observed for each channel, with the margin."""
        extra = np.ceil(self.config.margin * (greatest - least)).astype(np.int64)
        # The window includes the blank images: Concrete evaluates them, and fails if a value leaves a table.
        blank = np.moveaxis(layer.accumulate(self._blanks), 1, 0).reshape(len(least), -1)
        start = np.minimum(least - extra, blank.min(axis=1))
        return start, np.maximum(greatest + extra, blank.max(axis=1)) - start


def _steps(layer: Layer, step: Array, bias: Array) -> Array:
    """Return the real size of an accumulator step for each value, (C, *S), never 0.

    Raises `CalibrationError` if float64 cannot hold it.
    """
    # A filter of zeros gives its bias everywhere. With the bias as the step, it is exactly ±1.
    step = np.where(step != 0, step, np.where(bias != 0, np.abs(bias), 1.0))
    usable = np.isfinite(step) & (np.abs(step) >= np.finfo(np.float64).tiny)
    if not usable.all():
        where = first_position(~usable)
        raise CalibrationError(
            f"One accumulator step of channel {where[0]} of layer {layer.name!r} would be {step[where]:g}, "
            "which float64 does not hold; rescale the weights or the images, or prune the channel."
        )
    return step


def _bias_in_steps(layer: Layer, bias: Array, step: Array) -> Array:
    with np.errstate(over="ignore"):  # overflow is refused below
        steps = np.rint(bias / step)
    if (np.abs(steps) >= BIAS_LIMIT).any():
        where = first_position(np.abs(steps) >= BIAS_LIMIT)
        raise CalibrationError(
            f"Channel {where[0]} of layer {layer.name!r} has bias {bias[where]:g}, but one accumulator step "
            f"is {step[where]:g}: the bias has too many steps (2^53 or more). Its weights are "
            "vanishingly small; prune the channel."
        )
    return steps.astype(np.int64)
