"""The example that mypy checks does what its types say."""

import numpy as np
import pytest

from tests import typed_example


@pytest.mark.slow
def test_both_sides_give_the_same_results(tmp_path):
    alone, from_files = typed_example.both_sides(tmp_path)
    np.testing.assert_array_equal(alone, from_files)
    assert alone.shape == (1, 3)


def test_the_cheapest_circuit_is_a_point_that_compiles():
    point = typed_example.cheapest()
    assert point.compile().cost.complexity == point.cost.complexity


def test_the_arithmetic_takes_nested_lists():
    bounds = typed_example.arithmetic()
    assert (bounds.channel_minimum.tolist(), bounds.channel_maximum.tolist()) == ([-15], [15])
