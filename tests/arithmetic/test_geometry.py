import pytest
import torch
from hypothesis import given

from fheconv.arithmetic import ConvGeometry, conv_output_shape
from fheconv.basics.errors import InvalidArgumentError
from tests.support.strategies import conv_problems


def test_the_shape_of_an_image_through_a_filter():
    assert conv_output_shape((1, 1, 28, 28), (1, 1, 3, 3), stride=1, padding=0, dilation=1) == (1, 1, 26, 26)
    assert conv_output_shape((28, 28), (3, 3)) == (26, 26)


@given(conv_problems())
def test_shapes_are_torchs(problem):
    shape = conv_output_shape(problem.x.shape, problem.weight.shape, **problem.options)
    assert shape == problem.torch_output().shape


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (4, 5)])
@pytest.mark.parametrize("dilation", [1, (2, 3)])
def test_same_padding_is_torchs(kernel, dilation):
    module = torch.nn.Conv2d(1, 1, kernel, padding="same", dilation=dilation)
    expected = tuple(module(torch.zeros(2, 1, 9, 8)).shape)
    assert conv_output_shape((2, 1, 9, 8), (1, 1, *kernel), padding="same", dilation=dilation) == expected
    pairs = ConvGeometry.of(kernel, padding="same", dilation=dilation).padding
    # torch lists the last axis first, before and after
    reversed_pairs = module._reversed_padding_repeated_twice
    assert [n for pair in reversed(pairs) for n in pair] == list(reversed_pairs)


def test_asymmetric_padding():
    assert conv_output_shape((5, 5), (3, 3), padding=((1, 0), (0, 2))) == (4, 5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stride": 0}, "stride=0"),
        ({"stride": (1, 2, 3)}, "stride"),
        ({"stride": 1.5}, "stride=1.5"),
        ({"stride": True}, "stride"),
        ({"padding": -1}, "padding=-1"),
        ({"padding": "reflect"}, "reflect"),
        ({"padding": "same", "stride": 2}, "stride 1 only"),
        ({"padding": ((1, 1),)}, "pairs"),
        ({"dilation": 0}, "dilation=0"),
        ({"dilation": 3}, "reaches over 7"),
        ({"groups": 2}, "out_channels"),
        ({"groups": 3}, "takes 3"),
    ],
)
def test_options_without_meaning_are_refused(options, words):
    with pytest.raises(InvalidArgumentError, match=words):
        conv_output_shape((1, 1, 5, 5), (3, 1, 3, 3), **options)


def test_shapes_that_do_not_go_together_are_refused():
    with pytest.raises(InvalidArgumentError, match="must both be"):
        conv_output_shape((1, 28, 28), (1, 1, 3, 3))
