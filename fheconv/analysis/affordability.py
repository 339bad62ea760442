"""Refuses circuits that cost too much before Concrete starts, and says what would bring the cost down."""

from collections.abc import Iterator
from dataclasses import replace

from rich.filesize import decimal

from fheconv.analysis.forecast import Forecast, forecast_of
from fheconv.analysis.seconds import compiling_seconds, numbers_of
from fheconv.basics.arrays import frozen
from fheconv.basics.compile_config import CompileConfig
from fheconv.basics.errors import CostError
from fheconv.basics.warning import CostWarning, warn
from fheconv.lowering.lower import Lowered
from fheconv.networks.floats import Maximum
from fheconv.networks.integers import IntegerNetwork, Lookup, QuantizedLayer

# Above these, a user is warned: seconds of an image, bytes of keys, seconds of compiling.
LONG_SECONDS, LARGE_KEYS, LONG_COMPILING = 60.0, 2 * 10**9, 30.0
# The remedies that are tried: the width to which accumulators are rounded (None: as they are), and the
# failure probability of a lookup (None: as it was). Those that change least come first.
REMEDIES: tuple[tuple[int | None, float | None], ...] = (
    (None, 1e-3), (None, 1e-2), (6, None), (6, 1e-2), (5, None), (5, 1e-2), (4, 1e-2), (3, 1e-2)
)  # fmt: skip


def check_cost(lowered: Lowered, config: CompileConfig) -> None:
    """Warn of a dear circuit (`CostWarning`), or raise `CostError` for one that is dearer than allowed.

    A `CompileConfig.configuration` is not understood here, and a circuit with one is not checked. Neither are
    the widths of a network without lookups, which the compiler refuses in its own words.
    """
    if config.configuration is not None:
        return
    expected = forecast_of(lowered, config)
    if not expected.possible and not expected.lookups:
        return
    if expected.possible and _within(expected, config):
        sentences = []
        if expected.seconds > LONG_SECONDS or expected.key_bytes > LARGE_KEYS:
            sentences += [f"This circuit will take {_costs(expected)}.", _advice(lowered, config)[0]]
        if (seconds := compiling_seconds(lowered)) > LONG_COMPILING:
            numbers, layer = max(
                zip(numbers_of(lowered), lowered.layers, strict=True), key=lambda one: one[0]
            )
            sentences.append(
                f"Concrete will take about {_long(seconds)} to compile it. Of what it reads, {numbers:,} "
                f"numbers are of layer {layer.name!r}: fewer channels or smaller images before it help."
            )
        if sentences:
            warn(" ".join(sentences), CostWarning)
        return
    advice, remedy = _advice(lowered, config)
    if not expected.possible:
        widest = max(expected.layers, key=lambda layer: layer.looked_up)
        raise CostError(
            f"Concrete has no parameters for this network: the lookups of layer {widest.name!r} have "
            f"{widest.looked_up} bits, and may fail with a probability of {expected.p_error:.1e}. {advice}",
            remedy=remedy,
        )
    raise CostError(
        f"This circuit would take {_costs(expected)}; allowed are {config.most_seconds} s and "
        f"{config.most_key_bytes} bytes (CompileConfig.most_seconds and most_key_bytes). {advice}",
        remedy=remedy,
    )


def _within(expected: Forecast, config: CompileConfig) -> bool:
    seconds, keys = config.most_seconds, config.most_key_bytes
    return (seconds is None or expected.seconds <= seconds) and (keys is None or expected.key_bytes <= keys)


def _costs(expected: Forecast) -> str:
    """Return seconds and bytes of keys in words."""
    return f"{_long(expected.seconds)} an image and {decimal(int(expected.key_bytes))} of keys"


def _long(seconds: float) -> str:
    """Return seconds in words."""
    unit = "s"
    for size, longer in ((60, "minutes"), (60, "hours"), (24, "days")):
        if seconds < 2 * size:
            break
        seconds, unit = seconds / size, longer
    return f"{seconds:.2g} {unit}"


def _advice(lowered: Lowered, config: CompileConfig) -> tuple[str, str | None]:
    """Return a sentence with the least change that makes the circuit cheap, and that change alone.

    Each change is tried: its cost is forecast for this network with its lookups rounded. If none makes it
    cheap, take the one that helps most, if it halves the cost.
    """
    as_it_is = best = forecast_of(lowered, config)
    seconds = min(LONG_SECONDS, config.most_seconds or LONG_SECONDS)
    keys = min(LARGE_KEYS, config.most_key_bytes or LARGE_KEYS)
    remedy = None
    for bits, p_error in _changes(lowered.network, config):
        changed = config if p_error is None else replace(config, p_error=p_error, global_p_error=None)
        tried = forecast_of(lowered if bits is None else _rounded(lowered, bits), changed)
        cheap = tried.seconds <= seconds and tried.key_bytes <= keys
        if cheap or tried.seconds < min(best.seconds, as_it_is.seconds / 2):
            words = [] if bits is None else [f'quantize with overflow="defined" and rounding_bits={bits}']
            words += [] if p_error is None else [f"compile with p_error={p_error:g}"]
            best, remedy = tried, " and ".join(words)
        if cheap:
            break
    sentences = []
    if remedy is not None:
        sentences.append(f"{remedy[0].upper()}{remedy[1:]}: then it is forecast to take {_costs(best)}.")
    if best.seconds > seconds:
        layer = max(best.layers, key=lambda layer: layer.lookups)
        sentences.append(
            f"Of its {best.lookups:,} lookups, {layer.lookups:,} are in layer {layer.name!r}: fewer "
            "channels, a stride or smaller images there bring it down."
        )
    return " ".join(sentences), remedy


def _changes(network: IntegerNetwork, config: CompileConfig) -> Iterator[tuple[int | None, float | None]]:
    """Yield the remedies that change something."""
    widest = max((t.column_bits for layer in network.layers if (t := _table(layer)) is not None), default=0)
    for bits, p_error in REMEDIES:
        asked = config.p_error or config.global_p_error or 0.0
        if (bits is None or bits < widest) and (p_error is None or p_error > asked):
            yield bits, p_error


def _table(layer: object) -> Lookup | None:
    return layer.lookup if isinstance(layer, QuantizedLayer) else None


def _rounded(lowered: Lowered, bits: int) -> Lowered:
    """Return the circuit with its accumulators rounded to `bits` bits before lookups, to tell its cost."""
    layers = []
    for layer in lowered.network.layers:
        table = _table(layer)
        if isinstance(layer, QuantizedLayer) and table is not None and table.column_bits > bits:
            more = table.column_bits - bits
            rounded = replace(
                table,
                tables=frozen(table.tables[:, :: 1 << more]),
                dropped_bits=table.dropped_bits + more,
            )
            layer = replace(layer, lookup=rounded)
        layers.append(layer)
    described = (
        low if isinstance(layer, Maximum) else replace(low, lookup_bits=min(low.lookup_bits, bits))
        for layer, low in zip(layers, lowered.layers, strict=True)
    )
    network = replace(lowered.network, layers=tuple(layers))
    return replace(lowered, network=network, layers=tuple(described))
