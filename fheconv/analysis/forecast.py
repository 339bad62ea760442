"""Tells what a circuit will cost from the integer network alone, before anything is compiled."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from fheconv.analysis.failures import failing_lookups
from fheconv.analysis.parameters import IMAGE, Pair, Parameters, Sum, choose, linear_dimension
from fheconv.analysis.seconds import USUAL, read_times, seconds_of
from fheconv.analysis.sums import SHIFTED, Sums, sums_of
from fheconv.analysis.wide import WIDE_DIMENSION, wide_lookup
from fheconv.basics.compile_config import GLOBAL_P_ERROR, LINEAR_P_ERROR, ROUNDED_P_ERROR, CompileConfig
from fheconv.basics.report import Report
from fheconv.lowering.lower import Lowered, lower
from fheconv.networks.integers import IntegerNetwork, QuantizedLayer

# Microseconds of a multiply-add in a circuit without lookups (`fheconv.lowering.engines`).
MULTIPLY_ADD = 1.2
# The bytes of a ciphertext of each bit of its key.
WORD = 8
# Of lookups that fail unequally, Concrete lets some fail about so many times as often as the mean, at most.
# How often is found by halving.
MOST_UNEVEN, HALVINGS, MOST_PARTITIONS = 1.15, 3, 2


@dataclass(frozen=True, kw_only=True)
class LayerForecast:
    """The forecast of one layer: its `lookups` of `looked_up` bits, and what they cost.

    `bits` is the width that Concrete gives its accumulators, `share` the layer's share of the complexity.
    """

    name: str
    lookups: int
    bits: int
    looked_up: int
    complexity: float
    share: float


@dataclass(frozen=True, kw_only=True, repr=False)
class Forecast(Report):
    """The cost of one encrypted image, before compiling. Made by `QuantizedNetwork.forecast`.

    `complexity` and `key_bytes` are what `compile` will say. `seconds` are those of this machine if lookups
    were timed on it, otherwise those of two usual cores. `memory` is about what the server's process needs:
    keys and encrypted values. `p_error` is the failure probability of the lookup or result that fails most.
    If `possible` is False, Concrete has no parameters for the network, and all costs are infinite. `wide`
    says that lookups are too wide for one bootstrap, and take several each.

    Example:
        >>> import numpy as np
        >>> from fheconv import quantize
        >>> forecast = quantize([[1, -2, 1]], np.arange(16).reshape(1, 4, 4)).forecast()
        >>> forecast.possible, forecast.lookups, forecast.key_bytes
        (True, 0, 0)
    """

    layers: tuple[LayerForecast, ...]
    lookups: int
    complexity: float
    seconds: float
    key_bytes: float
    memory: float
    p_error: float
    possible: bool
    wide: bool

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, ready for JSON. Infinite costs are None."""
        return _plain(asdict(self))

    def __rich__(self) -> RenderableType:
        table = Table(title="Forecast of one encrypted image", title_justify="left", show_header=False)
        if self.possible:
            rows = {
                "lookups": f"{self.lookups:,}",
                "complexity": f"{self.complexity:,.0f}",
                "expected time": f"{self.seconds:.2g} s",
                "evaluation keys": decimal(int(self.key_bytes)),
                "memory": decimal(int(self.memory)),
                "failure probability": f"{self.p_error:.1e} for each "
                + ("lookup" if self.lookups else "result"),
            }
            if self.lookups:
                rows["failing lookups"] = failing_lookups(self.lookups, self.p_error)
        else:
            rows = {
                "lookups": f"{self.lookups:,}",
                "possible": "no: Concrete has no parameters for these widths at "
                f"a failure probability of {self.p_error:.1e}",
            }
        for name, value in rows.items():
            table.add_row(name, value)
        return Group(table, self._layer_table())

    def _layer_table(self) -> Table:
        table = Table(title="Layer by layer", title_justify="left")
        for heading in ("layer", "bits", "looked up", "lookups", "cost"):
            table.add_column(heading, justify="left" if heading == "layer" else "right")
        for layer in self.layers:
            looked_up = f"{layer.looked_up} bits" if layer.looked_up else "–"
            table.add_row(
                Text(layer.name), str(layer.bits), looked_up, f"{layer.lookups:,}", f"{layer.share:.0%}"
            )
        return table


