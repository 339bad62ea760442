import numpy as np
import pytest
import torch
from hypothesis import given

from fheconv import CalibrationError, Conv, InvalidArgumentError, UnsupportedLayerError
from fheconv.arithmetic import conv
from fheconv.capture.model import capture, single_convolution
from tests.support.strategies import layer_problems


@given(layer_problems())
def test_a_captured_module_computes_what_the_module_does(problem):
    layer = single_convolution(problem.module)
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
    expected = problem.torch_output(problem.images)
    np.testing.assert_allclose(y, expected, atol=1e-9)
    assert layer.in_channels == problem.module.in_channels
    assert (layer.bias is None) == (problem.module.bias is None)
    network = capture(problem.module, problem.images.shape[1:])
    np.testing.assert_allclose(network(problem.images), expected, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_in_words_is_captured(padding):
    module = torch.nn.Conv2d(1, 1, (2, 3), padding=padding, bias=False).double()
    image = torch.rand(1, 1, 5, 6, dtype=torch.float64)
    network = capture(module, (1, 5, 6))
    np.testing.assert_allclose(network(image.numpy()), module(image).detach(), atol=1e-12)


def test_a_plain_filter_is_one_channel_to_one():
    layer = single_convolution([[1, 2, 3], [4, 5, 6]])
    assert layer.weight.shape == (1, 1, 2, 3)
    assert layer.bias is None
    assert layer.in_channels == 1
    assert layer.geometry.kernel == (2, 3)


def test_a_layer_is_taken_as_it_is():
    layer = Conv.of(np.ones((4, 1, 3, 3)), np.zeros(4), groups=2, name="edges")
    assert single_convolution(layer) is layer
    assert layer.in_channels == 2


class Doubled(torch.nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Named(torch.nn.Conv2d):
    """Adds nothing to what it computes."""


def patched():
    module = torch.nn.Conv2d(1, 1, 3)
    module.forward = lambda x: 10 * x
    return module


def hooked():
    module = torch.nn.Conv2d(1, 1, 3)
    module.register_forward_hook(lambda module, inputs, output: 2 * output)
    return module


def parametrized():
    return torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(1, 2, 3))


@pytest.mark.parametrize(
    "make", [lambda: Doubled(1, 1, 3), lambda: Named(1, 1, 3), patched, hooked, parametrized]
)
def test_what_a_layer_computes_beyond_its_weights_is_captured_too(make):
    module, x = make(), torch.rand(2, 1, 4, 5)
    network = capture(module, (1, 4, 5))
    np.testing.assert_allclose(network(x.numpy()), module(x).detach().numpy(), atol=1e-5)


def test_layers_without_weights_are_refused():
    with pytest.raises(UnsupportedLayerError, match="LazyConv2d"):
        capture(torch.nn.LazyConv2d(1, 3), (1, 4, 5))


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_layers_that_are_not_finite_are_refused_by_name(part):
    values = {"weight": np.ones((1, 1, 2, 2)), "bias": np.zeros(1)}
    values[part][0] = np.nan
    with pytest.raises(CalibrationError, match=rf"The {part} of layer 'edges'"):
        capture(Conv.of(**values, name="edges"), (1, 3, 3))


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


class Cropped(torch.nn.Module):
    """A crop that depends on the size of the image, which a program for one size no longer knows."""

    def __init__(self, flatten):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 2)
        self.flatten = flatten

    def forward(self, x):
        y = torch.relu(self.conv(x[:, :, : x.shape[2] - 1]))
        return y.view(x.shape[0], -1) if self.flatten else y


@pytest.mark.parametrize("batch", [1, 3, "any"])
def test_an_exported_program_is_captured_for_images_of_its_size(batch):
    model = Cropped(flatten=batch == "any").double().eval()
    shapes = ({0: torch.export.Dim("batch")},) if batch == "any" else None
    example = torch.zeros(2 if batch == "any" else batch, 1, 5, 4, dtype=torch.double)
    program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    x = torch.rand(4, 1, 5, 4, dtype=torch.double)
    network = capture(program, (1, 5, 4))
    np.testing.assert_allclose(network(x.numpy()), model(x).detach(), atol=1e-12)
    assert network.layers[-1].name == "conv"
    with pytest.raises(UnsupportedLayerError, match="images of the size that it was exported for"):
        capture(program, (1, 6, 4))


@pytest.mark.parametrize(
    "model",
    [Cropped(flatten=True), torch.nn.Flatten(0), torch.nn.Bilinear(4, 4, 2)],
    ids=lambda m: type(m).__name__,
)
def test_an_exported_program_for_one_batch_size_alone_or_of_two_arguments_is_refused(model):
    image = torch.zeros(1, 1, 5, 4)
    arguments = (image, image) if isinstance(model, torch.nn.Bilinear) else (image,)
    program = torch.export.export(model.eval(), arguments)
    with pytest.raises(UnsupportedLayerError):
        capture(program, (1, 5, 4))
