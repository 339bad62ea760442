from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fheconv import InvalidArgumentError, QuantConfig
from fheconv.basics.config import Method


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight_bits": 0}, "weight_bits=0"),
        ({"weight_bits": 9}, "weight_bits=9 must be an integer from 1 to 8"),
        ({"weight_bits": 4.0}, "weight_bits=4.0"),
        ({"weight_bits": True}, "weight_bits=True"),
        ({"input_bits": 0}, "input_bits=0"),
        ({"input_bits": 17}, "from 1 to 16"),
        ({"input_bits": 1, "input_signed": True}, "from 2 to 16"),
        ({"input_bits": "4"}, "input_bits='4'"),
        ({"input_range": (1.0, 0.0)}, "the smaller first"),
        ({"input_range": (1.0, 1.0)}, "the smaller first"),
        ({"input_range": (0.0, np.inf)}, "finite"),
        ({"input_range": (np.nan, 1.0)}, "finite"),
        ({"input_range": (0, 1, 2)}, "two finite numbers"),
        ({"input_range": 5}, "two finite numbers"),
        ({"input_range": ("a", "b")}, "two finite numbers"),
        ({"weight_bits": None}, "weight_bits=None"),
        ({"weight_bits": {"conv1": 9}}, r"weight_bits\['conv1'\]=9 must be an integer from 1 to 8"),
        ({"activation_bits": 9}, "from 1 to 8"),
        ({"accumulator_bits": 17}, "from 1 to 16"),
        ({"accumulator_bits": {"fc": 0}}, r"accumulator_bits\['fc'\]=0"),
        ({"activation_levels": 1}, "activation_levels=1 must be an integer from 2 to 256"),
        ({"activation_levels": 257}, "from 2 to 256"),
        ({"activation_levels": {"conv1": 5.0}}, r"activation_levels\['conv1'\]=5.0"),
        ({"activation_bits": "auto"}, 'activation_bits="auto" .* give accumulator_bits'),
        ({"input_bits": "auto"}, 'input_bits="auto" .* give accumulator_bits'),
        ({"weight_bits": {"fc": "auto"}, "accumulator_bits": {}}, 'weight_bits="auto"'),
        ({"input_bits": "auto", "rounding_bits": 4, "method": "gptq"}, 'input_bits="auto"'),
        ({"rounding_bits": "auto"}, "rounding_bits='auto' must be an integer"),
        ({"activation_levels": "auto"}, "activation_levels='auto' must be an integer"),
        ({"accumulator_bits": "most"}, "accumulator_bits='most' must be an integer"),
        ({"input_levels": 1}, "input_levels=1 must be an integer from 2 to 65536"),
        ({"input_levels": 2**16 + 1}, "from 2 to 65536"),
        ({"input_levels": 2, "input_signed": True}, "from 3 to 65536"),
        ({"input_levels": {"image": 4}}, "input_levels="),
        ({"rounding_bits": 1}, "from 2 to 8"),
        ({"overflow": "never"}, "one of proved, defined"),
        ({"overflow": None}, "one of proved, defined"),
        ({"method": "adaround"}, "one of auto, minmax, mse, gptq, accumulator"),
        ({"margin": -0.1}, "margin=-0.1"),
        ({"margin": np.inf}, "margin=inf"),
        ({"margin": np.nan}, "margin=nan"),
        ({"margin": "1"}, "margin='1'"),
        ({"margin": True}, "margin=True"),
    ],
)
def test_configurations_without_meaning_are_refused(options, words):
    with pytest.raises(InvalidArgumentError, match=words):
        QuantConfig(**options)


LAYERS = st.sampled_from(["conv1", "a.b", "it's"])


def numbers(greatest, least=1):
    return st.integers(least, greatest) | st.dictionaries(LAYERS, st.integers(least, greatest))


def automatic(greatest):
    number = st.just("auto") | st.integers(1, greatest)
    return number | st.dictionaries(LAYERS, number)


@given(
    st.builds(
        QuantConfig,
        weight_bits=automatic(8),
        activation_bits=st.none() | automatic(8),
        activation_levels=st.none() | numbers(256, 2),
        accumulator_bits=automatic(16).filter(bool),
        rounding_bits=st.none() | numbers(8, 2),
        overflow=st.sampled_from(["proved", "defined"]),
        margin=st.one_of(st.none(), st.floats(0, 9)),
        method=st.sampled_from(get_args(Method)),
        input_bits=st.just("auto") | st.integers(2, 16),
        input_levels=st.none() | st.integers(3, 2**16),
        per_channel=st.booleans(),
        input_signed=st.booleans(),
        input_range=st.none() | st.tuples(st.floats(-9, 0), st.floats(0.5, 9)),
    )
)
def test_a_configuration_shows_the_call_that_makes_it(config):
    assert eval(str(config)) == config


def test_numbers_of_integers_may_be_numpys():
    config = QuantConfig(activation_levels={"conv1": np.int64(5)}, input_levels=np.int32(9))
    assert config == QuantConfig(activation_levels={"conv1": 5}, input_levels=9)
    assert type(config.input_levels) is int


@given(levels=st.integers(2, 256), bits=st.none() | st.integers(1, 8), limit=st.none() | st.integers(1, 16))
def test_levels_take_the_place_of_bits_where_they_are_given(levels, bits, limit):
    config = QuantConfig(
        activation_levels={"a": levels}, activation_bits=bits, accumulator_bits=limit, input_levels=levels
    )
    assert config.activation_levels_of("a") == levels
    without = QuantConfig(activation_bits=bits, accumulator_bits=limit)
    assert config.activation_levels_of("b") == without.activation_levels_of("b")
    assert config.input_ends() == (0, levels - 1)


@given(st.integers(1, 8), st.integers(2, 16), st.booleans())
def test_bits_are_powers_of_two_of_levels(activation_bits, input_bits, signed):
    bits = QuantConfig(activation_bits=activation_bits, input_bits=input_bits, input_signed=signed)
    levels = QuantConfig(
        activation_levels=2**activation_bits, input_levels=2**input_bits, input_signed=signed
    )
    assert bits.activation_levels_of("a") == levels.activation_levels_of("a")
    assert bits.input_ends() == levels.input_ends()


@given(st.integers(3, 2**16))
def test_signed_images_have_zero_in_the_middle(levels):
    low, high = QuantConfig(input_levels=levels, input_signed=True).input_ends()
    assert high - low == levels - 1
    assert low < 0 < high
    assert -low - high in (0, 1)


@pytest.mark.parametrize("limit", [None, 1, 2, 5, 16])
def test_activations_get_half_of_a_narrow_accumulator(limit):
    levels = QuantConfig(accumulator_bits=limit).activation_levels_of("conv")
    assert levels == {None: 16, 1: 2, 2: 2, 5: 4, 16: 16}[limit]


@pytest.mark.parametrize("name", ["weight_bits", "activation_bits", "accumulator_bits"])
@pytest.mark.parametrize("of_layers", [False, True])
def test_a_configuration_knows_what_it_leaves_open(name, of_layers):
    value = {"conv1": "auto", "conv2": 3} if of_layers else "auto"
    config = QuantConfig(**{"accumulator_bits": 5, name: value})
    assert config.is_auto
    assert config.asks(name)
    assert not config.asks("input_bits")
    assert QuantConfig(accumulator_bits=5, input_bits="auto").asks("input_bits")
    assert not QuantConfig(accumulator_bits=5).is_auto