def forecast(network: IntegerNetwork, config: CompileConfig | None = None) -> Forecast:
    """Return the forecast of a network compiled with `config`. `config.configuration` is not looked at."""
    config = CompileConfig() if config is None else config
    return forecast_of(lower(network, config.engine), config)


def forecast_of(lowered: Lowered, config: CompileConfig) -> Forecast:
    """Return the forecast of a circuit's function, as `forecast` does."""
    network, config = lowered.network, completed(lowered.network, config)
    sums = sums_of(lowered)
    p_error = _p_error(sums.lookups, config)
    if sums.lookups:
        price = _price(sums, p_error, config) or _wide_price(lowered, sums, p_error)
    else:
        price = _linear_price(sums, p_error, config)
    if sums.lookups and price.possible:
        seconds = seconds_of(read_times() or USUAL, sums.lookups, price.complexity)
    else:
        seconds = sum(low.multiply_adds for low in lowered.layers) * MULTIPLY_ADD / 10**6
    values = sum(math.prod(shape) for shape in network.shapes)
    layers = zip(lowered.layers, sums.bits, sums.looked_up, price.layers, strict=True)
    return Forecast(
        layers=tuple(
            LayerForecast(
                name=low.name,
                lookups=low.lookups if looked_up else 0,
                bits=bits,
                looked_up=looked_up,
                complexity=complexity,
                share=complexity / (sum(price.layers) or 1.0) if price.possible else 0.0,
            )
            for low, bits, looked_up, complexity in layers
        ),
        lookups=sums.lookups,
        complexity=price.complexity,
        seconds=seconds if price.possible else math.inf,
        key_bytes=price.key_bytes,
        memory=2 * price.key_bytes + values * (price.dimension + 1) * WORD,
        p_error=price.p_error,
        possible=price.possible,
        wide=price.wide,
    )


def allowed(expected: Forecast, config: CompileConfig, share: float = 1.0) -> bool:
    """Return True if a circuit is possible, and costs no more than this share of what `config` allows."""
    limits = ((expected.seconds, config.most_seconds), (expected.key_bytes, config.most_key_bytes))
    return expected.possible and all(most is None or cost <= share * most for cost, most in limits)


def completed(network: IntegerNetwork, config: CompileConfig) -> CompileConfig:
    """Return `config` with the failure probability of rounded lookups, if it leaves that open."""
    chosen = (config.p_error, config.global_p_error, config.configuration)
    tables = (layer.lookup for layer in network.layers if isinstance(layer, QuantizedLayer))
    rounds = any(table is not None and table.dropped_bits for table in tables)
    if rounds and all(one is None for one in chosen):
        return replace(config, p_error=ROUNDED_P_ERROR)
    return config


@dataclass(frozen=True, kw_only=True)
class _Price:
    """Holds what a circuit costs: the complexity of each layer, its keys and their greatest dimension.

    `p_error` is the failure probability of the lookup or result that fails most.
    """

    layers: tuple[float, ...]
    complexity: float
    key_bytes: float
    dimension: int
    p_error: float
    wide: bool = False

    @property
    def possible(self) -> bool:
        return self.complexity < math.inf


def _impossible(sums: Sums, p_error: float) -> _Price:
    layers = tuple(math.inf if bits else 0.0 for bits in sums.looked_up)
    return _Price(layers=layers, complexity=math.inf, key_bytes=math.inf, dimension=0, p_error=p_error)


def _linear_price(sums: Sums, p_error: float, config: CompileConfig) -> _Price:
    """Return the price of a circuit without lookups. Its complexity is the dimension of its key."""
    (result,) = sums.by_layer[-1]
    # Concrete counts the image too, even if no result depends on it.
    read = ((result.bits, result.noise.get(IMAGE, 0.0)), (sums.bits[0], 1.0))
    dimensions = [linear_dimension(bits, noise, p_error, config.security_level) for bits, noise in read]
    if None in dimensions:
        return _impossible(sums, p_error)
    dimension = max(one for one in dimensions if one is not None)
    layers = (0.0,) * len(sums.bits)
    return _Price(
        layers=layers, complexity=float(dimension), key_bytes=0, dimension=dimension, p_error=p_error
    )


