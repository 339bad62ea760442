"""Builds the integer network layer by layer, from rounded weights to lookup tables."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from fheconv.basics.arrays import Array, frozen
from fheconv.basics.config import ROUNDED_AWAY, QuantConfig
from fheconv.basics.errors import AccumulatorOverflowError
from fheconv.networks.bounds import FREE_BITS
from fheconv.networks.floats import Layer, Maximum, Network
from fheconv.networks.integers import AnyLayer, IntegerNetwork, Lookup, blank_image
from fheconv.networks.quantization import CalibratedInput, Quantization
from fheconv.quantizer.draft import Draft
from fheconv.quantizer.gains import gained, quiet_steps, row_gains
from fheconv.quantizer.placement import Placing, Reached, Sums, least_span
from fheconv.quantizer.rows import IntegerTerms
from fheconv.quantizer.steps import HEADROOM, Aim, aims
from fheconv.quantizer.tables import compressed, lookup
from fheconv.quantizer.weights import FittedWeights
from fheconv.quantizer.windows import (
    MOST_CUT,
    WIDEST,
    Budget,
    Window,
    filling_gains,
    quiet_gains,
    room,
    width,
)

# The noise of an image, in units of a lookup's. It is smaller, but LeNet-5's first sums were dear at a norm
# of 2^7.6, and cheap at 2^6.9.
IMAGE_NOISE = 0.25
# The margin around what calibration reaches, unless one is asked for.
LEAST_MARGIN = 0.05


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
        self._blanks = [blank_image(self.image, source.input_shape)]
        self._layers: list[AnyLayer] = []
        self._observed: list[tuple[Array, Array] | None] = []
        self._evidence: list[float | None] = []

    def inputs(self, layer: Layer) -> list[Quantization]:
        """Return the quantization of the tensor that each term of a layer reads."""
        return [q for source in layer.sources if (q := self.quantizations[source]) is not None]

    @property
    def output(self) -> Quantization | None:
        """The quantization of the tensor that the next layer makes, None for the last layer's."""
        return self.quantizations[len(self.tensors)]

    def budget(self, layer: Layer) -> Budget | None:
        """Return the greatest allowed span of a layer's accumulators, None if there is no limit."""
        limit, rounding_bits = self.width_limit(layer), self.rounding_bits(layer)
        if limit is None:
            return None
        proved = self.config.overflow == "proved" or layer.activation is None
        return Budget(room(limit, rounding_bits, proved=proved), rounding_bits, proved)

    def width_limit(self, layer: Layer) -> int | None:
        """Return the width that a layer's accumulators must not exceed, None for any.

        Windows that are not proved have one even if none was asked for, at which lookups are cheap. But with
        less than `ROUNDED_AWAY` bits to round away, weights would be too coarse for what lookups tell apart.
        """
        limit = self.config.accumulator_bits_of(layer.name, looks_up=layer.activation is not None)
        kept = self.rounding_bits(layer)
        if limit is None and kept is not None and self._windows_are_chosen:
            return max(self._quiet_beside_maxima(layer), kept + ROUNDED_AWAY)
        return limit

    def _widest(self, layer: Layer) -> int:
        """Return the greatest width of a layer's windows."""
        return self.width_limit(layer) or WIDEST

    def _quiet_beside_maxima(self, layer: Layer) -> int:
        """Return the greatest width of a layer's windows, at which maxima of what it reads cost no more.

        Concrete gives what a layer reads the width of its windows. Before a maximum is looked up, this is
        undone by a multiplication. So its noise counts as if the lookup had that width.
        """
        entering = [
            2 * self._noises[other.source] + len(other.index) - 2
            for number, other in enumerate(self.source.layers)
            if isinstance(other, Maximum) and {other.source, number + 1} & {*layer.sources}
        ]
        return int(FREE_BITS - np.log2(max(entering)) / 2) if entering else WIDEST

    @property
    def _windows_are_chosen(self) -> bool:
        """Whether windows need not be proved, and weights are rounded so that they fit them."""
        return self.config.overflow == "defined" and self.config.method not in ("minmax", "mse")

    def rounding_bits(self, layer: Layer) -> int | None:
        """Return how many bits enter a layer's lookup after rounding, None for all."""
        return None if layer.activation is None else self.config.of_layer("rounding_bits", layer.name)

    def aims(self, fitted: FittedWeights, bits: int, floats: Sequence[Array]) -> list[Aim]:
        """Return what to try with weights of `bits` bits before windows that need no proof, none elsewhere.

        With finer steps, the sums of the float network (tensors `floats`) would not fit the window, or noise
        would make lookups dearer. Where `accumulator_bits` is given, noise is the user's choice.
        """
        layer = fitted.rows.layer
        budget = self.budget(layer)
        if budget is None or budget.proved:
            return []
        sums = layer.sums(floats)
        spans, kept = np.ptp(_ends(sums), axis=0), budget.rounding_bits
        if layer.activation is not None and kept is not None and self._windows_lie_freely:
            spans = least_span(Sums.of(sums, layer.activation, stretch=self._stretch), kept)
        given = self.config.of_layer("accumulator_bits", layer.name)
        if kept is None or given is not None:
            return [Aim(spans * HEADROOM / budget.steps, budget.steps)]
        quiet = quiet_steps(fitted.rows, self.source.shapes, self._noise(layer), kept)
        usual, variance = fitted.usual_steps(bits), fitted.variance()
        return aims(spans, quiet, usual, variance, kept, self._widest(layer), fitted.taps)

    @property
    def _windows_lie_freely(self) -> bool:
        """Whether the ends of windows are chosen by the error of activations, not by a margin."""
        return self.config.margin is None and self._windows_are_chosen

    @property
    def _stretch(self) -> float:
        """The factor by which values reach further on other images, on average, if they are uniform."""
        return 1 + 2 / len(self.tensors[0])

    def draft(self, layer: Layer, rounded: IntegerTerms, bias: Array) -> Draft:
        """Return a layer with integer weights, whose sums get the `bias` (C, *S), in real numbers.

        It is not added yet. Raises `CalibrationError` if float64 cannot hold a step of its accumulators.
        """
        draft = Draft.of(
            layer,
            rounded,
            bias,
            inputs=self.inputs(layer),
            shapes=self.source.shapes,
            tensors=self.tensors,
            blanks=self._blanks,
        )
        if self.config.overflow == "defined" and layer.activation is not None:
            draft.reached = self._reached(draft)
        return draft

    def error(self, draft: Draft, meant: Array) -> float:
        """Return the mean squared error of a layer's activations, which should be `meant` (N, C, *S)."""
        output = self.output
        if output is None:
            raise TypeError("The last layer has no lookup.")
        table, _, gain = self._lookup(draft, output)
        found = (table(draft.accumulators * gain) - output.zero_point) * output.scale
        return float(np.square(found - meant).mean())

    def add_maximum(self, layer: Maximum) -> None:
        """Add a layer of maxima."""
        self._append(layer, layer.output(self.tensors), layer.output(self._blanks))

    def add(self, draft: Draft) -> None:
        """Add a layer.

        Raises `AccumulatorOverflowError` if the layer does not fit `accumulator_bits`, and `CalibrationError`
        if its bias is outside the range of numbers.
        """
        layer, step, bias, output = draft.layer, draft.step, draft.bias, self.output
        accumulators, blank, quantized = draft.accumulators, draft.blank, draft.bare
        if layer.activation is None or output is None:
            self._check_width(layer, int(draft.bounds.channel_span.max()), None)
            in_steps = compressed(draft.bias_in_steps())
            accumulators, blank = accumulators + in_steps, blank + in_steps
            quantized = replace(quantized, bias=frozen(in_steps))
        else:
            table, gains, gain = self._lookup(draft, output)
            accumulators, blank = accumulators * gain, blank * gain
            terms = gained(draft.rows, quantized.terms, gains)
            quantized = replace(quantized, terms=terms, gain=frozen(gain), lookup=table)
        quantized = replace(quantized, scale=frozen(compressed(step)), real_bias=frozen(compressed(bias)))
        observed = _ends(accumulators)
        if quantized.lookup is not None:
            accumulators, blank = quantized.lookup(accumulators), quantized.lookup(blank)
        self._append(quantized, accumulators, blank, observed, draft.evidence)

    def _lookup(self, draft: Draft, output: Quantization) -> tuple[Lookup, Array, Array]:
        """Return the lookup of a layer, the gains of its rows, and those of its values."""
        window, gains = self._window(draft)
        gain, activation = compressed(gains[draft.rows.of_value]), draft.layer.activation
        if activation is None:
            raise TypeError(f"Layer {draft.layer.name!r} has no activation to look up.")
        step, bias = draft.step / gain, draft.origin
        return lookup(draft.layer.name, activation, output, window, step=step, bias=bias), gains, gain

    def _window(self, draft: Draft) -> tuple[Window, Array]:
        """Return the window of a layer's lookup, and the gains of its rows that fill it."""
        layer, bounds, rounding_bits = draft.layer, draft.bounds, self.rounding_bits(draft.layer)
        minimum, span, proved, bits = bounds.channel_minimum, bounds.channel_span, True, 1
        if draft.reached is not None:
            wide, narrow = (int(spans.max()).bit_length() for spans in (span, draft.reached.span))
            if rounding_bits is not None or narrow < wide:
                minimum, span, bits, proved = *draft.reached, False
        bits = max(bits, self._check_width(layer, int(span.max()), rounding_bits, proved=proved))
        gain = filling_gains(span, bits, rounding_bits, proved=proved)
        if rounding_bits is not None:
            gain = np.minimum(gain, self._quiet_gains(draft, rounding_bits))
        gains = row_gains(draft.rows, gain)
        by_channel = gains[draft.rows.of_value].reshape(len(span), -1)[:, 0]
        window = Window(
            minimum=minimum * by_channel,
            span=span * by_channel,
            bits=bits,
            rounding_bits=rounding_bits,
            proved=proved,
            gain=by_channel,
        )
        return window, gains

    def _quiet_gains(self, draft: Draft, rounding_bits: int) -> Array:
        """Return for each channel the greatest gain (C,) whose noise costs nothing."""
        noise = np.log2(self._noise(draft.layer)) / 2
        return quiet_gains(draft.norm_bits + noise, rounding_bits)

    def _noise(self, layer: Layer) -> float:
        """Return the noise of the values that a layer reads, in units of a lookup's noise."""
        return max(self._noises[source] for source in layer.sources)

    @cached_property
    def _noises(self) -> list[float]:
        """The noise of each tensor. A maximum adds a lookup to one of its values for each of the others."""
        noises = [IMAGE_NOISE]
        for layer in self.source.layers:
            noises.append(noises[layer.source] + len(layer.index) - 1 if isinstance(layer, Maximum) else 1.0)
        return noises

    def _check_width(self, layer: Layer, span: int, rounding_bits: int | None, *, proved: bool = True) -> int:
        """Return the width that holds a span. Raise `AccumulatorOverflowError` if that is not allowed."""
        looks_up = layer.activation is not None
        limit = self.config.accumulator_bits_of(layer.name, looks_up=looks_up)
        bits = width(layer.name, span, rounding_bits, proved=proved) if looks_up else span.bit_length()
        if limit is None or bits <= limit:
            return bits
        raise AccumulatorOverflowError(
            f"Layer {layer.name!r} needs {bits} accumulator bits, and accumulator_bits={limit} are allowed.",
            layer=layer.name,
            value=span,
            limit=2**limit - 1,
        )

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

    def _append(
        self,
        layer: AnyLayer,
        values: Array,
        blank: Array,
        observed: tuple[Array, Array] | None = None,
        evidence: float | None = None,
    ) -> None:
        self._layers.append(layer)
        self._observed.append(observed)
        self._evidence.append(evidence)
        self.tensors.append(values)
        self._blanks.append(blank)

    def _reached(self, draft: Draft) -> Reached:
        """Return where the accumulators lie that a window should hold, and how wide it should be.

        This is what calibration reaches, with the margin, within the bounds. Without a given margin, the ends
        are those of least error. If the window is a little wider than the budget, it loses its top, because
        just above a window most activations are still right.
        """
        layer, accumulators, bounds = draft.layer, draft.accumulators, draft.bounds
        least, greatest = _ends(accumulators)
        margin = self.config.margin
        if margin is None:
            margin = max(LEAST_MARGIN, 1 / len(accumulators))
        extra = np.ceil(margin * (greatest - least)).astype(np.int64)
        # The window includes the blank image: Concrete evaluates it, and fails if a value leaves a table.
        blank = _ends(draft.blank)
        least = np.minimum(np.maximum(least - extra, bounds.channel_minimum), blank[0])
        greatest = np.maximum(np.minimum(greatest + extra, bounds.channel_maximum), blank[1])
        budget = self.budget(layer)
        if budget is None or not self._windows_are_chosen:
            return Reached(least, greatest - least, 1)
        placing = None
        if layer.activation is not None and budget.rounding_bits is not None:
            placing = Placing(
                rounding_bits=budget.rounding_bits,
                gains=self._quiet_gains(draft, budget.rounding_bits),
                widest=self._widest(layer),
            )
            if self._windows_lie_freely:
                sums = Sums.of(
                    accumulators, layer.activation, stretch=self._stretch, step=draft.step, bias=draft.origin
                )
                if (found := placing.best(sums, (least, greatest), blank)) is not None:
                    return found
        narrow = np.maximum(least, blank[1] - budget.steps)
        top = np.minimum(greatest, narrow + budget.steps)
        by_channel = np.moveaxis(accumulators, 1, 0).reshape(len(top), -1)
        cut = (by_channel < narrow[:, None]) | (by_channel > top[:, None])
        if cut.mean(axis=1).max() <= MOST_CUT:
            least, greatest = narrow, top
        span = greatest - least
        return Reached(least, span, 1 if placing is None else placing.filled_width(span))


def _ends(accumulators: Array) -> tuple[Array, Array]:
    """Return the least and the greatest accumulator of each channel, (C,), of accumulators (N, C, *S)."""
    axes = (0, *range(2, accumulators.ndim))
    return accumulators.min(axis=axes), accumulators.max(axis=axes)
