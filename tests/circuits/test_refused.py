"""What a refusal of the compiler advises was compiled, and compiles again."""

from dataclasses import replace

import numpy as np
import pytest

import fheconv
from fheconv import CompileConfig, QuantConfig
from fheconv.analysis.advice import applied
from fheconv.circuits.native.protocol import Refused
from fheconv.circuits.refused import compiled

WEIGHT = np.random.default_rng(0).normal(size=(2, 8, 3, 3))
IMAGES = np.random.default_rng(1).random((2, 8, 6, 6))


def linear(**options):
    return fheconv.quantize(WEIGHT, IMAGES, QuantConfig(**options))


def by_filter(network, config):
    return fheconv.compile(network, config)


def by_tiles(network, config):
    return fheconv.compile_tiled(network, 2, config)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("make", [by_filter, by_tiles])
@pytest.mark.parametrize(
    ("options", "lanes"),
    [({"weight_bits": 8, "input_bits": 16}, 2), ({"weight_bits": 8, "input_bits": 8}, 3), ({}, 64)],
    ids=["one lane only", "two lanes", "as many as users may ask for"],
)
def test_the_lanes_that_are_advised_compile_and_one_more_does_not(make, options, lanes):
    network, config = linear(**options), CompileConfig(lanes=lanes)
    with pytest.raises(fheconv.AccumulatorOverflowError) as refused:
        make(network, config)
    error = refused.value
    assert set(error.settings) == {"lanes"}
    assert error.settings["lanes"] < lanes
    assert error.remedy in str(error)
    make(network, replace(config, **error.settings))
    with pytest.raises((fheconv.AccumulatorOverflowError, fheconv.CompilationError)):
        make(network, replace(config, lanes=error.settings["lanes"] + 1))


@pytest.mark.parametrize("needed", ["lanes", "p_error", "weight_bits"])
def test_what_is_advised_is_what_was_compiled(needed):
    """A compiler that only takes narrow networks, one lane, or a large failure probability."""
    asked = CompileConfig(lanes=4, p_error=1e-12)

    def make(network, config):
        takes = {
            "lanes": config.lanes <= 2,
            "p_error": config.p_error > 1e-10,
            "weight_bits": network.config.weight_bits <= 2,
        }
        if not takes[needed]:
            raise Refused("Concrete refuses.")
        return network, config

    with pytest.raises(fheconv.CompilationError, match=r"Concrete refuses\. .* This was tried") as refused:
        compiled(make, linear(), asked)
    error = refused.value
    assert type(error) is fheconv.CompilationError
    assert needed in error.settings
    quant, config = applied(error.settings, QuantConfig(), asked)
    network = fheconv.quantize(WEIGHT, IMAGES, quant)
    assert make(network, config) == (network, config)


def test_where_nothing_compiles_no_settings_are_named():
    def never(network, config):
        raise Refused("Concrete refuses.")

    with pytest.raises(fheconv.CompilationError, match="None of the other settings") as refused:
        compiled(never, linear(weight_bits=2, input_bits=2), CompileConfig())
    assert (refused.value.remedy, refused.value.settings) == (None, {})


def test_what_ends_otherwise_is_not_tried_again():
    """A limit that was exceeded, or a worker that died, says nothing about the settings."""
    tries = []

    def slow(network, config):
        tries.append(config)
        raise fheconv.CompilationError("It took too long.")

    with pytest.raises(fheconv.CompilationError, match=r"^It took too long\.$"):
        compiled(slow, linear(), CompileConfig(lanes=4))
    assert len(tries) == 1
