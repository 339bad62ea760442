"""Shows the accumulator widths of a network in a terminal, a notebook and JSON."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fheconv.basics.arrays import Shape
from fheconv.basics.errors import AccumulatorOverflowError
from fheconv.basics.report import Report
from fheconv.networks.bounds import twos_complement_bits


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
    lookups cost. The circuit computes the last accumulators in `planes` of `plane_bits` each, from which the
    client adds them up. `channels` is empty for maxima, whose accumulators are differences of two.
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
    planes: int
    plane_bits: int
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
            if layer.planes > 1:
                yield (
                    f"{layer.name}: the circuit computes its accumulators in {layer.planes} planes of "
                    f"{layer.plane_bits} bits, which cost it less; the client adds them up."
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
