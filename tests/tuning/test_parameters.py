import json
from dataclasses import replace
from functools import cache
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import fheconv
from fheconv.tuning import parameters
from fheconv.tuning.parameters import ParameterChoice, measure, parameter_choices
from tests.support import nets

CONFIG = fheconv.CompileConfig(p_error=0.01)
ONE = fheconv.ParameterRange(glwe_dimensions=(1,), log2_polynomial_sizes=(11,))


@cache
def network():
    """A network with a few lookups of five bits."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 1, 2), nn.ReLU(), nn.Conv2d(1, 1, 2))
    with torch.no_grad():  # some sums on either side of 0, or the lookups would be constants
        module[0].weight[:] = torch.tensor([[1.0, -0.5], [0.25, -0.75]])
    images = np.random.default_rng(0).uniform(0, 1, (8, 1, 3, 3))
    return nets.quantize(module, images, accumulator_bits=5, activation_bits=2)


@cache
def choices():
    small = fheconv.ParameterRange(keyswitch_levels=(1, 2, 3))
    large = fheconv.ParameterRange(glwe_dimensions=(2,), log2_polynomial_sizes=(11,))
    impossible = fheconv.ParameterRange(glwe_dimensions=(1,), log2_polynomial_sizes=(8,))
    with mock.patch.object(parameters, "RANGES", (ONE, small, large, impossible, ONE)):
        return parameter_choices(network(), CONFIG)


def test_the_optimisers_own_choice_comes_first_and_none_beats_another():
    first, *others = choices()
    assert first.config == CONFIG
    assert others, "Keys of one GLWE dimension are smaller than those of fewest operations."
    assert all(choice.config.parameters.glwe_dimensions != (2,) for choice in others)
    assert all(other.complexity > first.complexity for other in others)
    assert not any(a.beaten_by(b) for a in choices() for b in choices())
    assert len({(choice.complexity, choice.key_bytes) for choice in choices()}) == len(choices())


def test_choices_are_what_compiling_with_them_costs():
    for choice in choices():
        cost = fheconv.compile(network(), choice.config).cost
        assert (choice.complexity, choice.key_bytes) == (cost.complexity, cost.key_bytes)
        assert choice.p_error == cost.p_error <= 0.01
        assert choice.seconds is None


def test_interrupting_the_search_leaves_what_was_found():
    circuit = fheconv.compile(network(), CONFIG)
    with mock.patch.object(parameters, "FheCircuit", side_effect=[circuit, KeyboardInterrupt]):
        (choice,) = parameter_choices(network(), CONFIG)
    assert (choice.config, choice.complexity) == (CONFIG, circuit.cost.complexity)


def test_ranges_without_parameters_are_left_out():
    circuit = fheconv.compile(network(), CONFIG)
    failures = [fheconv.CompilationError("NoParametersFound")] * len(parameters.RANGES)
    with mock.patch.object(parameters, "FheCircuit", side_effect=[circuit, *failures]) as compiled:
        (choice,) = parameter_choices(network(), CONFIG)
    assert (choice.config, choice.complexity) == (CONFIG, circuit.cost.complexity)
    assert compiled.call_count == 1 + len(failures)


def test_what_was_chosen_is_not_chosen_again():
    with pytest.raises(fheconv.InvalidArgumentError, match="leaves nothing to choose"):
        parameter_choices(network(), replace(CONFIG, parameters=ONE))


@pytest.mark.slow
def test_measuring_times_every_choice_and_sorts_them():
    timed = measure(network(), choices()[:2], runs=2)
    assert {replace(choice, seconds=None) for choice in timed} == set(choices()[:2])
    seconds = [choice.seconds for choice in timed]
    assert 0 < seconds[0] <= seconds[1]


@pytest.mark.parametrize("before", [2, 3])
def test_interrupting_the_measurement_leaves_what_was_timed(before):
    """Two circuits make keys, and then the `before`-th of the runs is interrupted."""
    runs = [mock.DEFAULT] * (before - 1) + [KeyboardInterrupt]
    with mock.patch.multiple(
        fheconv.FheCircuit,
        keygen=mock.DEFAULT,
        encrypt=mock.DEFAULT,
        run=mock.Mock(side_effect=runs, return_value=None),
    ):
        timed = measure(network(), choices()[:2], runs=3)
    assert len(timed) == min(before - 1, 2)


def test_an_interruption_before_anything_was_timed_is_passed_on():
    with (
        mock.patch.object(fheconv.FheCircuit, "keygen", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        measure(network(), choices()[:1])


@pytest.mark.parametrize("runs", [0, 1.5])
def test_a_number_of_runs_that_is_none_is_refused(runs):
    with pytest.raises(fheconv.InvalidArgumentError, match="runs="):
        measure(network(), choices(), runs=runs)


def test_a_choice_is_beaten_by_what_is_better_in_one_and_worse_in_none():
    base = ParameterChoice(config=CONFIG, complexity=2.0, key_bytes=2, p_error=0.01)
    better = [(1.0, 2), (2.0, 1), (1.0, 1)]
    for complexity in (1.0, 2.0, 3.0):
        for key_bytes in (1, 2, 3):
            other = replace(base, complexity=complexity, key_bytes=key_bytes)
            assert base.beaten_by(other) == ((complexity, key_bytes) in better)


@pytest.mark.slow
def test_a_range_of_parameters_is_kept_to_and_gives_the_clear_integers():
    config = fheconv.CompileConfig(p_error=1e-4, parameters=ONE)
    circuit = fheconv.compile(network(), config)
    circuit.keygen()
    q = nets.integer_images(network(), 0, 1)
    np.testing.assert_array_equal(circuit.accumulate(q, "execute"), network().accumulate(q))


def noise_of_keys(chosen, p_error):
    """Dimension and log2 variance of each evaluation key's encryption, as Concrete compiled them."""
    config = fheconv.CompileConfig(p_error=p_error, parameters=chosen)
    keyset = json.loads(fheconv.compile(network(), config).exported().specs)["keyset"]
    noise = {}
    for bootstrap in keyset["lweBootstrapKeys"]:
        key = bootstrap["params"]
        noise[key["glweDimension"] * key["polynomialSize"]] = np.log2(key["variance"])
        lwe_dimension = key["inputLweDimension"]
    for keyswitch in keyset["lweKeyswitchKeys"]:
        noise[lwe_dimension] = np.log2(keyswitch["params"]["variance"])
    return noise


