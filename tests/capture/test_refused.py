"""What is not linear, mixes images, draws at random or depends on data is refused, and its operator named."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fheconv import UnsupportedLayerError
from fheconv.capture.model import capture
from tests.support.captured import Fn


def masked_write(m, x):
    y = x.clone()
    y[y > 0] = x.flip(1)[y > 0]
    return y


def write_at_places_of_the_image(m, x):
    y = x.clone()
    y[:, x[0, 0].argmax() % 3] = 0
    return y


def row_of_another_image(m, x):
    y = x.clone()
    y[0] = x[1]
    return y


def image_by_image(m, x):
    return torch.stack([part * number for number, part in enumerate(x)])


def branch(m, x):
    return x if x.sum() > 0 else -x


class AlwaysTraining(nn.BatchNorm2d):
    """A BatchNorm that stays in training mode."""

    def train(self, mode=True):
        return super().train(True)


# The function, and the operator that the error names.
REFUSED = {
    "sort": (lambda m, x: x.sort(1)[0], "sort"),
    "argsort": (lambda m, x: x.argsort(1).double(), "argsort"),
    "topk": (lambda m, x: x.topk(2, 1)[0], "topk"),
    "median": (lambda m, x: x.median(1)[0], "median"),
    "kthvalue": (lambda m, x: x.kthvalue(1, 1)[0], "kthvalue"),
    "mode": (lambda m, x: x.mode(1)[0], "mode"),
    "cummax": (lambda m, x: x.cummax(1)[0], "cummax"),
    "cumprod": (lambda m, x: x.cumprod(1), "cumprod"),
    "prod": (lambda m, x: x.prod(1), "prod"),
    "logsumexp": (lambda m, x: x.logsumexp(1), "logsumexp"),
    "norm": (lambda m, x: F.normalize(x), "linalg_vector_norm"),
    "standard deviation": (lambda m, x: x.std(1), "std"),
    "matrix product with itself": (lambda m, x: x @ x, "matmul"),
    "bmm with itself": (lambda m, x: torch.bmm(x[:, 0], x[:, 1]), "bmm"),
    "einsum with itself": (lambda m, x: torch.einsum("nchw,nchv->nchwv", x, x), "einsum|bmm|mul"),
    "lerp by the image": (lambda m, x: torch.lerp(x, x + 1, x), "lerp"),
    "weights of the image": (lambda m, x: F.conv2d(x, x), "conv2d"),
    "where on the image": (lambda m, x: torch.where(x > x.flip(1), x, 2 * x), "gt"),
    "masked_fill": (lambda m, x: x.masked_fill(x.flip(1) > 0, 0.0), "masked_fill"),
    "nan_to_num of a sum": (lambda m, x: x.nansum(1), "nansum"),
    "attention": (lambda m, x: F.scaled_dot_product_attention(x, x, x), "scaled_dot_product_attention"),
    "magnitude of a spectrum": (lambda m, x: torch.fft.rfft(x).abs(), "abs"),
    "determinant": (lambda m, x: torch.linalg.det(x), "linalg_det"),
    "index by the image": (lambda m, x: m.table[x[:, 0].long().clamp(0, 3)], "index"),
    "embedding": (lambda m, x: F.embedding(x.long().clamp(0, 3), m.table), "embedding"),
    "gather by the image": (lambda m, x: x.gather(1, x.argsort(1)), "argsort"),
    "write where the image says": (masked_write, "index"),
    "nonzero": (lambda m, x: x.nonzero().double(), "nonzero"),
    "unique": (lambda m, x: x.unique().expand(len(x), -1), "unique2"),
    "histogram": (lambda m, x: torch.histc(x).expand(len(x), -1), "histc"),
    "item": (lambda m, x: x * x.sum().item(), "sum"),
    "mean of a batch": (lambda m, x: x - x.mean(0), "mean"),
    "sum of everything": (lambda m, x: x - x.sum(), "sum"),
    "largest of a batch": (lambda m, x: x - x.amax(0), "amax"),
    "cumsum of a batch": (lambda m, x: x.cumsum(0), "cumsum"),
    "roll of a batch": (lambda m, x: x.roll(1, 0), "roll"),
    "flip of a batch": (lambda m, x: x.flip(0), "flip"),
    "first of a batch": (lambda m, x: x[:1].expand(len(x), -1, -1, -1), "slice|expand"),
    "concatenated batches": (lambda m, x: torch.cat([x, x]), "cat"),
    "difference of a batch": (lambda m, x: x.diff(dim=0, prepend=x[:1]), "cat|slice|diff"),
    "row of another image": (row_of_another_image, "select"),
    "image by image": (image_by_image, "unbind"),
    "constants that differ between images": (
        lambda m, x: x + torch.arange(len(x))[:, None, None, None], "add"
    ),
    "attention's dropout": (
        lambda m, x: F.scaled_dot_product_attention(m.table, m.table, x, dropout_p=0.5),
        "scaled_dot_product_attention",
    ),
    "BatchNorm in training": (
        lambda m, x: F.batch_norm(x, torch.zeros(3).to(x), torch.ones(3).to(x), training=True), "batch_norm"
    ),
    "BatchNorm without statistics": (lambda m, x: F.batch_norm(x, None, None, training=True), "batch_norm"),
    "InstanceNorm": (lambda m, x: F.instance_norm(x), "instance_norm"),
    "LayerNorm": (lambda m, x: F.layer_norm(x, (4,)), "layer_norm"),
    "GroupNorm": (lambda m, x: F.group_norm(x, 3), "group_norm"),
}  # fmt: skip


DRAWS = {
    "dropout": (lambda m, x: F.dropout(x, 0.5, True), "dropout"),
    "dropout of everything": (lambda m, x: F.dropout(x, 1.0, True), "dropout"),
    "feature dropout": (lambda m, x: F.dropout2d(x, 0.5, True), "bernoulli|dropout"),
    "folded dropout": (
        lambda m, x: F.dropout(x.flatten(0, 1), 0.5, True).reshape(x.shape), "dropout"
    ),
    "rrelu": (lambda m, x: F.rrelu(x, training=True), "rrelu"),
    "gumbel softmax": (lambda m, x: F.gumbel_softmax(x), "exponential"),
    "fractional pooling": (lambda m, x: F.fractional_max_pool2d(x, 2, 2), "rand"),
    "folded noise": (
        lambda m, x: (x.flatten(0, 1) + torch.rand_like(x.flatten(0, 1))).reshape(x.shape), "rand_like"
    ),
    "noise in place": (lambda m, x: x + torch.zeros(4).normal_(), "normal"),
    "seeded noise": (
        lambda m, x: x * torch.rand(4, generator=torch.Generator().manual_seed(0)), "rand"
    ),
    "random permutation": (lambda m, x: x[..., torch.randperm(4)], "randperm"),
}  # fmt: skip


def refused(function, operators, words=""):
    model = Fn(function, table=nn.Parameter(torch.ones(4, 4))).double()
    with pytest.raises(UnsupportedLayerError, match=rf"operator '\w*({operators})\w*', cannot.*{words}"):
        capture(model, (3, 4, 4))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.sampled(3)
def test_refused_by_the_operator(name):
    refused(*REFUSED[name])


@pytest.mark.parametrize(
    ("function", "line"),
    [(branch, r"return x if x\.sum"), (write_at_places_of_the_image, r"y\[:, x\[0, 0\]\.argmax")],
)
def test_a_path_that_depends_on_the_image(function, line):
    """The error shows the line, and not the pages that torch writes about it."""
    with pytest.raises(UnsupportedLayerError, match=rf"path depends on the values.*{line}") as caught:
        capture(Fn(function), (3, 4, 4))
    assert "\n" not in str(caught.value)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", DRAWS)
def test_random_draws_are_refused(name):
    refused(*DRAWS[name], words="draws at random")


def test_a_module_that_never_leaves_training():
    with pytest.raises(UnsupportedLayerError, match=r"batch_norm.*running statistics"):
        capture(nn.Sequential(AlwaysTraining(3), nn.ReLU()), (3, 4, 4))


class Counting(nn.Module):
    """A model that multiplies by how often it ran."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.plain = kind, 0.0
        self.register_buffer("buffer", torch.zeros(()))

    def forward(self, x):
        self.buffer += 1
        self.plain += 1
        return x * (self.buffer if self.kind == "buffer" else self.plain)


