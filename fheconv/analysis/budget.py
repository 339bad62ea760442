"""Compares the proved bounds of a network's accumulators with a given width."""

import math
from functools import partial

import numpy as np

from fheconv.analysis.affordability import advice_for
from fheconv.analysis.budget_report import BudgetReport, ChannelBudget, LayerBudget
from fheconv.analysis.forecast import forecast_of
from fheconv.analysis.remedy import remedy_for, remedy_for_proof
from fheconv.basics.checks import check_integer
from fheconv.basics.compile_config import CompileConfig
from fheconv.lowering.layers import LoweredLayer
from fheconv.lowering.lower import lower
from fheconv.networks.bounds import layer_bounds, without_bias
from fheconv.networks.floats import Maximum
from fheconv.networks.integers import IntegerNetwork


def report(network: IntegerNetwork, limit: int | None = None) -> BudgetReport:
    """Return the budget of a network, with a remedy if it does not fit `limit` bits or has no parameters.

    Raises `InvalidArgumentError` for a limit that is not a positive integer.
    """
    if limit is not None:
        check_integer("accumulator_bits", limit, 1)
        limit = int(limit)
    lowered = lower(network)
    config = CompileConfig()
    expected = forecast_of(lowered, config)
    shares = [layer.share for layer in expected.layers]
    layers = tuple(
        _layer(network, number, low, share)
        for number, (low, share) in enumerate(zip(lowered.layers, shares, strict=True))
    )
    advising = None
    if limit is not None and any(layer.accumulator_bits > limit for layer in layers):
        advising = partial(remedy_for, network, limit, _widest)
    elif not expected.possible:
        advising = partial(advice_for, lowered, config, expected)
    return BudgetReport(
        layers=layers,
        limit=limit,
        possible=expected.possible,
        advising=advising,
        proving=partial(remedy_for_proof, network, limit, _widest),
    )


def _widest(network: IntegerNetwork) -> int:
    """Return the width of the widest accumulator."""
    lowered = lower(network)
    return max(_layer(network, n, low, 0.0).accumulator_bits for n, low in enumerate(lowered.layers))


def _layer(network: IntegerNetwork, number: int, lowered: LoweredLayer, share: float) -> LayerBudget:
    """Return the budget of one layer. Its lookups cost `share` of what all lookups cost."""
    layer = network.layers[number]
    if isinstance(layer, Maximum):
        return _maximum(network, layer, lowered, share)
    observed = network.observed[number]
    # The client adds the bias. So a bias that differs within a channel does not widen the accumulators.
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
            window=None if layer.lookup is None else layer.lookup.window(c),
            gain=int(np.broadcast_to(layer.gain, layer.shape)[c].flat[0]),
        )
        for c in range(layer.shape[0])
    )
    widths = [(c.observed[1] - c.observed[0]).bit_length() for c in channels if c.observed is not None]
    table = layer.lookup
    return LayerBudget(
        name=layer.name,
        kind=network.source.layers[number].kind,
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
        lookup_bits=None if table is None else table.column_bits,
        table_entries=0 if table is None else table.tables.shape[1],
        cost_share=share,
        planes=lowered.planes,
        plane_bits=lowered.plane_bits,
        independent_images=network.evidence[number],
        channels=channels,
    )


def _maximum(network: IntegerNetwork, layer: Maximum, lowered: LoweredLayer, share: float) -> LayerBudget:
    """Return the budget of maxima, whose accumulators are differences of two values."""
    return LayerBudget(
        name=layer.name,
        kind=layer.kind,
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
        planes=lowered.planes,
        plane_bits=lowered.plane_bits,
        independent_images=None,
        channels=(),
    )


def _risk(channels: int, images: int) -> float:
    """Return an upper bound of the probability that a similar image leaves some channel's observed range.

    Of n + 1 exchangeable images, each is equally likely to hold the greatest accumulator of a channel, and
    equally likely to hold the least.
    """
    return min(2 * channels / (images + 1), 1.0)
