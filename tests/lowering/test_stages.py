"""The function of a network, block by block, in clear integers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fheconv
from fheconv.lowering.blocks import blocks_of
from fheconv.lowering.lower import lower
from fheconv.lowering.stages import in_stages
from fheconv.networks.floats import Maximum
from tests.support.nets import BLOCKS, integer_images, quantized


def network_of(seed, *names, **options):
    return quantized(seed, *names, accumulator_bits=12, activation_bits=3, input_bits=3, **options)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", sorted(BLOCKS))
@settings(max_examples=4)
@given(st.integers(0, 1), st.integers(1, 5))
def test_blocks_compute_what_the_network_computes_and_no_lookup_twice(name, seed, count):
    network = network_of(seed, name)
    if len(network.layers) < 2:
        return
    whole, staged = lower(network), in_stages(network, "auto", count)
    q = integer_images(network, seed, 2)
    interface = staged.lowered.interface
    results = staged.run(interface.prepare(q))
    np.testing.assert_array_equal(interface.accumulators(results, len(q)), network.accumulate(q))
    for stage, (layer, made) in enumerate(zip(network.layers, whole.layers, strict=True)):
        lookups = [n for block, n in zip(staged.blocks, staged.lookups, strict=True) if block.stage == stage]
        assert sum(lookups) <= made.lookups  # those on which no result depends may be left out
        assert len([n for n in lookups if n]) <= count
        # A layer of maxima takes several lookups for each of its values.
        each = len(layer.index) - 1 if isinstance(layer, Maximum) else 1
        assert max(lookups, default=0) <= -(-made.lookups // count) + each


@settings(max_examples=8)
@given(st.integers(0, 4), st.integers(1, 5))
def test_blocks_read_the_image_and_earlier_blocks_only(seed, count):
    network = network_of(seed)
    if len(network.layers) < 2:
        return
    staged = in_stages(network, "auto", count)
    for number, block in enumerate(staged.blocks, 1):
        assert block.number == number
        assert block.reads
        for value in block.reads:
            assert value < number
            # Where several layers read the image, the first block only passes it on.
            assert value == 0 or staged.blocks[value - 1].stage < block.stage or value == 1
    read = {value for block in staged.blocks for value in block.reads}
    assert read >= set(range(1, len(staged.blocks)))
    program = "".join(f"  func.func @{block.name}(%arg0: i1)\n" for block in staged.blocks)
    assert blocks_of(program) == staged.blocks


def test_a_block_of_a_small_filter_reads_the_rows_around_it_only():
    network = network_of(0, "conv", "conv", size=(1, 12, 12))
    staged = in_stages(network, "auto", 4)
    firsts = [number for number, block in enumerate(staged.blocks, 1) if block.stage == 0]
    seconds = [block for block in staged.blocks if block.stage == 1]
    assert len(firsts) == len(seconds) == 4
    assert firsts[-1] not in seconds[0].reads
    assert firsts[0] not in seconds[-1].reads


@pytest.mark.parametrize(
    "names",
    [
        ["stage0_value2_of_0"],
        ["stage0_value1_of_1"],
        ["stage1_value1_of_0", "stage0_value2_of_1"],
        ["stage0_value1_of_0", "other"],
        ["stage0_value1_of_0", "stage1_value2_of_2"],
    ],
)
def test_blocks_that_do_not_follow_what_they_read_are_refused(names):
    with pytest.raises(fheconv.ArtifactError, match="altered"):
        blocks_of("".join(f"func.func @{name}(" for name in names).replace("(", "(\n"))


def test_a_program_of_one_function_has_no_blocks():
    assert blocks_of("module {\n  func.func @circuit(%arg0: i1) {}\n}") == ()
