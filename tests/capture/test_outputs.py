"""One output of a model that returns several: in tuples, dicts, named tuples, dataclasses, one in another."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fheconv
from fheconv.capture.model import capture
from fheconv.capture.outputs import pick


class Named(NamedTuple):
    boxes: Tensor
    scores: Tensor


@dataclass
class Both:
    boxes: Tensor
    scores: Tensor


torch.export.register_dataclass(Both)


class Detector(nn.Module):
    """Boxes and scores of each place, as MTCNN's first network gives them (Zhang et al. 2016)."""

    def __init__(self, wrap=lambda boxes, scores: (boxes, scores)):
        super().__init__()
        torch.manual_seed(0)
        self.wrap = wrap
        self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.pool1 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x):
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        return self.wrap(self.conv4_2(x), self.conv4_1(x).softmax(1))


IMAGES = np.random.default_rng(0).random((6, 3, 12, 12))
WAYS = {
    "tuple": (lambda b, s: (b, s), 0, 1),
    "from the end": (lambda b, s: (b, s), -2, -1),
    "list": (lambda b, s: [b, s], 0, 1),
    "dict": (lambda b, s: {"scores": s, "boxes": b}, "boxes", "scores"),
    "dict by index": (lambda b, s: {"scores": s, "boxes": b}, 1, 0),
    "ordered dict": (lambda b, s: OrderedDict(scores=s, boxes=b), "boxes", "scores"),
    "named tuple": (Named, "boxes", "scores"),
    "named tuple by index": (Named, 0, 1),
    "dataclass": (Both, "boxes", "scores"),
    "one in another": (lambda b, s: (b, {"faces": [s]}), 0, (1, "faces", 0)),
    "beside what is no tensor": (lambda b, s: (None, b, 3, s), 1, 3),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("wrap", "boxes", "scores"), WAYS.values(), ids=WAYS)
def test_each_output_is_the_models(wrap, boxes, scores):
    model = Detector(wrap).double().eval()
    expected = Detector().double().eval()(torch.tensor(IMAGES))
    for outputs, values in zip((boxes, scores), expected, strict=True):
        network = capture(model, (3, 12, 12), outputs)
        np.testing.assert_allclose(network(IMAGES), values.detach().numpy(), rtol=1e-9, atol=1e-9)


def test_an_exported_program_has_its_outputs_too():
    batch = {0: torch.export.Dim("batch")}
    for wrap in (None, Named):
        model = (Detector(wrap) if wrap else Detector()).eval()
        program = torch.export.export(model, (torch.zeros(2, 3, 12, 12),), dynamic_shapes=(batch,))
        network = capture(program, (3, 12, 12), 1)
        expected = model(torch.tensor(IMAGES, dtype=torch.float32))[1]
        np.testing.assert_allclose(network(IMAGES), expected.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_only_what_an_output_needs_is_compiled():
    """Names of layers are the model's own."""
    module = Detector(lambda boxes, scores: (boxes, scores * scores))  # a product of encrypted values
    names = [layer.name for layer in capture(module, (3, 12, 12), 0).layers]
    assert "conv4_2" in names
    assert "conv4_1" not in names
    with pytest.raises(fheconv.UnsupportedLayerError):
        capture(module, (3, 12, 12), 1)


def test_a_softmax_before_the_result_is_computed_in_clear():
    """So that the integers are the scores, and what is decrypted are probabilities."""
    network = fheconv.quantize(Detector(), IMAGES, outputs=1)
    assert network.output_shape == (2, 1, 1)
    np.testing.assert_allclose(network(IMAGES).sum(axis=1), 1)
    scores = network.integers(IMAGES) * network.last.scale
    assert not np.allclose(scores.sum(axis=1), 1)
    np.testing.assert_array_equal(scores.argmax(axis=1), network(IMAGES).argmax(axis=1))


class Classifier(nn.Module):
    """A classifier that returns its features as well."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(1, 2, 3), nn.Linear(8, 3)

    def forward(self, x):
        features = self.conv(x).relu().flatten(1)
        return {"features": features, "logits": self.fc(features)}


@pytest.mark.slow
def test_one_output_is_tuned_and_fine_tuned():
    images = np.random.default_rng(0).random((20, 1, 4, 4), np.float32)
    model = Classifier()
    classes = model(torch.tensor(images))["logits"].argmax(1)
    result = fheconv.tune(
        model,
        images,
        evaluation=(images, classes),
        widths=[(5, None)],
        p_errors=[0.01],
        max_drop=0.99,
        outputs="logits",
    )
    assert result.float_accuracy == 1
    network = fheconv.finetune(result.points[0].network, (images, classes), epochs=1)
    assert network.output_shape == (3,)


@pytest.mark.parametrize(
    ("model", "outputs", "words"),
    [
        (Detector(), 2, r"outputs=2: the model returns 2 values, 0 and 1"),
        (Detector(), "boxes", r"outputs='boxes': the model returns 2 values, 0 and 1"),
        (Detector(), 1.5, "outputs=1.5"),
        (Detector(Named), "faces", "2 values, 'boxes' and 'scores'"),
        (Detector(lambda b, s: (b, {"faces": s})), 1, r"1 value, 'faces'; .* outputs=\(1, 'faces'\)"),
        (nn.Sequential(nn.Conv2d(3, 1, 1), nn.ReLU()), 0, "one tensor"),
        (nn.Conv2d(3, 1, 1), 0, "leave outputs out"),
    ],
)
def test_what_cannot_be_picked_is_refused_with_the_choices(model, outputs, words):
    with pytest.raises(fheconv.InvalidArgumentError, match=words):
        fheconv.quantize(model, IMAGES, outputs=outputs)


def test_several_outputs_without_a_choice_are_named():
    for wrap, names in ((None, "0 and 1"), (Named, "'boxes' and 'scores'")):
        model = Detector(wrap) if wrap else Detector()
        with pytest.raises(fheconv.UnsupportedLayerError, match=rf"2 values, {names};.*outputs="):
            fheconv.quantize(model, IMAGES)


def test_an_output_that_is_no_tensor_is_refused():
    model = Detector(lambda boxes, scores: (3, boxes))
    with pytest.raises(fheconv.UnsupportedLayerError, match="constant"):
        fheconv.quantize(model, IMAGES, outputs=0)


def test_an_output_that_draws_at_random_is_refused():
    module = Detector(lambda boxes, scores: (boxes + np.random.rand(), scores))  # noqa: NPY002
    with pytest.raises(fheconv.UnsupportedLayerError, match="draws at random"):
        capture(module, (3, 12, 12), 0)
    assert capture(module, (3, 12, 12), 1).layers


def test_none_picks_everything():
    assert pick((1, 2), None) == (1, 2)
