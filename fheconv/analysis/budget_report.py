"""Shows the accumulator widths of a network in a terminal, a notebook and JSON."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fheconv.analysis.advice import Advice
from fheconv.basics.arrays import Shape
from fheconv.basics.errors import AccumulatorOverflowError, CostError
from fheconv.basics.report import Report
from fheconv.networks.quantization import twos_complement_bits
from fheconv.quantizer.evidence import PRIOR_IMAGES

_IMPOSSIBLE = "Concrete has no parameters for this network at the usual failure probability."


@dataclass(frozen=True, kw_only=True)
class ChannelBudget:
    """The budget of one output channel.

    `minimum` and `maximum` are its attainable range, `position` is where the maximum is attained, and
    `observed` is the range on the calibration images. `observed` is None if there were none. `window` is the
    range that the table of its lookup holds, None without a lookup. `gain` is the integer by which its
    weights were multiplied to fill the window; all ranges include it.

    Example:
        >>> budget = ChannelBudget(channel=0, minimum=-60, maximum=60, position=(0, 0), observed=None)
        >>> budget.span, budget.offset_bits, budget.twos_complement_bits
        (120, 7, 7)
    """

    channel: int
    minimum: int
    maximum: int
    position: tuple[int, ...]
    observed: tuple[int, int] | None
    window: tuple[int, int] | None = None
    gain: int = 1

    @property
    def span(self) -> int:
        """The maximum minus the minimum, which is the greatest value in offset form."""
        return self.maximum - self.minimum

    @property
    def offset_bits(self) -> int:
        """The channel's width in offset form."""
        return self.span.bit_length()

    @property
    def twos_complement_bits(self) -> int:
        """The channel's width in two's complement, without an offset."""
        return twos_complement_bits(self.minimum, self.maximum)