@pytest.mark.parametrize(
    "model",
    [
        Counting("buffer"),
        Counting("plain"),
        Fn(lambda m, x: x * random.random()),
        Fn(lambda m, x: x + torch.from_numpy(np.random.default_rng().random(4))),
    ],
)
def test_runs_that_do_not_repeat_their_results(model):
    """Of numbers drawn outside torch a graph shows constants, and nothing else."""
    with pytest.raises(UnsupportedLayerError, match=r"differ between two runs on the same images"):
        capture(model, (3, 4, 4))


def test_capture_leaves_buffers_as_they_were():
    model = Counting("buffer")
    with pytest.raises(UnsupportedLayerError):
        capture(model, (3, 4, 4))
    assert model.buffer == 0


def test_a_buffer_that_nothing_reads_may_change():
    def counted(m, x):
        m.count += 1
        return 2 * x

    model = Fn(counted)
    model.register_buffer("count", torch.zeros(()))
    assert len(capture(model, (3, 4, 4)).layers) == 1
    assert model.count == 0


@pytest.mark.parametrize(
    "function",
    [lambda m, x: x * len(x), lambda m, x: x / x.shape[0], lambda m, x: x + len(x.tolist())],
)
def test_results_that_depend_on_the_size_of_the_batch(function):
    with pytest.raises(UnsupportedLayerError, match="in batches of 2 and of 3"):
        capture(Fn(function), (3, 4, 4))


def test_a_batch_of_one_size_only():
    with pytest.raises(UnsupportedLayerError, match="batch of 2 images, but not of 3"):
        capture(Fn(lambda m, x: x.reshape(2, 48)), (3, 4, 4))
