"""What the proved bounds mean for an accumulator of a given width, and what to do when it is too narrow."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fheconv.bounds import accumulator_bounds, layer_bounds, twos_complement_bits, without_bias
from fheconv.config import QuantConfig, check_integer
from fheconv.errors import AccumulatorOverflowError
from fheconv.lower import LoweredLayer, lower
from fheconv.network import Layer, Maximum
from fheconv.quantized import QuantizedNetwork
from fheconv.quantizer.activations import input_quantization
from fheconv.quantizer.mse import round_mse
from fheconv.rendering import Report
from fheconv.steps import Kernel, Shape

# What a lookup of so many bits costs, 64 of them in a circuit, in millions of the optimiser's complexity,
# at Concrete's default failure probability. tests/benchmarks/lookups.py prints it. In between, and above, it
# grows by the same factor a bit.
LOOKUP_PRICE = {1: 28, 2: 32, 3: 47, 4: 67, 5: 117, 6: 502, 7: 1158, 8: 2610, 10: 13186}


@dataclass(frozen=True, kw_only=True)
class ChannelBudget:
    """One output channel: its attainable range, where the maximum is attained, and what calibration saw.

    `observed` is None where there were no calibration images.
    """

    channel: int
    minimum: int
    maximum: int
    position: tuple[int, ...]
    observed: tuple[int, int] | None

    @property
    def span(self) -> int:
        """Steps between minimum and maximum: the greatest value in offset form."""
        return self.maximum - self.minimum

    @property
    def offset_bits(self) -> int:
        """The channel's width in offset form."""
        return self.span.bit_length()

    @property
    def twos_complement_bits(self) -> int:
        """The channel's width as it is."""
        return twos_complement_bits(self.minimum, self.maximum)


@dataclass(frozen=True, kw_only=True)
class LayerBudget:
    """One layer: what it is, what it costs, and the widths its accumulators need, by three methods.

    `accumulator_bits` is the width that the circuit gives them, in offset form: `offset_bits`, and one more
    where rounding could carry. `proved` says that no image leads outside; otherwise it is what calibration
    observed, with a margin (`QuantConfig.overflow`), and `risk` bounds the probability that an image like
    those of calibration leaves what was observed, margin not counted. `lookup_bits` is what rounding leaves
    of it, `table_entries` the size of a lookup's table, and `cost_share` the layer's share of what all
    lookups cost. `channels` is empty for maxima, whose accumulators are differences of two.
    """

    name: str
    kind: str
    shape: Shape
    multiply_adds: int
    lookups: int
    weight_bits: int
    input_bits: int
    taps: int
    accumulator_bits: int
    proved: bool
    risk: float
    offset_bits: int
    twos_complement_bits: int
    data_type_bits: int
    observed_bits: int | None
    lookup_bits: int | None
    table_entries: int
    cost_share: float
    channels: tuple[ChannelBudget, ...]

    @property
    def worst(self) -> ChannelBudget:
        """The channel with the widest range."""
        return max(self.channels, key=lambda channel: channel.span)


