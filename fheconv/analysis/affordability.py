"""Refuses circuits that cost too much before Concrete starts, and says what would bring the cost down."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import takewhile
from time import monotonic
from typing import Any

from rich.filesize import decimal

from fheconv.analysis.advice import Advice, applied, difference, sentence
from fheconv.analysis.forecast import Forecast, allowed, forecast_of
from fheconv.analysis.seconds import compiling_seconds, numbers_of
from fheconv.analysis.trials import MOST_SECONDS, narrower, requantized
from fheconv.basics.arrays import frozen
from fheconv.basics.compile_config import CompileConfig
from fheconv.basics.config import QuantConfig
from fheconv.basics.errors import CostError, FheConvError
from fheconv.basics.warning import CostWarning, warn
from fheconv.lowering.lower import Lowered, lower
from fheconv.networks.floats import Maximum
from fheconv.networks.integers import Lookup, QuantizedLayer

# Above these, a user is warned: seconds of an image, bytes of keys, seconds of compiling.
LONG_SECONDS, LARGE_KEYS, LONG_COMPILING = 60.0, 2 * 10**9, 30.0
# Under given keys, a circuit may take so many times the time that it takes under its own.
MUCH_LONGER = 2.0
# What is tried in a network with lookups: the width to which accumulators are rounded (None: as they are),
# and the failure probability of a lookup (None: as it was). Those that change least come first.
REMEDIES: tuple[tuple[int | None, float | None], ...] = (
    (None, 1e-3), (None, 1e-2), (6, None), (6, 1e-2), (5, None), (5, 1e-2), (4, 1e-2), (3, 1e-2)
)  # fmt: skip
# The width to which accumulators are rounded where values get fewer bits too.
CHEAP = 5
# What is quantized in another way may cost this share of what is allowed, and must keep this share of the
# lookups. It is tried on images that stand in for the user's. With those it can cost a little more, because
# parameters come in steps.
SHARE = 3 / 4
# In a network without, the failure probability of a result.
LINEAR_P_ERRORS = (1e-15, 1e-12, 1e-9, 1e-6)


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
    if allowed(expected, config):
        sentences = []
        if expected.seconds > LONG_SECONDS or expected.key_bytes > LARGE_KEYS:
            words = advice_for(lowered, config, expected, quantizing=False).words
            sentences.append(f"This circuit will take {_costs(expected)}. {words}".rstrip())
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
    if not expected.possible:
        widest = max(expected.layers, key=lambda layer: layer.looked_up)
        what = (
            f"Concrete has no parameters for this network: the lookups of layer {widest.name!r} have "
            f"{widest.looked_up} bits, and may fail with a probability of {expected.p_error:.1e}."
        )
    else:
        what = (
            f"This circuit would take {_costs(expected)}; allowed are {config.most_seconds} s and "
            f"{config.most_key_bytes} bytes (CompileConfig.most_seconds and most_key_bytes)."
        )
    raise advice_for(lowered, config, expected).after(CostError(what))


def check_cost_within(lowered: Lowered, config: CompileConfig, complexity: float) -> None:
    """Check the cost of a circuit that was compiled for given keys, with that complexity.

    Warns (`CostWarning`) if it takes more than `MUCH_LONGER` times the time that it takes under keys of its
    own. Raises `CostError` if it takes longer than `CompileConfig.most_seconds`.
    """
    if config.configuration is not None:
        return
    own = forecast_of(lowered, config)
    if not own.possible or not own.lookups:
        return
    times = complexity / own.complexity
    seconds = times * own.seconds
    if config.most_seconds is not None and seconds > config.most_seconds:
        raise CostError(
            f"Under the given keys this circuit would take {_long(seconds)} an image; allowed are "
            f"{config.most_seconds} s (CompileConfig.most_seconds). Under keys of its own it would take "
            f"{_long(own.seconds)}: compile it without keys_of=."
        )
    if times > MUCH_LONGER:
        warn(
            f"Under the given keys this circuit takes {times:.1f} times as long as under keys of its own, "
            f"{_long(seconds)} an image by the forecast; compile it without keys_of= if that matters more.",
            CostWarning,
        )


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


def advice_for(
    lowered: Lowered, config: CompileConfig, as_it_is: Forecast, *, quantizing: bool = True
) -> Advice:
    """Return the least change that makes a circuit cheap, or else the one that helps most.

    `as_it_is` is the circuit's own forecast. A change counts if the circuit is then allowed. It must halve
    the seconds of one that is allowed already. With `quantizing`, what is to be quantized in another way is
    tried. Otherwise its cost is an estimate.
    """
    best = as_it_is
    least, chosen = as_it_is.seconds / 2 if allowed(as_it_is, config) else float("inf"), dict[str, Any]()

    def helps(tried: Forecast) -> bool:
        return allowed(tried, config) and (_cheap(tried, config) or tried.seconds < least)

    end = monotonic() + MOST_SECONDS
    for settings in takewhile(lambda _: monotonic() < end, _changes(lowered, config, as_it_is.possible)):
        tried = _tried(lowered, config, settings, helps, quantizing=quantizing)
        if tried is None:
            continue
        best, chosen, least = tried, settings, tried.seconds
        if _cheap(tried, config):
            break
    words = []
    if chosen:
        same = applied(chosen, lowered.network.config, config)[0] == lowered.network.config
        verb = "it is forecast to" if same or quantizing else "by an estimate it will"
        words.append(f"{sentence(chosen)[:-1]}: then {verb} take {_costs(best)}.")
    elif not as_it_is.possible:
        words.append(
            "Nothing that was tried gives it parameters; fewer bits in a lookup need larger ones less."
        )
    if best.possible and best.lookups and best.seconds > _most_seconds(config):
        layer = max(best.layers, key=lambda layer: layer.lookups)
        words.append(
            f"Of its {best.lookups:,} lookups, {layer.lookups:,} are in layer {layer.name!r}: fewer "
            "channels, a stride or smaller images there bring it down."
        )
    return Advice(words=" ".join(words), settings=chosen)


def _most_seconds(config: CompileConfig) -> float:
    return min(LONG_SECONDS, config.most_seconds or LONG_SECONDS)


def _cheap(expected: Forecast, config: CompileConfig) -> bool:
    keys = min(LARGE_KEYS, config.most_key_bytes or LARGE_KEYS)
    return expected.seconds <= _most_seconds(config) and expected.key_bytes <= keys


def _changes(lowered: Lowered, config: CompileConfig, possible: bool) -> Iterator[dict[str, Any]]:
    """Yield the settings to try, those that change least first. `possible`: the circuit has parameters."""
    network = lowered.network
    if config.parameters is not None:
        yield {"parameters": None}
    if config.engine != "matrix" and not possible:
        yield {"engine": "matrix"}  # of the engines, only this one does for the widest lookups
    asked = max(config.p_error or 0.0, config.global_p_error or 0.0)
    other = {} if config.global_p_error is None else {"global_p_error": None}
    if not lowered.lookups:
        yield from ({"p_error": p_error, **other} for p_error in LINEAR_P_ERRORS if p_error > asked)
        yield from (difference(network.config, smaller) for smaller in narrower(network.config))
        return
    widest = max((t.column_bits for layer in network.layers if (t := _table(layer)) is not None), default=0)
    for bits, p_error in REMEDIES:
        if (bits is None or bits < widest) and (p_error is None or p_error > asked):
            rounding = {} if bits is None else rounded(network.config, bits)
            yield {**rounding, **({} if p_error is None else {"p_error": p_error, **other})}
    if not possible:  # maxima look up differences, which no rounding makes narrow
        start = replace(network.config, **rounded(network.config, CHEAP))
        yield from (difference(network.config, smaller) for smaller in narrower(start))


def rounded(config: QuantConfig, bits: int) -> dict[str, Any]:
    """Return the settings that round accumulators to `bits` bits, in windows as wide as needed."""
    wide = {} if config.accumulator_bits is None else {"accumulator_bits": None}
    return {"overflow": "defined", "rounding_bits": bits, **wide}


def _tried(
    lowered: Lowered,
    config: CompileConfig,
    settings: Mapping[str, Any],
    helps: Callable[[Forecast], bool],
    *,
    quantizing: bool,
) -> Forecast | None:
    """Return the forecast with other settings if it helps, None otherwise.

    Quantizing takes long. So what does not help by an estimate is not quantized. The estimate also counts
    where stand-ins leave lookups constant, which those of the user's images need not be.
    """
    quant, compiling = applied(settings, lowered.network.config, config)
    estimate = None
    if "rounding_bits" in settings and "activation_bits" not in settings:
        estimate = forecast_of(_rounded(lowered, settings["rounding_bits"]), compiling)
        if not helps(estimate) or not quantizing:
            return estimate if helps(estimate) else None
    try:
        same = quant == lowered.network.config
        network = lowered.network if same else requantized(lowered.network, quant)
        expected = forecast_of(lower(network, compiling.engine), compiling)
    except (FheConvError, MemoryError):
        return None
    if not same and expected.lookups < SHARE * lowered.lookups:
        if estimate is None:
            return None
        expected = estimate
    certain = same or (not expected.wide and allowed(expected, compiling, SHARE))  # see `Trials.works`
    return expected if certain and helps(expected) else None


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
