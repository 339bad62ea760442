import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import fheconv
from fheconv.networks.bounds import layer_bounds
from fheconv.networks.expression import Expression, X
from fheconv.networks.quantization import Quantization
from fheconv.quantizer.tables import compressed, lookup
from fheconv.quantizer.windows import Window, room, width
from tests.support.nets import quantized

# Computed by torch, on tensors of doubles.
FUNCTIONS = {
    "relu": (Expression("relu", (X,)), torch.relu),
    "tanh": (Expression("tanh", (X,)), torch.tanh),
    "leaky_relu": (
        Expression("leaky_relu", (X, 0.1)),
        lambda x: torch.nn.functional.leaky_relu(x, 0.1),
    ),
    "silu": (Expression("silu", (X,)), torch.nn.functional.silu),
    "hardtanh": (Expression("hardtanh", (X, -0.5, 1.5)), lambda x: torch.clamp(x, -0.5, 1.5)),
    "chain": (
        Expression("mul", (Expression("sigmoid", (Expression("sub", (X, 0.3)),)), 2.0)),
        lambda x: torch.sigmoid(x - 0.3) * 2,
    ),
}


@st.composite
def tables(draw, rounded=None):
    """The arguments of `lookup` for a layer (C, 2, 3), with steps and biases of each value or channel."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    channels = draw(st.integers(1, 3))
    shape = (channels, 2, 3)
    rounded = draw(st.booleans()) if rounded is None else rounded
    rounding_bits = draw(st.integers(2, 6)) if rounded else None
    varies = shape if draw(st.booleans()) else (channels, 1, 1)
    span = rng.integers(0, draw(st.sampled_from([3, 40, 700])), channels)
    step = rng.uniform(0.01, 1, varies) * rng.choice([1, 1, -1], varies)
    bits = width("layer", int(span.max()), rounding_bits) + draw(st.integers(0, 2))
    output_bits = draw(st.integers(1, 6))
    output = Quantization(
        scale=float(rng.uniform(0.05, 1)),
        zero_point=int(rng.integers(0, 2**output_bits)),
        minimum=0,
        maximum=2**output_bits - 1,
    )
    return draw(st.sampled_from(sorted(FUNCTIONS))), {
        "output": output,
        "step": np.broadcast_to(step, shape),
        "bias": np.broadcast_to(rng.normal(0, 3, varies), shape),
        "minimum": rng.integers(-500, 500, channels),
        "span": span,
        "bits": bits,
        "rounding_bits": rounding_bits,
        "proved": True,
    }


def made(name, arguments):
    return table_of(FUNCTIONS[name][0], **arguments)


def table_of(activation, *, output, step, bias, **window):
    return lookup("layer", activation, output, Window(**window), step=step, bias=bias)


def everything(minimum, span, shape):
    """Accumulators (N, C, *S) which take every value from each channel's minimum to its maximum."""
    steps = np.arange(int(span.max()) + 1)[:, None]
    channels = minimum + np.minimum(steps, span)
    return np.broadcast_to(channels.reshape(*channels.shape, *[1] * (len(shape) - 1)), (len(steps), *shape))


@given(tables(rounded=False))
def test_every_entry_is_the_activation_computed_directly(problem):
    name, arguments = problem
    table = made(name, arguments)
    accumulators = everything(arguments["minimum"], arguments["span"], arguments["step"].shape)
    real = accumulators * arguments["step"] + arguments["bias"]
    values = FUNCTIONS[name][1](torch.tensor(real)).numpy()
    output = arguments["output"]
    steps = values / output.scale + output.zero_point
    near = np.abs(steps % 1 - 0.5) > 1e-6  # where the last bit of a float does not decide
    expected = np.clip(np.rint(steps), output.minimum, output.maximum)
    np.testing.assert_array_equal(table(accumulators)[near], expected[near])
    assert (np.abs(table(accumulators) - expected) <= 1).all()


@given(tables(rounded=True))
def test_a_rounded_entry_is_the_activation_within_its_step(problem):
    """Of all accumulators that are rounded to one column, the entry lies between the least and the greatest
    value, for activations that rise."""
    name, arguments = problem
    assume(name != "silu")
    table = made(name, arguments)
    dropped = table.dropped_bits
    assert dropped == max(arguments["bits"] - arguments["rounding_bits"], 0)
    accumulators = everything(arguments["minimum"], arguments["span"], arguments["step"].shape)
    got = table(accumulators)
    half = 2.0 ** (dropped - 1) if dropped else 0.0
    ends = [
        (accumulators + away) * arguments["step"] + arguments["bias"] for away in (-2 * half, 0, 2 * half)
    ]
    values = np.stack([FUNCTIONS[name][1](torch.tensor(real)).numpy() for real in ends])
    output = arguments["output"]
    steps = np.clip(values / output.scale + output.zero_point, output.minimum, output.maximum)
    assert (got >= np.rint(steps.min(axis=0) - 1e-6)).all()
    assert (got <= np.rint(steps.max(axis=0) + 1e-6)).all()


@given(tables())
def test_no_accumulator_leaves_the_table_and_rounding_has_room_at_both_ends(problem):
    name, arguments = problem
    table = made(name, arguments)
    minimum, span = arguments["minimum"], arguments["span"]
    ends = np.stack([minimum, minimum + span]) - table.minimum
    assert ends.min() >= 0
    assert ends.max() < 2 ** arguments["bits"]
    dropped = table.dropped_bits
    assert table.tables.shape[1] == 2 ** (arguments["bits"] - dropped)
    if dropped:
        # One step of noise, half a step of rounding: still the first or the last column.
        assert (ends.min(axis=0) >= 2 ** (dropped - 1)).all()
        assert ((ends.max(axis=0) + 2 ** (dropped - 1)) >> dropped < table.tables.shape[1]).all()
    left = room(arguments["bits"], arguments["rounding_bits"]) - span
    below = ends[0] - (1 << (dropped - 1) if dropped else 0)
    assert (np.abs(2 * below - left) <= 1).all()  # what is left is shared out to both ends
    table(everything(minimum, span, arguments["step"].shape))  # numpy refuses columns that are too high


