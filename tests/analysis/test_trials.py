"""Each remedy for accumulators that do not fit works: it leads to a circuit, not to another error."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import fheconv
from fheconv import QuantConfig
from fheconv.analysis.trials import tried

LIMITS = (1, 2, 4, 8)


def network(kind):
    torch.manual_seed(0)
    if kind == "maxima":
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3))
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 2), nn.ReLU())


def images():
    return torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def changed(config, remedy):
    """The configuration with what a remedy names, as a user would type it."""
    return replace(config, **eval(f"dict({remedy.replace(' and ', ', ')})"))


def named(remedy):
    """The configuration that a remedy names, as a user would paste it."""
    return eval(re.search(r"QuantConfig\((?:[^()]|\([^()]*\))*\)", remedy)[0], {"QuantConfig": QuantConfig})


# Configurations that no network of these can keep to. Each is refused for another reason.
REFUSED = {
    "no lookup is as wide": QuantConfig(weight_bits=8, input_bits=12, method="gptq"),
    "no lookup is as wide, rounded": QuantConfig(
        weight_bits=8, input_bits=10, method="gptq", rounding_bits=8, input_signed=True
    ),
    "wide images": QuantConfig(weight_bits=2, input_bits=8, activation_bits=8, accumulator_bits=4),
    "wide images, another method": QuantConfig(input_bits=8, accumulator_bits=4, method="mse"),
    "wide activations": QuantConfig(
        input_bits=2, activation_bits=8, accumulator_bits=8, rounding_bits=2, method="mse"
    ),
    "the whole tensor has one scale": QuantConfig(accumulator_bits=4, method="minmax", per_channel=False),
    "windows without proof": QuantConfig(
        weight_bits=2, activation_bits=4, accumulator_bits=4, overflow="defined", method="minmax"
    ),
    "wide windows without proof": QuantConfig(
        weight_bits=8, input_bits=12, activation_bits=8, overflow="defined", method="mse"
    ),
    "rounded windows without proof": QuantConfig(
        weight_bits=6, accumulator_bits=3, rounding_bits=5, overflow="defined", method="accumulator"
    ),
    "one layer": QuantConfig(input_bits=6, accumulator_bits={"0": 4}, method="gptq"),
    "chosen widths": QuantConfig(accumulator_bits=3, activation_bits="auto", input_bits=4),
}


@pytest.mark.sampled(9)
@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("kind", ["maxima", "convolutions"])
def test_the_remedy_of_a_refusal_is_accepted_at_the_first_time(kind, case):
    config, module = REFUSED[case], network(kind)
    with pytest.raises(fheconv.AccumulatorOverflowError) as refused:
        fheconv.quantize(module, images(), config)
    error = refused.value
    assert error.remedy in str(error)
    assert error.value > error.limit
    advised = changed(config, error.remedy)
    assert fheconv.quantize(module, images(), advised).forecast().possible


GIVEN = {
    "usual": QuantConfig(),
    "wide images": QuantConfig(input_bits=9),
    "wide activations": QuantConfig(activation_bits=8, input_bits=2, rounding_bits=5),
    "windows without proof": QuantConfig(overflow="defined", rounding_bits=5),
    "signed images, one scale": QuantConfig(input_signed=True, method="mse", per_channel=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", GIVEN)
@pytest.mark.parametrize("kind", ["maxima", "convolutions"])
def test_the_remedy_of_a_budget_fits_it_and_has_parameters(kind, case):
    module = network(kind)
    quantized = fheconv.quantize(module, images(), GIVEN[case])
    for limit in LIMITS:
        report = quantized.budget(limit)
        if report.fits:
            assert report.remedy is None
            continue
        allowed = re.search(r"Allow (\d+), and", report.remedy)
        # Maxima look up a difference, which takes one bit more than its values. Signed images take two bits.
        assert bool(allowed) == (limit == 1 and (kind == "maxima" or GIVEN[case].input_signed))
        better = fheconv.quantize(module, images(), named(report.remedy))
        assert better.budget(int(allowed[1]) if allowed else limit).require().fits
        assert better.forecast().possible


def test_concrete_compiles_what_a_remedy_advises():
    """What the forecast takes, Concrete takes too."""
    config = REFUSED["the whole tensor has one scale"]
    with pytest.raises(fheconv.AccumulatorOverflowError) as refused:
        fheconv.quantize(network("convolutions"), images(), config)
    advised = fheconv.quantize(network("convolutions"), images(), changed(config, refused.value.remedy))
    circuit = fheconv.compile(advised)
    assert circuit.cost.accumulator_bits <= 4


@pytest.mark.parametrize("kind", [MemoryError, fheconv.CalibrationError, None])
@pytest.mark.parametrize("width", [3, None, {"conv": 3}])
def test_where_nothing_that_is_tried_works_no_numbers_are_promised(kind, width):
    error = fheconv.AccumulatorOverflowError(
        "Layer 'conv' spans 9.", layer="conv", channel=1, value=9, limit=7
    )

    def never(config):
        raise error if kind is None else kind("It does not work.")

    told = tried(error, QuantConfig(accumulator_bits=width, method="minmax"), never)
    assert (told.layer, told.channel, told.value, told.limit, told.remedy) == ("conv", 1, 9, 7, None)
    assert str(told).startswith("Layer 'conv' spans 9. ")
    assert "fewer taps" in str(told)