@dataclass(frozen=True, kw_only=True, repr=False)
class BudgetReport(Report):
    """The proved accumulator widths of a network, held against a limit.

    Widths are those of the circuit, which holds accumulators in offset form: each channel's minimum is
    subtracted inside the convolution, so a channel needs bit_length(maximum − minimum) bits, unsigned,
    and no bias widens it. `accumulator_bits` is the width the network needs, `limit` the one it was
    held against (None: none), `remedy` what to change where it does not fit.
    """

    layers: tuple[LayerBudget, ...]
    limit: int | None
    remedy: str | None

    @property
    def accumulator_bits(self) -> int:
        """The width of the widest accumulator, in offset form."""
        return max(layer.accumulator_bits for layer in self.layers)

    @property
    def lookups(self) -> int:
        """How many lookups one image takes."""
        return sum(layer.lookups for layer in self.layers)

    @property
    def proved(self) -> bool:
        """Whether no image can overflow an accumulator; otherwise some widths are observed only."""
        return all(layer.proved for layer in self.layers)

    @property
    def fits(self) -> bool:
        """Whether every accumulator is proved to fit the limit."""
        return self.limit is None or self.accumulator_bits <= self.limit

    def require(self) -> "BudgetReport":
        """Return the report itself, or raise `AccumulatorOverflowError` if something does not fit."""
        if self.fits or self.limit is None:
            return self
        layer = max((one for one in self.layers if one.channels), key=lambda one: one.accumulator_bits)
        raise AccumulatorOverflowError(
            f"{_verdict(layer, self.limit)} {self.remedy}",
            layer=layer.name,
            channel=layer.worst.channel,
            value=layer.worst.span,
            limit=2**self.limit - 1,
            remedy=self.remedy,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, ready for JSON."""
        return {
            "fits": self.fits,
            "accumulator_bits": self.accumulator_bits,
            "limit": self.limit,
            "remedy": self.remedy,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __rich__(self) -> RenderableType:
        table = self._channel_table() if len(self.layers) == 1 else self._layer_table()
        return Group(table, *(Text(line) for line in self._lines()))

    def _channel_table(self) -> Table:
        table = Table(title="Accumulator budget", title_justify="left")
        for heading in ("layer", "channel", "proved range", "offset form", "two's compl.", "observed range"):
            table.add_column(heading, justify="left" if heading == "layer" else "right")
        for layer in self.layers:
            for channel in layer.channels:
                over = self.limit is not None and channel.offset_bits > self.limit
                mark = " ← worst" if channel is layer.worst else ""
                table.add_row(
                    Text(layer.name),  # plain: a name may hold what rich takes for markup
                    f"{channel.channel}{mark}",
                    f"{channel.minimum}..{channel.maximum}",
                    f"{channel.offset_bits} bits",
                    f"{channel.twos_complement_bits} bits",
                    "–" if channel.observed is None else "{}..{}".format(*channel.observed),
                    style="red" if over else None,
                )
        return table

    def _layer_table(self) -> Table:
        table = Table(title="Accumulator budget", title_justify="left")
        for heading in ("layer", "kind", "shape", "mult.-adds", "lookups", "bits", "seen", "table", "cost"):
            table.add_column(heading, justify="left" if heading in ("layer", "kind") else "right")
        for layer in self.layers:
            over = self.limit is not None and layer.accumulator_bits > self.limit
            table.add_row(
                Text(layer.name),
                layer.kind,
                "×".join(map(str, layer.shape)),
                f"{layer.multiply_adds:,}",
                f"{layer.lookups:,}",
                f"{layer.accumulator_bits} {'proved' if layer.proved else 'observed only'}",
                "–" if layer.observed_bits is None else str(layer.observed_bits),
                f"{layer.table_entries}" if layer.table_entries else "–",
                f"{layer.cost_share:.0%}",
                style="red" if over else None,
            )
        return table

    def _lines(self) -> Iterator[str]:
        if len(self.layers) > 1:
            proved = "proved: no image overflows them" if self.proved else "not all of them proved"
            width = f"accumulators of up to {self.accumulator_bits} bits"
            yield f"{self.lookups:,} lookups an image; {width}, {proved}."
        for layer in self.layers:
            if len(self.layers) == 1:
                seen = "" if layer.observed_bits is None else f", calibration observed {layer.observed_bits}"
                yield (
                    f"{layer.name}: {layer.weight_bits}-bit weights, {layer.input_bits}-bit inputs, "
                    f"{layer.taps} taps. Proved {layer.offset_bits} bits; the data types alone would prove "
                    f"{layer.data_type_bits}{seen}."
                )
            if not layer.proved:
                yield (
                    f"{layer.name}: {layer.accumulator_bits} bits are observed only, {layer.offset_bits} are "
                    f"proved. Of images like those of calibration up to {layer.risk:.1%} leave what was "
                    "observed; those that leave the margin too come out wrong."
                )
            over = self.limit is not None and layer.accumulator_bits > self.limit
            if self.limit is not None and layer.channels and (over or len(self.layers) == 1):
                yield _verdict(layer, self.limit)
        if self.remedy:
            yield self.remedy


def report(network: QuantizedNetwork, limit: int | None = None) -> BudgetReport:
    """Return the budget of a network, with a remedy where it does not fit `limit` bits.

    Raises `InvalidArgumentError` for a limit that is not a positive integer.
    """
    if limit is not None:
        check_integer("accumulator_bits", limit, 1)
        limit = int(limit)
    lowered = lower(network).layers
    prices = [layer.lookups * lookup_price(layer.lookup_bits) for layer in lowered]
    layers = tuple(
        _layer(network, number, low, price / (sum(prices) or 1.0))
        for number, (low, price) in enumerate(zip(lowered, prices, strict=True))
    )
    over = [layer for layer in layers if limit is not None and layer.accumulator_bits > limit]
    remedy = _remedy(network, limit, layers) if limit is not None and over else None
    return BudgetReport(layers=layers, limit=limit, remedy=remedy)


def lookup_price(bits: int) -> float:
    """Return what a lookup of so many bits costs, in millions of the optimiser's complexity."""
    if bits < 1:
        return 0.0
    known = np.array(sorted(LOOKUP_PRICE))
    logarithms = np.log([LOOKUP_PRICE[b] for b in known.tolist()])
    if bits <= known[-1]:
        return float(np.exp(np.interp(bits, known, logarithms)))
    slope = (logarithms[-1] - logarithms[-2]) / (known[-1] - known[-2])
    return float(np.exp(logarithms[-1] + slope * (bits - known[-1])))


def _layer(network: QuantizedNetwork, number: int, lowered: LoweredLayer, share: float) -> LayerBudget:
    layer = network.layers[number]
    if isinstance(layer, Maximum):
        return LayerBudget(
            name=layer.name,
            kind=f"maximum of {len(layer.index)}",
            shape=layer.shape,
            multiply_adds=0,
            lookups=lowered.lookups,
            weight_bits=1,
            input_bits=network.quantizations[layer.source].bits,
            taps=2,
            accumulator_bits=lowered.bits,
            proved=True,
            risk=0.0,
            offset_bits=lowered.bits,
            twos_complement_bits=lowered.bits,
            data_type_bits=lowered.bits,
            observed_bits=None,
            lookup_bits=lowered.bits,
            table_entries=2**lowered.bits,
            cost_share=share,
            channels=(),
        )
    observed = network.observed[number]
    # The client adds the bias: one that differs within a channel widens nothing.
    shifted = layer if math.prod(layer.bias.shape[1:]) == 1 else without_bias(layer)
    bounds = layer_bounds(shifted, network.shapes)
    steps = max(quantization.maximum - quantization.minimum for quantization in layer.inputs)
    channels = tuple(
        ChannelBudget(
            channel=c,
            minimum=int(bounds.channel_minimum[c]),
            maximum=int(bounds.channel_maximum[c]),
            position=bounds.maximum_position(c),
            observed=None if observed is None else (int(observed[0][c]), int(observed[1][c])),
        )
        for c in range(layer.shape[0])
    )
    widths = [(c.observed[1] - c.observed[0]).bit_length() for c in channels if c.observed is not None]
    table = layer.lookup
    return LayerBudget(
        name=layer.name,
        kind=_kind(network.source.layers[number]),
        shape=layer.shape,
        multiply_adds=lowered.multiply_adds,
        lookups=lowered.lookups,
        weight_bits=network.config.of_layer("weight_bits", layer.name),
        input_bits=max(quantization.bits for quantization in layer.inputs),
        taps=layer.taps,
        accumulator_bits=bounds.offset_bits if table is None else table.bits,
        proved=table is None or table.proved,
        risk=0.0 if table is None or table.proved else _risk(layer.shape[0], network.calibrated.images),
        offset_bits=bounds.offset_bits,
        twos_complement_bits=bounds.twos_complement_bits,
        data_type_bits=(layer.taps * max(map(abs, layer.weight_range)) * steps).bit_length(),
        observed_bits=max(widths, default=None),
        lookup_bits=None if table is None else table.bits - table.dropped_bits,
        table_entries=0 if table is None else table.tables.shape[1],
        cost_share=share,
        channels=channels,
    )


def _risk(channels: int, images: int) -> float:
    """Return how likely an image is at most to leave the range that some channel had on others like it.

    Each of n + 1 exchangeable images is as likely as any to hold the greatest accumulator of all, and the
    least.
    """
    return min(2 * channels / (images + 1), 1.0)


def _kind(source: Layer | Maximum) -> str:
    """Return what a layer is in a few words, such as "conv 3×3, pool 2×2, relu"."""
    words: list[str] = []
    for term in source.terms if isinstance(source, Layer) else ():
        for step in term.steps:
            if isinstance(step, Kernel) and not term.is_plain():
                size = "×".join(map(str, step.geometry.kernel))
                words.append(f"{'pool' if step.exact else 'conv'} {size}" if size else "linear")
        if term.is_plain():
            words.append("skip")
    function = getattr(source, "activation", None)
    return ", ".join([*dict.fromkeys(words), *([] if function is None else [function.operator])])


def _verdict(layer: LayerBudget, limit: int) -> str:
    worst = layer.worst
    where = f"channel {worst.channel}, at position {worst.position}"
    if layer.accumulator_bits <= limit:
        return (
            f"Layer {layer.name!r} fits {limit} bits with {limit - layer.accumulator_bits} to spare; its "
            f"widest is {where}, which spans {worst.span} of {2**limit - 1} steps."
        )
    return (
        f"Layer {layer.name!r} does not fit {limit} bits: it needs {layer.accumulator_bits}, "
        f"{layer.accumulator_bits - limit} more, because of {where}, whose accumulator spans "
        f"{worst.span} steps ({worst.minimum}..{worst.maximum}) where {limit} bits hold {2**limit - 1}."
    )


def _remedy(network: QuantizedNetwork, limit: int, layers: Sequence[LayerBudget]) -> str:
    """Say what to quantize with, or what else to do, for the network to fit."""
    config, kernel = network.config, network.last.convolution
    nearest = config.method == "mse" or (config.method == "auto" and config.accumulator_bits is None)
    if kernel is not None and len(layers) == 1 and nearest:
        return _smaller_bits(network, kernel, limit)
    # A weight of 1 needs as many bits as what it multiplies.
    least = max(layer.input_bits for layer in layers)
    if least > limit:
        return (
            f"Some layer reads {least}-bit values, and a single weight of 1 needs as many accumulator bits; "
            f"use activation_bits and input_bits of less than {limit}, and accumulator_bits={limit}."
        )
    kept = replace(config, accumulator_bits=limit, overflow="proved", method="auto")
    return f"Quantize with {kept}: the weights are then chosen to keep to {limit} bits."


def _smaller_bits(network: QuantizedNetwork, kernel: Kernel, limit: int) -> str:
    """Try smaller (weight_bits, input_bits) on the float weights, and name the first that fits.

    Those that give up the fewest bits in all come first, and among them those with the most weight bits.
    """
    config = network.config
    terms = (term for layer in network.source.layers if isinstance(layer, Layer) for term in layer.terms)
    (source,) = (step.weight for term in terms for step in term.steps if isinstance(step, Kernel))
    rows = source if config.per_channel else source[None]
    weights = {
        bits: round_mse(rows, bits).values.reshape(source.shape)
        for bits in range(config.of_layer("weight_bits", network.last.name), 0, -1)
    }
    candidates = product(weights, range(network.input.bits, 1 if config.input_signed else 0, -1))
    tried: list[tuple[int, QuantConfig]] = []
    for weight_bits, input_bits in sorted(candidates, key=lambda bits: (sum(bits), bits), reverse=True):
        smaller = replace(config, weight_bits=weight_bits, input_bits=input_bits, input_levels=None)
        inputs = input_quantization(network.calibrated, smaller)
        bits = accumulator_bounds(
            weights[weight_bits],
            kernel.geometry,
            network.input_shape[1:],
            (inputs.minimum, inputs.maximum),
            pad_value=inputs.zero_point,
        ).offset_bits
        if bits <= limit:
            return f"Quantize with {smaller}: that is proved to need {bits} bits."
        tried.append((bits, smaller))
    least, smaller = min(tried, key=lambda attempt: attempt[0])
    return (
        f"No width of weights and inputs fits: with {smaller} it still needs {least}. Allow "
        f"accumulator_bits={least}, or give the layer fewer taps (groups, a smaller kernel)."
    )
