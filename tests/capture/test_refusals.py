"""Modules in other clothes: what is taken as it is, and what is refused in the user's terms."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import fheconv
from fheconv import FheConvError, UnsupportedLayerError
from fheconv.capture.model import capture, single_convolution
from tests.support.captured import Fn

SHAPE = (1, 6, 6)


def conv(inputs=1, outputs=2):
    return nn.Conv2d(inputs, outputs, 3)


def layers():
    return nn.Sequential(conv(), nn.ReLU(), conv(2, 3))


class Masked(nn.Module):
    """A model that needs a mask."""

    def forward(self, x, mask, *, strength):
        return x * mask * strength


@dataclass
class Result:
    """What a model returns, in a class that torch.export does not know."""

    logits: torch.Tensor


def while_large(m, x):
    while x.abs().max() > 1:
        x = x / 2
    return x


def checked(m, x):
    assert x.min() >= 0, "no negative images"
    return 2 * x


def observed():
    model = layers()
    model[0].register_forward_hook(lambda module, inputs, output: print(float(output.mean())))
    return model


def collected():
    model = layers()
    arrays = []
    model[0].register_forward_hook(lambda module, inputs, output: arrays.append(output.numpy()))
    return model


PATH = r"path depends on the values of the image.*\(test_refusals\.py, line \d+: .*torch\.where"
# What makes the model, and what the error says: the reason and the next step.
REFUSED = {
    "if": (lambda: Fn(lambda m, x: x if x.sum() > 0 else -x), PATH),
    "while": (lambda: Fn(while_large), rf"{PATH[:-14]}.*while x\.abs"),
    "assert": (lambda: Fn(checked), PATH),
    "item": (lambda: Fn(lambda m, x: x if x.sum().item() > 0 else -x), PATH),
    "float": (lambda: Fn(lambda m, x: x / float(x.max() + 1)), PATH),
    "int": (lambda: Fn(lambda m, x: sum(x for _ in range(int(x.max()) + 1))), PATH),
    "a hook that reads a number": (observed, PATH),
    "a hook that makes an array": (collected, r"arrays of numpy.*take out hooks"),
    "an array": (lambda: Fn(lambda m, x: x.numpy()), r"arrays of numpy .*Compute with torch alone"),
    "values that are chosen": (lambda: Fn(lambda m, x: x[x > 0]), r"how many values.*torch\.where"),
    "an object": (lambda: Fn(lambda m, x: Result(x)), r"class Result.*register_dataclass"),
    "a set": (lambda: Fn(lambda m, x: {x}), r"class set.*a tensor, a tuple or a dict"),
    "nothing": (lambda: Fn(lambda m, x: None), "returns a constant.*wrap the model"),
    "arguments": (Masked, "forward of Masked needs 'mask', 'strength' besides.*images alone.*calls this one"),
    "no forward": (lambda: nn.ModuleList([conv()]), r"ModuleList has no forward.*Sequential\(\*parts\)"),
    "TorchScript": (lambda: torch.jit.script(layers()), r"TorchScript.*torch\.onnx\.export.*from_onnx"),
    "a trace": (lambda: torch.jit.trace(layers(), torch.rand(2, *SHAPE)), r"TorchScript.*from_onnx"),
    "frozen TorchScript": (lambda: torch.jit.freeze(torch.jit.script(layers().eval())), "TorchScript"),
    "TorchScript inside": (lambda: nn.Sequential(torch.jit.script(conv())), "TorchScript"),
    "no weights yet": (lambda: nn.Sequential(nn.LazyConv2d(2, 3)), "without weights yet; run it once"),
    "the device meta": (lambda: layers().to("meta"), r"'meta'.*load_state_dict"),
    "a convolution there": (lambda: conv().to("meta"), r"'meta'.*load_state_dict"),
    "complex weights": (lambda: nn.Conv2d(1, 2, 3, dtype=torch.cfloat), "complex.*real and imaginary parts"),
    "two types": (lambda: nn.Sequential(conv().half(), conv(2, 2)), r"float16, torch.float32; .*\.float\(\)"),
    "cuda": (lambda: Fn(lambda m, x: x.to("cuda")), r"CUDA.*line \d+.*out of forward"),
    "another size": (lambda: Fn(lambda m, x: x + torch.ones(5)), r"cannot be run.*line \d+.*Calibrate on"),
    "its own error": (lambda: Fn(lambda m, x: {}[7]), r"cannot be run on .*7 \(test_refusals.py, line"),
    "no repetition": (lambda: Fn(lambda m, x: x * random.random()), "differ between two runs"),
    "a class": (lambda: nn.ReLU, r"ReLU is a class; .*ReLU\(\)"),
    "an optimizer": (lambda: torch.optim.SGD(conv().parameters()), "SGD is no torch.nn.Module"),
    "a function": (lambda: torch.relu, "is no model; give a torch.nn.Module.*from_onnx"),
    "None": (lambda: None, "NoneType is no model"),
    "a list": (lambda: [conv(), nn.ReLU()], r"list of layers is no model; give torch\.nn\.Sequential"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_what_it_is_and_what_to_do(name, capfd):
    make, words = REFUSED[name]
    model = make()
    with pytest.raises(FheConvError, match=words) as caught:
        fheconv.quantize(model, np.full((4, *SHAPE), 0.5, np.float32))
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # torch has pages to say of some of them


def compiled():
    return torch.compile(nn.Sequential(conv()), backend="eager")


def weighed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(conv()), nn.ReLU(), conv(2, 3))


def thinned():
    model = layers()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def prepared():
    model = layers()
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0] - 0.5,))
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def in_training():
    return nn.Sequential(conv(), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.ReLU(), conv(2, 3)).train()


def written(m, x):
    x.mul_(2)
    x[:, :, 0] = 0
    return m.conv(x)


def cast(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.conv(x).float()


TAKEN = {
    "compiled": compiled,
    "parallel": lambda: nn.DataParallel(layers()),
    "parametrized": weighed,
    "spectral norm": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(conv()), conv(2, 2)),
    "thinned": thinned,
    "hooks": prepared,
    "in training": in_training,
    "half": lambda: layers().half(),
    "bfloat16": lambda: layers().bfloat16(),
    "double": lambda: layers().double(),
    "channels last": lambda: layers().to(memory_format=torch.channels_last),
    "writes into its input": lambda: Fn(written, conv=conv()),
    "autocast": lambda: Fn(cast, conv=conv()),
    "optional arguments": lambda: Fn(lambda m, x, mask=None: m.conv(x), conv=conv()),
    "a dict of one": lambda: Fn(lambda m, x: {"logits": m.conv(x)}, conv=conv()),
    "vmap": lambda: Fn(lambda m, x: torch.vmap(lambda one: m.conv(one[None])[0])(x), conv=conv()),
    "checkpoints": lambda: Fn(
        lambda m, x: torch.utils.checkpoint.checkpoint(m.conv, x, use_reentrant=False), conv=conv()
    ),
    "Fourier": lambda: Fn(lambda m, x: torch.view_as_real(torch.fft.fft2(m.conv(x))), conv=conv()),
}  # fmt: skip


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", TAKEN)
def test_models_in_other_clothes_are_taken(name):
    torch.manual_seed(0)
    model = TAKEN[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    training = model.training
    network = capture(model, SHAPE)
    assert model.training == training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    images = torch.rand(3, *SHAPE)
    weights = next(iter(model.parameters()))
    with torch.no_grad():
        expected = model.eval()(images.to(weights.dtype, copy=True))
    expected = expected["logits"] if isinstance(expected, dict) else expected
    digits = torch.finfo(torch.bfloat16 if name == "autocast" else expected.dtype).eps
    images = images.to(weights.dtype).double().numpy()
    results = network(images)
    np.testing.assert_allclose(
        results, expected.double().numpy(), atol=30 * digits * float(expected.abs().max())
    )


def test_a_convolution_with_a_hook_is_no_plain_one():
    layer = conv()
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    assert single_convolution(layer) is None
    assert single_convolution(conv()) is not None


@pytest.mark.slow
def test_what_only_moves_a_softmax_follows_it():
    """As in exports of Keras."""
    x = np.random.default_rng(0).normal(size=(3, 2, 3, 4))
    softmax = torch.tensor(x).softmax(1)
    moves = {
        "transposed": lambda y: y.permute(0, 2, 3, 1),
        "one axis less": lambda y: y.flatten(2),
        "one axis more": lambda y: y.unsqueeze(1).transpose(1, 2),
        "another order": lambda y: y.flip(1, 3),
        "in two steps": lambda y: y.movedim(1, -1).reshape(-1, 12, 2),
        "as floats": lambda y: y.float().contiguous(),
    }
    for name, move in moves.items():
        network = capture(Fn(lambda m, x, move=move: move(F.softmax(x, 1))), x.shape[1:])
        found = network(x)
        np.testing.assert_allclose(found, move(softmax).numpy(), rtol=1e-6, err_msg=name)
    for part in (
        lambda y: y[:, 1],
        lambda y: y.flatten(1),
        lambda y: y.repeat(1, 2, 1, 1),
        lambda y: y.chunk(2, 1)[0],
    ):
        with pytest.raises(UnsupportedLayerError, match=r"takes apart|apart; return it whole"):
            capture(Fn(lambda m, x, part=part: part(F.softmax(x, 1))), x.shape[1:])
    with pytest.raises(UnsupportedLayerError, match="argmax before it can only be the last"):
        capture(Fn(lambda m, x: x.argmax(1).flatten(1)), x.shape[1:])


def test_a_reshape_to_the_same_shape_costs_nothing():
    """As tf2onnx writes between the two halves of a PReLU."""

    def prelu(m, x):
        y = m.conv(x)
        return F.relu(y) + (-0.25 * F.relu(-y)).reshape(y.shape)

    network = fheconv.quantize(Fn(prelu, conv=conv()), np.random.default_rng(0).random((5, *SHAPE)))
    assert network.budget().lookups == 0  # the client computes the last activation
