import numpy as np
import pytest
import torch
from hypothesis import given

from fheconv import CalibrationError, Conv, InvalidArgumentError, UnsupportedLayerError
from fheconv.arithmetic import conv
from fheconv.capture import capture
from tests.strategies import layer_problems


@given(layer_problems())
def test_a_captured_module_computes_what_the_module_does(problem):
    layer = capture(problem.module)
    g = layer.geometry
    y = conv(
        problem.images,
        layer.weight,
        layer.bias,
        stride=g.stride,
        padding=g.padding,
        dilation=g.dilation,
        groups=g.groups,
    )
    np.testing.assert_allclose(y, problem.torch_output(problem.images), atol=1e-9)
    assert layer.in_channels == problem.module.in_channels
    assert (layer.bias is None) == (problem.module.bias is None)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_in_words_is_captured(padding):
    module = torch.nn.Conv2d(1, 1, (2, 3), padding=padding, bias=False).double()
    layer = capture(module)
    image = torch.rand(1, 1, 5, 6, dtype=torch.float64)
    y = conv(image, layer.weight, padding=layer.geometry.padding)
    np.testing.assert_allclose(y, module(image).detach(), atol=1e-12)


def test_subclasses_of_conv2d_are_captured():
    class Mine(torch.nn.Conv2d):
        pass

    module = Mine(1, 2, 3)
    np.testing.assert_array_equal(capture(module).weight, module.weight.detach())


def test_a_plain_filter_is_one_channel_to_one():
    layer = capture([[1, 2, 3], [4, 5, 6]])
    assert layer.weight.shape == (1, 1, 2, 3)
    assert layer.bias is None
    assert layer.in_channels == 1
    assert layer.geometry.kernel == (2, 3)


def test_a_layer_is_captured_as_it_is():
    layer = Conv.of(np.ones((4, 1, 3, 3)), np.zeros(4), groups=2, name="edges")
    assert capture(layer) is layer
    assert layer.in_channels == 2


def test_a_network_is_refused_with_the_way_out():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3), torch.nn.ReLU())
    with pytest.raises(UnsupportedLayerError, match=r"Sequential.*model\.conv1"):
        capture(model)


class Doubled(torch.nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Named(torch.nn.Conv2d):
    """Adds nothing to what it computes."""


def test_layers_that_compute_more_than_their_weights_say_are_refused():
    with pytest.raises(UnsupportedLayerError, match="Doubled computes something of its own"):
        capture(Doubled(1, 1, 3))
    patched = torch.nn.Conv2d(1, 1, 3)
    patched.forward = lambda x: 10 * x
    with pytest.raises(UnsupportedLayerError, match="Conv2d computes something of its own"):
        capture(patched)
    hooked = torch.nn.Conv2d(1, 1, 3)
    hooked.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(UnsupportedLayerError, match="hooks"):
        capture(hooked)
    with pytest.raises(UnsupportedLayerError, match="LazyConv2d has no weights yet"):
        capture(torch.nn.LazyConv2d(1, 3))
    assert capture(Named(1, 1, 3)).in_channels == 1


def test_a_parametrized_weight_is_the_one_the_layer_computes_with():
    module = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(1, 2, 3))
    x = torch.rand(1, 1, 4, 4)
    layer = capture(module)
    expected = torch.nn.functional.conv2d(x, torch.tensor(layer.weight), torch.tensor(layer.bias))
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_layers_that_are_not_finite_are_refused_by_name(part):
    values = {"weight": np.ones((1, 1, 2, 2)), "bias": np.zeros(1)}
    values[part][0] = np.nan
    with pytest.raises(CalibrationError, match=rf"The {part} of layer 'edges'"):
        capture(Conv.of(**values, name="edges"))


@pytest.mark.parametrize(
    ("weight", "options", "words"),
    [
        (np.ones(3), {}, r"shape \(3,\)"),
        (np.ones((0, 1, 2, 2)), {}, "none of them 0"),
        (np.ones((2, 2), complex), {}, "complex128"),
        ([[1, 2], [3]], {}, "weight is not an array"),
        (torch.ones(2, 2).to(torch.float8_e4m3fn), {}, "weight"),
        (np.ones((3, 1, 2, 2)), {"groups": 2}, "multiple of groups"),
        (np.ones((2, 1, 2, 2)), {"bias": np.zeros(3)}, r"bias has shape \(3,\)"),
        (np.ones((2, 2)), {"stride": 0}, "stride=0"),
        (np.ones((2, 2)), {"padding": "reflect"}, "reflect"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(weight, options, words):
    with pytest.raises(InvalidArgumentError, match=words):
        Conv.of(weight, **options)