def test_keys_of_a_range_are_as_secure_as_those_of_the_optimiser():
    """Security rests on a key's noise for its dimension, which for one level is a line in logarithms."""
    free = {}
    for p_error in (0.1, 0.01, 1e-4):
        free |= noise_of_keys(None, p_error)
    small = {dimension: noise for dimension, noise in free.items() if dimension < 1000}
    assert len(small) >= 2
    line = np.polynomial.Polynomial.fit(list(small), list(small.values()), 1)
    for chosen in (ONE, fheconv.ParameterRange(keyswitch_levels=(1, 2, 3))):
        for dimension, noise in noise_of_keys(chosen, 0.01).items():
            assert noise == pytest.approx(line(dimension) if dimension < 1000 else free[dimension], abs=0.01)


@pytest.mark.parametrize(
    ("name", "value"),
    [("glwe_dimensions", 0), ("log2_polynomial_sizes", 1024), ("keyswitch_levels", 1.5)],
)
def test_ranges_that_no_parameters_have_are_refused(name, value):
    with pytest.raises(fheconv.InvalidArgumentError, match=f"{name}={value}"):
        fheconv.ParameterRange(**{name: (value,)})


def test_a_restriction_that_the_worker_could_not_be_given_is_refused():
    from concrete import fhe
    from concrete.compiler import RangeRestriction

    configuration = fhe.Configuration(range_restriction=RangeRestriction())
    with pytest.raises(fheconv.InvalidArgumentError, match=r"use CompileConfig\.parameters"):
        fheconv.CompileConfig(configuration=configuration)
    fheconv.CompileConfig(configuration=configuration, in_process=True)


def test_a_range_of_another_type_is_refused():
    with pytest.raises(fheconv.InvalidArgumentError, match="ParameterRange"):
        fheconv.CompileConfig(parameters={"glwe_dimensions": (1,)})
