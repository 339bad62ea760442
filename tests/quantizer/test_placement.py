"""Windows lie where the activations that lookups give have the least error."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fheconv
from fheconv.basics.arrays import along_channels
from fheconv.networks.expression import Expression, X
from fheconv.networks.quantization import Quantization
from fheconv.quantizer import building, placement
from fheconv.quantizer.placement import Placing, Sums, least_span
from fheconv.quantizer.tables import lookup
from fheconv.quantizer.windows import MOST_CUT, Window, dropped_bits, filling_gains, room
from tests.support.nets import quantize

FUNCTIONS = {name: Expression(name, (X,)) for name in ("relu", "tanh", "sigmoid")}
FUNCTIONS["prelu"] = Expression("prelu", (X, np.array([[[0.25]], [[-0.5]], [[0.0]]])))


def accumulators(seed, images=40):
    """Normal values of three channels, a few of them far out, as integers (N, 3, 2, 2)."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(3, (images, 3, 2, 2)) * rng.uniform(5, 60, (3, 1, 1))
    return np.rint(values).astype(np.int64)


def placed(seed, function, kept, widest=13, gains=2**16):
    values = accumulators(seed)
    sums = Sums.of(values, FUNCTIONS[function], stretch=1.0, step=0.05, bias=0.1)
    placing = Placing(rounding_bits=kept, gains=np.full(3, gains), widest=widest)
    ends = values.min(axis=(0, 2, 3)) - 3, values.max(axis=(0, 2, 3)) + 3
    return values, sums, placing, ends, placing.best(sums, ends, (np.zeros(3), np.zeros(3)))


@pytest.mark.parametrize("function", FUNCTIONS)
@given(st.integers(0, 2**32), st.integers(3, 6), st.integers(1, 9))
def test_the_error_is_that_of_the_tables(function, seed, kept, gains):
    """Of exact integers, inside of the window and outside of it."""
    values, sums, _, _, found = placed(seed, function, kept, gains=gains)
    dropped = dropped_bits(found.bits, kept)
    gain = np.minimum(filling_gains(found.span, found.bits, kept, proved=False), gains)
    window = Window(
        minimum=found.minimum * gain, span=found.span * gain, bits=found.bits, rounding_bits=kept,
        proved=False, gain=gain,
    )  # fmt: skip
    output = Quantization(scale=2.0**-16, zero_point=0, minimum=-(2**30), maximum=2**30)
    by_channel = along_channels(gain, 3)
    step = np.broadcast_to(0.05 / by_channel, (3, 2, 2))
    table = lookup("layer", FUNCTIONS[function], output, window, step=step, bias=np.full((3, 2, 2), 0.1))
    got = table(values * by_channel) * output.scale
    off = np.square(got - FUNCTIONS[function](values * 0.05 + 0.1)).mean(axis=(0, 2, 3))
    first, size = window.start / gain, 2.0**dropped / gain
    # A table has the activation at the mean of the integers that round to a column, which is not quite its
    # middle, and a window begins at a whole step.
    np.testing.assert_allclose(np.sqrt(off), np.sqrt(sums.error(first, size, 2**kept)), atol=0.06)


@pytest.mark.parametrize("function", FUNCTIONS)
@given(st.integers(0, 2**32), st.integers(3, 6), st.integers(7, 13))
def test_windows_are_no_worse_than_those_of_all_values_and_keep_what_they_must(function, seed, kept, widest):
    values, sums, placing, ends, found = placed(seed, function, kept, widest)
    if found is None:  # then all values but a few do not fit
        share = [
            np.ptp(np.quantile(channel, [MOST_CUT / 2, 1 - MOST_CUT / 2]))
            for channel in np.moveaxis(values, 1, 0).reshape(3, -1)
        ]
        # The upper end is chosen first, beside the lower end of all values.
        assert max(share) > room(widest, kept, proved=False) / 4
        return
    assert (found.minimum <= 0).all()
    assert (found.minimum + found.span >= 0).all()
    assert (found.minimum >= np.minimum(ends[0], 0)).all()
    assert (found.minimum + found.span <= np.maximum(ends[1], 0)).all()
    assert found.span.max() <= room(found.bits, kept, proved=False)
    assert found.bits <= widest
    low, high = found.minimum, found.minimum + found.span
    assert (sums.outside(low, high) <= MOST_CUT).all()
    whole = ends[1] - ends[0]
    if whole.max() <= room(widest, kept, proved=False):
        bits = placing.filled_width(whole)
        errors = []
        for start, span, own in ((ends[0], whole, bits), (low, found.span, found.bits)):
            most = room(own, kept, proved=False)
            gain = filling_gains(span, own, kept, proved=False)
            size = 2.0 ** dropped_bits(own, kept) / gain
            errors.append(sums.error(start - (most / gain - span) / 2, size, 2**kept).sum())
        assert errors[1] <= errors[0] * (1 + 1e-9)


def test_few_columns_make_windows_narrower_and_tails_that_saturate_do_not_matter():
    values = np.random.default_rng(0).normal(size=(500, 2, 2, 2))
    spans = [least_span(Sums.of(values, FUNCTIONS["relu"], stretch=1.0), kept).mean() for kept in (3, 4, 6)]
    assert spans == sorted(spans)
    assert spans[0] < 0.85 * np.ptp(values, axis=(0, 2, 3)).mean()
    values[0, 0, 0, 0] = 1000.0
    assert least_span(Sums.of(values, FUNCTIONS["tanh"], stretch=1.0), 4)[0] < 20


def test_where_noise_limits_gains_windows_are_narrower():
    """Otherwise columns would be left empty."""
    *_, free = placed(0, "relu", 4)
    *_, limited = placed(0, "relu", 4, gains=1)
    assert limited.bits < free.bits


@pytest.mark.parametrize("kept", [4, 5])
def test_gains_make_lookups_at_most_5_percent_dearer(kept, monkeypatch):
    torch.manual_seed(kept)
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4)
    )
    images = np.random.default_rng(kept).uniform(0, 1, (60, 1, 8, 8))
    options = {"overflow": "defined", "rounding_bits": kept, "input_bits": 6}
    config = fheconv.CompileConfig(p_error=0.03)
    filled = quantize(module.double().eval(), images, **options)
    assert max(layer.gain.max() for layer in filled.layers) > 1
    for room_of in (building, placement):
        monkeypatch.setattr(room_of, "filling_gains", lambda span, *_, **__: np.ones(len(span), np.int64))
    bare = quantize(module, images, **options)
    assert max(layer.gain.max() for layer in bare.layers) == 1
    one, other = (network.forecast(config).complexity for network in (filled, bare))
    assert one <= 1.05 * other


@given(st.integers(0, 2**32), st.integers(3, 6), st.integers(5, 13), st.integers(-2000, 2000))
def test_windows_hold_the_blank_image_wherever_it_lies(seed, kept, widest, blank):
    """Concrete evaluates it, and fails if a value leaves a table."""
    values = accumulators(seed)
    sums = Sums.of(values, FUNCTIONS["relu"], stretch=1.0, step=0.05, bias=0.1)
    placing = Placing(rounding_bits=kept, gains=np.full(3, 4), widest=widest)
    held = np.full(3, blank)
    ends = values.min(axis=(0, 2, 3)), values.max(axis=(0, 2, 3))
    found = placing.best(sums, (np.minimum(ends[0], held), np.maximum(ends[1], held)), (held, held))
    if found is not None:
        assert (found.minimum <= held).all()
        assert (found.minimum + found.span >= held).all()
        assert found.span.max() <= room(found.bits, kept, proved=False)
