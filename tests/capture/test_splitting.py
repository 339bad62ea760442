"""A model in two parts: one that the client runs in clear, and one that runs encrypted."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fheconv
from tests.support import onnx_files


class Residual(nn.Module):
    """Has a branch around a layer, and weights of its own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.AvgPool2d(2)
        self.shift = nn.Parameter(torch.full((4, 1, 1), 0.25))
        self.head = nn.Linear(36, 3)

    def forward(self, x):
        x = self.stem(x + self.shift.mean())
        x = self.pool(torch.relu(x + self.body(x)))
        return self.head((x + self.shift).flatten(1))


class Twice(nn.Module):
    """Calls a module twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        return self.conv(self.conv(x))


class Branching(nn.Module):
    """Does what depends on values."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


class Early(nn.Module):
    """Reads a weight before the module, for nothing."""

    def __init__(self):
        super().__init__()
        self.conv, self.secret = nn.Conv2d(1, 1, 3), nn.Parameter(torch.ones(1))

    def forward(self, x):
        _ = self.secret * 2
        return self.conv(x) * self.secret


torch.manual_seed(0)
MODEL = Residual()


@given(st.sampled_from(["stem", "stem.0", "stem.2", "pool"]), st.integers(0, 2**31))
def test_both_parts_together_are_the_model_in_evaluation_mode(after, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 1, 6, 6, generator=generator)
    public, private = fheconv.split(MODEL, after=after)
    with torch.no_grad():
        expected = MODEL.eval()(x)
    got = private(public(x))
    MODEL.train()
    torch.testing.assert_close(got, expected)
    assert not got.requires_grad


def test_no_weight_of_the_private_part_is_in_the_public_one():
    public, private = fheconv.split(MODEL, after="pool")
    assert not [name for name in public.state_dict() if name.startswith("head")]
    assert not [name for name in private.state_dict() if name.startswith(("stem", "body"))]
    assert MODEL.training
    assert all(parameter.requires_grad for parameter in MODEL.parameters())


def test_a_weight_that_is_read_early_for_nothing_stays_private():
    public, private = fheconv.split(Early(), after="conv")
    assert "secret" not in public.state_dict()
    assert "secret" in private.state_dict()


@pytest.mark.parametrize(
    ("model", "after", "error", "words"),
    [
        (MODEL, "body", fheconv.UnsupportedLayerError, "needs stem besides the result of 'body'"),
        (MODEL, "neck", fheconv.InvalidArgumentError, "the model's modules are stem, stem.0"),
        (Twice(), "conv", fheconv.InvalidArgumentError, "calls 'conv' 2 times"),
        (Branching(), "conv", fheconv.UnsupportedLayerError, "torch.fx cannot trace"),
        (np.ones((3, 3)), "conv", fheconv.InvalidArgumentError, "takes a torch.nn.Module"),
    ],
    ids=["a branch", "no such name", "twice", "depends on values", "no model"],
)
def test_models_that_cannot_be_split_there_are_refused(model, after, error, words):
    with pytest.raises(error, match=words):
        fheconv.split(model, after=after)


@pytest.mark.slow
def test_the_public_part_runs_as_an_onnx_file_without_torch(tmp_path):
    public, _ = fheconv.split(MODEL, after="pool")
    x = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    file = onnx_files.exported(public, x, tmp_path / "public.onnx", "new, any batch")
    np.testing.assert_allclose(onnx_files.reference(file, x.numpy()), public(x).numpy(), atol=1e-6)


@pytest.mark.slow
def test_a_model_of_an_onnx_file_is_split_as_a_file(tmp_path):
    x = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    file = onnx_files.exported(MODEL.eval(), x, tmp_path / "whole.onnx", "old, any batch")
    with pytest.raises(fheconv.InvalidArgumentError, match=r"onnx\.utils\.extract_model"):
        fheconv.split(fheconv.from_onnx(file), after="pool")
    (pooled,) = (node.output[0] for node in onnx.load(file).graph.node if node.op_type == "AveragePool")
    (result,) = (output.name for output in onnx.load(file).graph.output)
    parts = [("public.onnx", "x", pooled), ("private.onnx", pooled, result)]
    for name, start, end in parts:
        onnx.utils.extract_model(file, tmp_path / name, [start], [end])
    features = onnx_files.reference(tmp_path / "public.onnx", x.numpy())
    private = fheconv.from_onnx(tmp_path / "private.onnx")
    with torch.no_grad():
        torch.testing.assert_close(private(torch.tensor(features)), MODEL(x), atol=1e-5, rtol=1e-4)


def test_the_private_part_runs_encrypted_on_what_the_public_one_returns():
    public, private = fheconv.split(MODEL, after="pool")
    x = torch.rand(20, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    features = public(x)
    network = fheconv.quantize(private, features)
    circuit = fheconv.compile(network)
    assert circuit.cost.lookups == 0
    circuit.keygen()
    scores = circuit.predict(features[:2], fhe="execute")
    np.testing.assert_allclose(scores, network(features[:2]))
    assert np.abs(scores - private(features[:2]).numpy()).max() < 0.1
