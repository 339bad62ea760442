"""What the proved bounds mean for an accumulator of a given width, and what to do when it is too narrow."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fheconv.arrays import Array
from fheconv.bounds import accumulator_bounds, layer_bounds, twos_complement_bits
from fheconv.config import QuantConfig, check_integer
from fheconv.errors import AccumulatorOverflowError
from fheconv.network import QuantizedConv, QuantizedNetwork
from fheconv.quantizer import input_quantization
from fheconv.rendering import Report
from fheconv.rounding import round_weight


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
    """One layer: the widths its accumulators need, by three methods, and its channels."""

    name: str
    weight_bits: int
    input_bits: int
    taps: int
    offset_bits: int
    twos_complement_bits: int
    data_type_bits: int
    observed_bits: int | None
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
        """The proved width of the widest accumulator, in offset form."""
        return max(layer.offset_bits for layer in self.layers)

    @property
    def fits(self) -> bool:
        """Whether every accumulator is proved to fit the limit."""
        return self.limit is None or self.accumulator_bits <= self.limit

    def require(self) -> "BudgetReport":
        """Return the report itself, or raise `AccumulatorOverflowError` if something does not fit."""
        if self.fits or self.limit is None:
            return self
        layer = max(self.layers, key=lambda layer: layer.worst.span)
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
        return Group(table, *(Text(line) for line in self._lines()))

    def _lines(self) -> Iterator[str]:
        for layer in self.layers:
            observed = "" if layer.observed_bits is None else f", calibration observed {layer.observed_bits}"
            yield (
                f"{layer.name}: {layer.weight_bits}-bit weights, {layer.input_bits}-bit inputs, {layer.taps} "
                f"taps. Proved {layer.offset_bits} bits; the data types alone would prove "
                f"{layer.data_type_bits}{observed}."
            )
            if self.limit is not None:
                yield _verdict(layer, self.limit)
        if self.remedy:
            yield self.remedy


def report(network: QuantizedNetwork, limit: int | None = None) -> BudgetReport:
    """Return the budget of a network, with a remedy that was tried where it does not fit `limit` bits.

    Raises `InvalidArgumentError` for a limit that is not a positive integer.
    """
    if limit is not None:
        check_integer("accumulator_bits", limit, 1)
        limit = int(limit)
    spatial = network.input_shape[1:]
    layers = []
    remedy = None
    for number, layer in enumerate(network.layers):
        observed = None if network.observed is None else network.observed[number]
        budget = _layer(layer, network.config.weight_bits, spatial, observed)
        layers.append(budget)
        if limit is not None and budget.offset_bits > limit and remedy is None:
            remedy = _remedy(network, number, spatial, limit)
        spatial = layer.geometry.output_size(spatial)
    return BudgetReport(layers=tuple(layers), limit=limit, remedy=remedy)


def _layer(
    layer: QuantizedConv, weight_bits: int, spatial: tuple[int, ...], observed: tuple[Array, Array] | None
) -> LayerBudget:
    bounds = layer_bounds(layer, spatial)
    steps = layer.input.maximum - layer.input.minimum
    channels = tuple(
        ChannelBudget(
            channel=c,
            minimum=int(bounds.channel_minimum[c]),
            maximum=int(bounds.channel_maximum[c]),
            position=bounds.maximum_position(c),
            observed=None if observed is None else (int(observed[0][c]), int(observed[1][c])),
        )
        for c in range(len(layer.weight))
    )
    widths = [(c.observed[1] - c.observed[0]).bit_length() for c in channels if c.observed is not None]
    return LayerBudget(
        name=layer.name,
        weight_bits=weight_bits,
        input_bits=layer.input.bits,
        taps=layer.taps,
        offset_bits=bounds.offset_bits,
        twos_complement_bits=bounds.twos_complement_bits,
        data_type_bits=(layer.taps * max(map(abs, layer.weight_range)) * steps).bit_length(),
        observed_bits=max(widths, default=None),
        channels=channels,
    )


def _verdict(layer: LayerBudget, limit: int) -> str:
    worst = layer.worst
    where = f"channel {worst.channel}, at position {worst.position}"
    if layer.offset_bits <= limit:
        return (
            f"Layer {layer.name!r} fits {limit} bits with {limit - layer.offset_bits} to spare; its widest "
            f"is {where}, which spans {worst.span} of {2**limit - 1} steps."
        )
    return (
        f"Layer {layer.name!r} does not fit {limit} bits: it needs {layer.offset_bits}, "
        f"{layer.offset_bits - limit} more, because of {where}, whose accumulator spans {worst.span} steps "
        f"({worst.minimum}..{worst.maximum}) where {limit} bits hold {2**limit - 1}."
    )


def _remedy(network: QuantizedNetwork, number: int, spatial: tuple[int, ...], limit: int) -> str:
    """Try smaller (weight_bits, input_bits) on the float weights, and name the first that fits.

    Those that give up the fewest bits in all come first, and among them those with the most weight bits.
    """
    config, geometry, source = network.config, network.layers[number].geometry, network.source[number]
    weights = {
        bits: round_weight(source.weight, bits, per_channel=config.per_channel).values
        for bits in range(config.weight_bits, 0, -1)
    }
    candidates = product(weights, range(config.input_bits, 1 if config.input_signed else 0, -1))
    tried: list[tuple[int, QuantConfig]] = []
    for weight_bits, input_bits in sorted(candidates, key=lambda bits: (sum(bits), bits), reverse=True):
        smaller = replace(config, weight_bits=weight_bits, input_bits=input_bits)
        inputs = input_quantization(network.calibrated, smaller)
        bits = accumulator_bounds(
            weights[weight_bits],
            geometry,
            spatial,
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