@given(tables())
def test_rows_are_shared_where_they_mean_the_same(problem):
    name, arguments = problem
    table = made(name, arguments)
    which = np.broadcast_to(table.which, arguments["step"].shape)
    assert table.tables.min() >= arguments["output"].minimum
    assert table.tables.max() <= arguments["output"].maximum
    keys = np.stack(
        [
            (arguments["bias"] + arguments["step"] * table.minimum.reshape(-1, 1, 1)).ravel(),
            arguments["step"].ravel(),
        ]
    )
    for row in range(len(table.tables)):
        assert len(np.unique(keys[:, which.ravel() == row], axis=1).T) == 1
    assert len(table.tables) == len(np.unique(keys, axis=1).T)
    varies = any((arguments[key] != arguments[key][:, :1, :1]).any() for key in ("step", "bias"))
    assert table.which.shape == (arguments["step"].shape if varies else (len(which), 1, 1))


def test_constants_of_channels_are_in_the_tables():
    slopes = np.array([0.5, 0.25, 0.0]).reshape(3, 1, 1)
    shape = (3, 2, 2)
    table = table_of(
        Expression("prelu", (X, slopes)),
        output=Quantization(scale=0.25, zero_point=4, minimum=0, maximum=15),
        step=np.full(shape, 0.5),
        bias=np.zeros(shape),
        minimum=np.full(3, -3),
        span=np.full(3, 7),
        bits=3,
        rounding_bits=None,
        proved=True,
    )
    accumulators = everything(np.full(3, -3), np.full(3, 7), shape)
    real = accumulators * 0.5
    expected = np.clip(np.rint(np.where(real > 0, real, real * slopes) / 0.25 + 4), 0, 15)
    np.testing.assert_array_equal(table(accumulators), expected)
    assert table.which.shape == (3, 1, 1)


def test_what_is_not_a_number_is_refused_and_infinity_is_clipped():
    arguments = {
        "output": Quantization(scale=1.0, zero_point=3, minimum=0, maximum=7),
        "step": np.ones((1, 1)),
        "bias": np.zeros((1, 1)),
        "span": np.array([3]),
        "bits": 2,
        "rounding_bits": None,
        "proved": True,
    }
    log = Expression("log", (X,))
    with pytest.raises(fheconv.CalibrationError, match=r"log\(x\).*'layer'.*-1"):
        table_of(log, minimum=np.array([-1]), **arguments)
    table = table_of(log, minimum=np.array([0]), **arguments)  # log 0 = −∞
    np.testing.assert_array_equal(table(np.arange(4).reshape(4, 1, 1)).ravel(), [0, 3, 4, 4])


def test_a_network_whose_activation_is_not_a_number_somewhere_is_refused():
    class Log(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 1, 2)

        def forward(self, x):
            return torch.log(self.conv(x)).flatten(1).sum(1, keepdim=True)

    module = Log()
    with torch.no_grad():
        module.conv.weight.copy_(torch.tensor([[[[1.0, 0.5], [0.5, -0.5]]]]))
        module.conv.bias.fill_(0.1)
    images = np.random.default_rng(0).uniform(0.9, 1, (4, 1, 3, 3))  # on these it is finite
    with pytest.raises(fheconv.CalibrationError, match="not a number"):
        fheconv.quantize(module, images, fheconv.QuantConfig(method="mse"))


def test_a_network_that_spans_more_than_any_lookup_is_refused():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 1, 3), torch.nn.ReLU(), torch.nn.Conv2d(1, 1, 1))
    images = np.random.default_rng(0).uniform(0, 1, (4, 4, 4, 4))
    config = fheconv.QuantConfig(weight_bits=8, input_bits=10)
    with pytest.raises(fheconv.AccumulatorOverflowError, match="16 bits") as refused:
        fheconv.quantize(module, images, config)
    assert refused.value.layer == "0"
    narrower = fheconv.QuantConfig(weight_bits=8, input_bits=10, accumulator_bits=16)
    assert fheconv.quantize(module, images, narrower).budget(16).fits


@pytest.mark.sampled(3)
@pytest.mark.parametrize("rounding_bits", [None, 3])
@pytest.mark.parametrize("seed", range(4))
def test_no_layer_of_a_network_leaves_its_tables_at_its_bounds(seed, rounding_bits):
    network = quantized(seed, weight_bits=4, rounding_bits=rounding_bits)
    for layer in network.layers:
        table = getattr(layer, "lookup", None)
        if table is None:
            continue
        bounds = layer_bounds(layer, network.shapes)
        outputs = [table(ends[None]) for ends in (bounds.minimum, bounds.maximum)]
        assert min(y.min() for y in outputs) >= table.output.minimum
        assert max(y.max() for y in outputs) <= table.output.maximum
        shape = (-1, *[1] * (len(layer.shape) - 1))
        assert (bounds.minimum >= table.minimum.reshape(shape)).all()
        assert (bounds.maximum < table.minimum.reshape(shape) + 2**table.bits).all()


def test_compressed_keeps_what_varies():
    same = np.broadcast_to(np.arange(3.0).reshape(3, 1, 1), (3, 2, 2))
    assert compressed(same).shape == (3, 1, 1)
    other = same.copy()
    other[1, 0, 1] = 7
    assert compressed(other) is other
