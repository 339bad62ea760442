"""Circuits that cost too much are refused before Concrete starts, with a change that helps."""

import re
import time
import warnings

import numpy as np
import pytest
import torch

import fheconv
from fheconv.analysis import affordability
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
    """Lookups of many bits: minutes an image."""
    module, images = net
    return quantize(module, images, weight_bits=6, activation_bits=6, input_bits=6)


@pytest.fixture
def no_concrete(monkeypatch):
    """Concrete cannot start."""

    def start():
        raise AssertionError("The worker of the native library was started.")

    monkeypatch.setattr(circuit, "worker", start)


def test_a_dear_circuit_is_refused_at_once_with_a_remedy_that_holds(net, wide, no_concrete):
    limits = fheconv.CompileConfig(most_seconds=20)
    assert wide.forecast().seconds > 20
    started = time.perf_counter()
    with pytest.raises(fheconv.CostError, match="most_seconds") as refused:
        fheconv.compile(wide, limits)
    assert time.perf_counter() - started < 5
    promised = refused.value.remedy
    assert promised in str(refused.value).lower()
    bits = re.search(r"rounding_bits=(\d)", promised)
    p_error = re.search(r"p_error=([\d.e-]+)", promised)
    module, images = net
    changed = quantize(module, images, overflow="defined", rounding_bits=int(bits[1])) if bits else wide
    config = fheconv.CompileConfig(most_seconds=20, p_error=float(p_error[1]) if p_error else None)
    assert changed.forecast(config).seconds < 20


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


def test_a_long_run_is_warned_of_once(wide):
    config = fheconv.CompileConfig(most_seconds=None, most_key_bytes=None)
    assert wide.forecast(config).seconds > 60
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


def test_without_parameters_it_is_refused_even_without_limits(wide, no_concrete, monkeypatch):
    monkeypatch.setattr("fheconv.analysis.forecast.wide_lookup", lambda *arguments: None)
    config = fheconv.CompileConfig(most_seconds=None, most_key_bytes=None)
    assert not wide.forecast(config).possible
    with pytest.raises(fheconv.CostError, match="no parameters"):
        fheconv.compile(wide, config)


@pytest.mark.parametrize("value", [0, -1.0, np.nan, "1", True])
def test_limits_are_positive_numbers(value):
    with pytest.raises(fheconv.InvalidArgumentError, match="most_seconds"):
        fheconv.CompileConfig(most_seconds=value)
