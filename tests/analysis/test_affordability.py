"""Circuits that cost too much are refused before Concrete starts, with a change that helps."""

import warnings

import numpy as np
import pytest
import torch

import fheconv
from fheconv.analysis import affordability
from fheconv.analysis.advice import applied
from fheconv.analysis.affordability import check_cost
from fheconv.analysis.seconds import compiling_seconds, numbers_of
from fheconv.circuits import circuit
from fheconv.lowering.lower import lower
from tests.support.nets import quantize, random_net


@pytest.fixture(scope="module")
def net():
    return random_net(5, "residual", size=(2, 8, 8))


@pytest.fixture(scope="module")
def wide(net):
    """Lookups of 8 bits: over a minute an image."""
    module, images = net
    return quantize(module, images, weight_bits=6, activation_bits=6, input_bits=6, accumulator_bits=8)


@pytest.fixture(scope="module")
def impossible(net):
    """Lookups of 15 bits, whose values are taken one by one: Concrete cannot do that."""
    module, images = net
    return quantize(module, images, weight_bits=6, activation_bits=6, input_bits=6)


@pytest.fixture
def no_concrete(monkeypatch):
    """Concrete cannot start."""

    def start():
        raise AssertionError("The worker of the native library was started.")

    monkeypatch.setattr(circuit, "worker", start)


def test_a_dear_circuit_is_refused_at_once_with_a_remedy_that_holds(net, wide, no_concrete):
    limits = fheconv.CompileConfig(most_seconds=wide.forecast().seconds / 2)
    with pytest.raises(fheconv.CostError, match="most_seconds") as refused:
        fheconv.compile(wide, limits)
    error, (module, images) = refused.value, net
    assert error.remedy in str(error)
    quant, config = applied(error.settings, wide.config, limits)
    check_cost(lower(fheconv.quantize(module, images, quant)), config)


def test_what_no_change_of_bits_makes_cheap_is_told_where_its_lookups_are(net, no_concrete):
    module, images = net
    cheap = quantize(module, images, overflow="defined", rounding_bits=3)
    config = fheconv.CompileConfig(p_error=0.05, most_seconds=1e-3)
    with pytest.raises(fheconv.CostError) as refused:
        fheconv.compile(cheap, config)
    assert refused.value.remedy is None
    layer = max(cheap.budget().layers, key=lambda layer: layer.lookups)
    assert f"{layer.lookups:,} are in layer {layer.name!r}" in str(refused.value)


def test_a_limit_of_keys_is_kept(wide, no_concrete):
    with pytest.raises(fheconv.CostError, match="most_key_bytes"):
        fheconv.compile(wide, fheconv.CompileConfig(most_seconds=None, most_key_bytes=10**6))


def test_a_long_run_is_warned_of_once(wide, monkeypatch):
    config = fheconv.CompileConfig(most_seconds=None, most_key_bytes=None)
    monkeypatch.setattr(affordability, "LONG_SECONDS", wide.forecast(config).seconds / 2)
    with pytest.warns(fheconv.CostWarning, match="an image") as warned:
        check_cost(lower(wide), config)
    assert len(warned) == 1


def test_long_compiling_is_warned_of_once(net, monkeypatch):
    module, images = net
    lowered = lower(quantize(module, images, overflow="defined", rounding_bits=5))
    monkeypatch.setattr(affordability, "LONG_COMPILING", compiling_seconds(lowered) / 2)
    with pytest.warns(fheconv.CostWarning, match="to compile it") as warned:
        check_cost(lowered, fheconv.CompileConfig(p_error=1e-2))
    assert len(warned) == 1
    numbers, layer = max(zip(numbers_of(lowered), lowered.layers, strict=True), key=lambda one: one[0])
    assert f"{numbers:,} numbers are of layer {layer.name!r}" in str(warned[0].message)


def test_concrete_reads_a_filter_once_and_a_matrix_whole():
    conv = torch.nn.Conv2d(2, 3, 3)
    images = np.random.default_rng(0).uniform(size=(4, 2, 6, 5))
    network = quantize(conv.eval(), images, weight_bits=8)
    outputs = conv(torch.zeros(1, 2, 6, 5)).numel()
    assert numbers_of(lower(network, "conv")) == [conv.weight.numel()]
    assert numbers_of(lower(network, "matrix")) == [images[0].size * outputs]


def test_a_cheap_circuit_is_not_warned_of(net):
    module, images = net
    cheap = quantize(module, images, overflow="defined", rounding_bits=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_cost(lower(cheap), fheconv.CompileConfig(p_error=1e-2))


UNLIMITED = fheconv.CompileConfig(most_seconds=None, most_key_bytes=None)


def test_without_parameters_it_is_refused_even_without_limits(net, impossible, no_concrete):
    assert not impossible.forecast(UNLIMITED).possible
    with pytest.raises(fheconv.CostError, match="no parameters") as refused:
        fheconv.compile(impossible, UNLIMITED)
    error, (module, images) = refused.value, net
    assert error.settings
    quant, config = applied(error.settings, impossible.config, UNLIMITED)
    check_cost(lower(fheconv.quantize(module, images, quant)), config)


def test_a_budget_says_what_has_no_parameters(net, impossible):
    report = impossible.budget()
    assert report.fits
    assert not report.possible
    assert "no parameters" in str(report)
    with pytest.raises(fheconv.CostError, match="no parameters") as refused:
        report.require()
    error, (module, images) = refused.value, net
    assert error.settings == report.settings
    quant, config = applied(error.settings, impossible.config, fheconv.CompileConfig())
    fheconv.compile(fheconv.quantize(module, images, quant), config)


def test_where_no_change_gives_parameters_none_is_promised(impossible, no_concrete, monkeypatch):
    for name in ("choose", "wide_lookup"):
        monkeypatch.setattr(f"fheconv.analysis.forecast.{name}", lambda *arguments: None)
    with pytest.raises(fheconv.CostError, match="Nothing that was tried") as refused:
        fheconv.compile(impossible, UNLIMITED)
    assert (refused.value.remedy, refused.value.settings) == (None, {})
    assert "fewer channels" not in str(refused.value)


def test_a_range_without_parameters_is_dropped_before_anything_is_quantized_in_another_way(wide, no_concrete):
    tiny = fheconv.ParameterRange(log2_polynomial_sizes=(8,), glwe_dimensions=(1,))
    config = fheconv.CompileConfig(most_seconds=None, most_key_bytes=None, parameters=tiny)
    with pytest.raises(fheconv.CostError, match="no parameters") as refused:
        fheconv.compile(wide, config)
    assert refused.value.settings == {"parameters": None}
    with pytest.warns(fheconv.CostWarning):
        check_cost(lower(wide), UNLIMITED)


@pytest.mark.parametrize("value", [0, -1.0, np.nan, "1", True])
def test_limits_are_positive_numbers(value):
    with pytest.raises(fheconv.InvalidArgumentError, match="most_seconds"):
        fheconv.CompileConfig(most_seconds=value)