def _price(sums: Sums, p_error: float, config: CompileConfig) -> _Price | None:
    """Return the price of a circuit with lookups, None if some are too wide for one bootstrap each."""
    every = [one for layer in sums.by_layer for one in layer]
    chosen = _chosen(every, sums.conversions, p_error, config)
    if chosen is None:
        return None
    costs = _costs(sums, chosen)
    return _Price(
        layers=tuple(costs),
        complexity=sum(costs),
        key_bytes=chosen.key_bytes,
        dimension=max(one.big for one in chosen.partitions),
        p_error=max(chosen.failures(every, config.security_level)),
    )


def _wide_price(lowered: Lowered, sums: Sums, p_error: float) -> _Price:
    """Return the price of a circuit whose lookups take several bootstraps each (see `wide`).

    Concrete has no parameters for them beside narrow lookups. And it cannot take values one by one there: it
    says "Lowering from FHE to TFHE failed".
    """
    greatest = max(sum(one.noise.values()) for layer in sums.by_layer for one in layer)
    found = wide_lookup(max(sums.looked_up), greatest, p_error)
    narrow = any(0 < bits <= SHIFTED for bits in sums.looked_up)
    if found is None or narrow or lowered.gathers():
        return _impossible(sums, p_error)
    each, keys = found
    counts = [sum(one.count for one in layer if one.lookup is not None) for layer in sums.by_layer]
    return _Price(
        layers=tuple(count * each for count in counts),
        complexity=sum(counts) * each,
        key_bytes=keys,
        dimension=WIDE_DIMENSION,
        p_error=p_error,
        wide=True,
    )


def _chosen(
    sums: Sequence[Sum], conversions: Mapping[Pair, int], p_error: float, config: CompileConfig
) -> Parameters | None:
    """Return the parameters that Concrete chooses, None if there are none.

    If only the failure probability of a whole image is given, lookups that fail most may do so more often
    than the even share `p_error`, because others fail less often. This is not looked for with more than
    `MOST_PARTITIONS`, whose choice takes long.
    """
    level = config.security_level
    chosen = choose(sums, conversions, p_error, level, config.parameters)
    if config.p_error is not None or chosen is None or len(chosen.partitions) > MOST_PARTITIONS:
        return chosen
    whole = config.global_p_error or GLOBAL_P_ERROR
    low, high = p_error, MOST_UNEVEN * p_error
    for _ in range(HALVINGS):
        tried = math.sqrt(low * high)
        found = choose(sums, conversions, tried, level, config.parameters)
        odds = () if found is None else found.failures(sums, level)
        failing = sum(one.count * each for one, each in zip(sums, odds, strict=True))
        if found is not None and failing <= whole:
            chosen, low = found, tried
        else:
            high = tried
    return chosen


def _p_error(lookups: int, config: CompileConfig) -> float:
    """Return the failure probability of one lookup, or of one result without lookups."""
    if config.p_error is not None and config.global_p_error is None:
        return config.p_error
    if not lookups:
        return config.global_p_error or LINEAR_P_ERROR
    whole = config.global_p_error or GLOBAL_P_ERROR
    each = -math.expm1(math.log1p(-whole) / lookups)
    return min(each, config.p_error or 1.0)


def _costs(sums: Sums, parameters: Parameters) -> list[float]:
    """Return the complexity of each layer, the conversions of its results included."""
    costs = [
        sum(one.count * parameters.price(one.home, one.lookup) for one in layer if one.lookup is not None)
        for layer in sums.by_layer
    ]
    for pair, count in sums.conversions.items():
        layers = [n for n, layer in enumerate(sums.by_layer) if any(one.lookup == pair[0] for one in layer)]
        for number in layers:
            costs[number] += count * parameters.conversion_price(pair) / len(layers)
    return costs


def _plain(value: Any) -> Any:
    """Return plain data with None for what is infinite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return None if value == math.inf else value