@dataclass(frozen=True, kw_only=True)
class LayerBudget:
    """The budget of one layer: its kind, its cost, and the widths its accumulators need, by three methods.

    `accumulator_bits` is the width that the circuit gives the accumulators, in offset form. It is
    `offset_bits`, or more where gains fill the window of a rounded lookup. If `proved`, no image exceeds this
    width. Otherwise the window holds what calibration reaches, with a margin (`QuantConfig.overflow`), and
    `risk` bounds the probability that an image like those of calibration reaches further, not counting the
    margin. `offset_bits` is then the width that the worst image would need.

    `lookup_bits` is the width that rounding leaves for a lookup, `table_entries` the size of a lookup table,
    and `cost_share` the layer's share of what all lookups cost. The circuit computes the last accumulators in
    `planes` planes of `plane_bits` bits each, and the client adds them up. `independent_images` counts the
    calibration images by what they tell about the layer's inputs: equal images count once (None: the weights
    were not fitted to images). `channels` is empty for maxima, whose accumulators are differences of two
    values.

    Example:
        >>> import fheconv, numpy as np
        >>> network = fheconv.quantize([[1, -2, 1]], np.arange(16).reshape(1, 4, 4))
        >>> layer = network.budget().layers[0]
        >>> layer.name, layer.taps, layer.offset_bits, layer.proved
        ('conv', 3, 6, True)
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
    independent_images: float | None
    channels: tuple[ChannelBudget, ...] = field(repr=False)

    @property
    def worst(self) -> ChannelBudget:
        """The channel with the widest range."""
        return max(self.channels, key=lambda channel: channel.span)


@dataclass(frozen=True, kw_only=True, repr=False)
class BudgetReport(Report):
    """The proved accumulator widths of a network, compared with a limit.

    The circuit holds accumulators in offset form: it subtracts each channel's minimum inside the convolution.
    So a channel needs bit_length(span) bits, unsigned, and no bias widens it. `accumulator_bits` is the width
    that the network needs, and `limit` the width it was compared with (None if there was no limit).
    `possible` is False if Concrete has no parameters for the network at the usual failure probability.
    `remedy` says what to change if it does not fit or is not possible. `settings` are the fields of
    `QuantConfig` and `CompileConfig` that the remedy sets, empty if nothing was found that works.

    Example:
        >>> import numpy as np
        >>> from fheconv import quantize
        >>> image = np.arange(9).reshape(1, 1, 3, 3)
        >>> network = quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), image)
        >>> report = network.budget(8)
        >>> report.accumulator_bits, report.limit, report.fits
        (6, 8, True)
    """

    layers: tuple[LayerBudget, ...]
    limit: int | None
    possible: bool
    # They find what to change (None: nothing), and what proves all windows. That quantizes several times, so
    # they are called only if somebody asks.
    advising: Callable[[], Advice] | None = field(repr=False, compare=False)
    proving: Callable[[], Advice] = field(repr=False, compare=False)

    @cached_property
    def _advice(self) -> Advice:
        return Advice(words="") if self.advising is None else self.advising()

    @property
    def remedy(self) -> str | None:
        """The change that is advised if the network does not fit or is not possible, otherwise None."""
        return self._advice.words or None

    @property
    def settings(self) -> Mapping[str, Any]:
        """The fields of `QuantConfig` and `CompileConfig` that the remedy sets."""
        return self._advice.settings

    @property
    def accumulator_bits(self) -> int:
        """The width of the widest accumulator, in offset form."""
        return max(layer.accumulator_bits for layer in self.layers)

    @property
    def lookups(self) -> int:
        """The number of lookups for one image."""
        return sum(layer.lookups for layer in self.layers)

    @property
    def proved(self) -> bool:
        """True if no image leaves the window of a lookup. Otherwise some hold what calibration reaches."""
        return all(layer.proved for layer in self.layers)

    @property
    def fits(self) -> bool:
        """True if every accumulator fits the limit, or if there is no limit."""
        return self.limit is None or self.accumulator_bits <= self.limit

    def require(self, *, proved: bool = False) -> "BudgetReport":
        """Return the report itself, or raise `AccumulatorOverflowError` if something does not fit.

        With `proved`, also raise it if an image could leave the window of a lookup. Raises `CostError` if
        Concrete has no parameters for the network at the usual failure probability.
        """
        open_ended = [layer for layer in self.layers if not layer.proved]
        if proved and open_ended:
            unproved = AccumulatorOverflowError(
                f"Layer {open_ended[0].name!r} has windows that hold what calibration reaches, not what the "
                "worst image needs.",
                layer=open_ended[0].name,
            )
            raise self.proving().after(unproved)
        if self.fits and not self.possible:
            raise (self.proving() if proved else self._advice).after(CostError(_IMPOSSIBLE))
        if self.fits or self.limit is None:
            return self
        layer = max((one for one in self.layers if one.channels), key=lambda one: one.accumulator_bits)
        wide = AccumulatorOverflowError(
            _verdict(layer, self.limit),
            layer=layer.name,
            channel=layer.worst.channel,
            value=layer.worst.span,
            limit=2**self.limit - 1,
        )
        told = self._advice.after(wide)
        told.remedy = self.remedy  # in the words of the report: it may say to allow more bits
        raise told

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, ready for JSON."""
        return {
            "fits": self.fits,
            "accumulator_bits": self.accumulator_bits,
            "limit": self.limit,
            "possible": self.possible,
            "remedy": self.remedy,
            "settings": dict(self.settings),
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
                f"{layer.accumulator_bits} {'proved' if layer.proved else 'window'}",
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
                    f"{layer.name}: windows of {layer.accumulator_bits} bits hold what calibration reaches; "
                    f"the worst image needs {layer.offset_bits}. Up to {layer.risk:.1%} of images like those "
                    "of calibration reach further. Outside a window, in the circuit as in clear, the table "
                    "is mirrored: a little outside activations are right, far outside they are not."
                )
            over = self.limit is not None and layer.accumulator_bits > self.limit
            if self.limit is not None and layer.channels and (over or len(self.layers) == 1):
                yield _verdict(layer, self.limit)
        poor = [
            f"{layer.name} {layer.independent_images:.1f}"
            for layer in self.layers
            if layer.independent_images is not None and layer.independent_images < PRIOR_IMAGES
        ]
        if poor:
            yield (
                "Calibration was poor: it told these layers as much as so few independent images do: "
                f"{', '.join(poor)}. Below {PRIOR_IMAGES}, weights are rounded mostly for inputs of any "
                "kind; calibrate on more images, or on images that differ more."
            )
        if not self.possible:
            yield _IMPOSSIBLE
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
