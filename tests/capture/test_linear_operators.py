"""Whatever torch can show to be linear is taken as linear, and nothing that bends."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fheconv import UnsupportedLayerError
from fheconv.capture.model import capture
from fheconv.capture.proof import is_affine
from tests.support.captured import Fn, check, cost
from tests.support.weighing import weights


def constants(*shape):
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(1)))


def assigned(m, x):
    y = x.clone()
    y[:, 0] = 1.5
    y[:, 1, 1:3] = m.w
    y[:, [0, 1], [1, 2]] = m.v
    return y


def added_in_place(m, x):
    y = x.clone()
    y[:, :, ::2] += 2 * x[:, :, 1::2]
    return y


@pytest.mark.parametrize(
    ("function", "parts", "shape"),
    [
        (lambda m, x: F.fold(x, (4, 4), 2), {}, (8, 9)),
        (lambda m, x: F.fold(F.unfold(x, 3, padding=1), (4, 4), 3, padding=1), {}, (2, 4, 4)),
        (lambda m, x: F.fold(m.c(F.unfold(x, 2, stride=2)), (4, 4), 2, stride=2), {"c": nn.Conv1d(8, 4, 1)},
         (2, 4, 4)),
        (lambda m, x: torch.tensordot(x, m.w, ([1, 2], [0, 1])), {"w": constants(2, 4, 3)}, (2, 4, 4)),
        (lambda m, x: torch.bmm(x, m.w.expand(x.shape[0], 4, 3)), {"w": constants(1, 4, 3)}, (2, 4)),
        (lambda m, x: torch.bmm(m.w.expand(x.shape[0], 3, 2), x), {"w": constants(1, 3, 2)}, (2, 4)),
        (lambda m, x: torch.matmul(x, m.w), {"w": constants(2, 4, 3)}, (2, 4, 4)),
        (lambda m, x: torch.einsum("nchw,chk->nkw", x, m.w), {"w": constants(2, 4, 3)}, (2, 4, 4)),
        (lambda m, x: torch.einsum("nii->n", x)[:, None], {}, (4, 4)),
        (lambda m, x: torch.baddbmm(m.w, x, m.w.expand_as(x)), {"w": constants(1, 4, 4)}, (4, 4)),
        (lambda m, x: torch.lerp(m.a(x), x, 0.3), {"a": nn.Conv2d(2, 2, 1)}, (2, 4, 4)),
        (lambda m, x: torch.lerp(x, m.w, m.v), {"w": constants(2, 4, 4), "v": constants(4)}, (2, 4, 4)),
        (lambda m, x: torch.addcmul(m.w, x, m.w, value=0.5), {"w": constants(2, 4, 4)}, (2, 4, 4)),
        (lambda m, x: torch.addcdiv(m.w, x, m.w, value=0.5), {"w": constants(2, 4, 4)}, (2, 4, 4)),
        (lambda m, x: torch.diff(x), {}, (2, 4, 4)),
        (lambda m, x: torch.diff(x, n=2, dim=1), {}, (4, 4)),
        (lambda m, x: x.cumsum(1), {}, (3, 4, 4)),
        (lambda m, x: torch.trapezoid(x), {}, (2, 5)),
        (lambda m, x: torch.linalg.cross(x, m.w.expand_as(x)), {"w": constants(3)}, (2, 3)),
        (lambda m, x: torch.kron(m.w, x), {"w": constants(1, 2, 2)}, (3, 2)),
        (lambda m, x: x.index_add(1, m.i, x[:, :1]), {"i": nn.Parameter(torch.tensor([2]), False)}, (3, 2)),
        (lambda m, x: x.gather(1, m.i.expand(x.shape[0], 2)),
         {"i": nn.Parameter(torch.tensor([[2, 0]]), False)}, (3,)),
        (lambda m, x: F.interpolate(x, (5, 5), mode="bilinear", antialias=True), {}, (2, 9, 9)),
        (lambda m, x: F.interpolate(x, (5, 7), mode="bicubic", antialias=True), {}, (2, 9, 9)),
        (lambda m, x: F.interpolate(x, (13, 12), mode="bicubic"), {}, (2, 9, 9)),
        (lambda m, x: F.interpolate(x, 7, mode="area"), {}, (2, 9)),
        (lambda m, x: F.grid_sample(x, m.g.expand(x.shape[0], 3, 3, 2), align_corners=False),
         {"g": nn.Parameter(torch.rand(1, 3, 3, 2) * 2 - 1)}, (2, 4, 4)),
        (lambda m, x: F.bilinear(x, m.v.expand(x.shape[0], 3), m.w),
         {"v": constants(1, 3), "w": constants(2, 4, 3)}, (4,)),
        (lambda m, x: torch.fft.irfft2(torch.fft.rfft2(x) * m.w, s=x.shape[-2:]),
         {"w": constants(2, 5, 3)}, (2, 5, 4)),
        (lambda m, x: torch.view_as_real(torch.fft.fft(x) * torch.view_as_complex(m.w)).flatten(2),
         {"w": constants(4, 2)}, (2, 4)),
        (lambda m, x: torch.stft(x, 4, window=m.w, return_complex=True).imag, {"w": constants(4)}, (16,)),
        (lambda m, x: (x.to(torch.complex128).cumsum(1) * 1j).imag.to(x.dtype), {}, (3, 4)),
        (assigned, {"w": constants(2, 4), "v": constants(2, 4)}, (2, 4, 4)),
        (added_in_place, {}, (2, 4, 4)),
        (lambda m, x: torch.slice_scatter(x, m.w.expand(x.shape[0], 2, 1, 4), 2, 1, 2),
         {"w": constants(1, 2, 1, 4)}, (2, 4, 4)),
        (lambda m, x: torch.diagonal_scatter(x, m.w.expand(x.shape[0], 4), dim1=1, dim2=2),
         {"w": constants(1, 4)}, (4, 4)),
    ],
)  # fmt: skip
@pytest.mark.sampled(4)
def test_linear_functions(function, parts, shape):
    network = check(Fn(function, **parts), shape)
    assert cost(network) == 0
    check(nn.Sequential(Fn(function, **parts), nn.ReLU()), shape)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.AvgPool1d(2, ceil_mode=True), (2, 5)),
        (nn.AvgPool1d(3, padding=1, count_include_pad=False), (2, 5)),
        (nn.AvgPool1d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False), (2, 6)),
        (nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False), (2, 6, 6)),
        (nn.AvgPool3d(2, padding=1, count_include_pad=False), (2, 3, 3, 3)),
        (nn.AdaptiveAvgPool1d(3), (2, 7)),
        (nn.AdaptiveAvgPool2d((3, 2)), (2, 7, 5)),
        (nn.AdaptiveAvgPool3d(2), (1, 3, 3, 3)),
        (nn.Fold((4, 4), 2, stride=2), (8, 4)),
    ],
)
@pytest.mark.sampled(2)
def test_layers_with_windows_that_differ(layer, shape):
    check(layer, shape)
    check(nn.Sequential(nn.ReLU(), layer, nn.Sigmoid()), shape)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", [nn.InstanceNorm1d, nn.InstanceNorm2d])
@pytest.mark.parametrize("affine", [False, True])
def test_instance_norm_with_statistics_that_are_constants(kind, affine):
    norm = kind(2, affine=affine, track_running_stats=True)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if affine:
        norm.weight.data.normal_()
    check(norm, (2, 5) if kind is nn.InstanceNorm1d else (2, 4, 4))


def test_many_spectra_that_read_one_another():
    """Each is computed once: followed anew for each of its readers, the last would take 2^30 transforms."""

    def function(m, x):
        y = torch.fft.fft(x)
        for _ in range(30):
            y = y + y.roll(1, 1) / 2
        return y.real

    check(Fn(function), (4,))


def test_uneven_averages_have_no_weights_of_their_own():
    """Only the ones that multiply sums: so a convolution before them keeps its few weights."""
    conv = nn.Conv2d(1, 2, 3, padding=1)
    network = check(nn.Sequential(conv, nn.AvgPool2d(2, ceil_mode=True), nn.ReLU()), (1, 33, 33))
    assert weights(network) <= 4 * conv.weight.numel()
    check(nn.Sequential(nn.ReLU(), nn.AvgPool2d(2, ceil_mode=True)), (1, 129, 129))


BENDS = [
    lambda x: x.sort(1)[0],
    lambda x: x.sort(1)[0].sum(1),
    lambda x: x.median(1)[0],
    lambda x: x.cummax(1)[0],
    lambda x: x.kthvalue(1, 1)[0],
    lambda x: x.topk(2, 1)[0],
    lambda x: x.logsumexp(1),
    lambda x: x.renorm(2, 1, 1e6),
    lambda x: x.cumprod(1),
    lambda x: x.abs(),
    torch.relu,
    lambda x: x.clamp(-1e40),
    lambda x: x.clamp(max=1e40),
    lambda x: F.hardshrink(x, 1e-40),
    lambda x: F.softshrink(x, 1e-40),
    lambda x: F.leaky_relu(x, 1 - 1e-15),
    lambda x: torch.fmod(x, 1e40),
    lambda x: torch.remainder(x, 1e40),
    lambda x: x.frac(),
    lambda x: x.floor(),
    lambda x: x - x.round(),
    lambda x: x.trunc(),
    lambda x: x.sign(),
    lambda x: torch.heaviside(x, x.new_ones(())),
    lambda x: torch.floor_divide(x, 1e-40),
    lambda x: torch.div(x, 3, rounding_mode="floor"),
    lambda x: (x > 1e40).double(),
    lambda x: x + (x > 1e40),
    lambda x: x.to(torch.int64).double(),
    lambda x: x * x,
    lambda x: torch.where(x > 0, x, x),
    lambda x: x.max(1)[0],
    lambda x: x.amax(1),
    lambda x: x.argmax(1).double(),
    lambda x: F.max_pool1d(x[:, None], 2),
    lambda x: torch.cdist(x, x),
    lambda x: x.norm(dim=1),
    lambda x: x.nan_to_num(posinf=1e300),
    lambda x: torch.maximum(x, x - 1e40),
    lambda x: F.dropout(x, 0.5, True),
    lambda x: x + torch.rand_like(x),
    lambda x: torch.copysign(x, x),
    lambda x: x[:, x[0].argsort()],
    lambda x: x.gather(1, x.argsort(1)),
    lambda x: torch.bucketize(x, torch.tensor([1e40])).double() + x,
    lambda x: x.masked_fill(x > 1e40, 0.0),
    lambda x: torch.nextafter(x, x + 1),
    lambda x: x.logit(),
    lambda x: torch.quantile(x, 0.5, dim=1),
    lambda x: torch.fake_quantize_per_tensor_affine(x, 1e-40, 0, 0, 255),
    lambda x: F.rrelu(x, training=True),
    lambda x: torch.complex(x, x).abs(),
    lambda x: x.mode(1)[0],
    lambda x: torch.hypot(x, torch.zeros_like(x)),
    lambda x: x if x.sum() > 0 else -x,
]


@pytest.mark.parametrize("function", BENDS)
def test_nothing_that_bends_is_proved(function):
    """Not even where the bend lies beyond, or below, any image that might be tried."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not is_affine(function, [torch.zeros(2, 4, dtype=torch.float64)])


def test_what_is_linear_is_proved():
    x = torch.zeros(2, 4, dtype=torch.float64)
    assert is_affine(lambda x: 2 * x + 1, [x])
    assert is_affine(lambda x, y: x.flip(1) - y.cumsum(1) / 3, [x, x])
    assert not is_affine(lambda x, y: x * y, [x, x])


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (x > 0) + (x > 1),
        lambda m, x: x.logcumsumexp(1),
        lambda m, x: x.cumprod(1),
        lambda m, x: torch.bmm(x, x),
        lambda m, x: torch.lerp(x, x * 2, x),
        lambda m, x: F.fold(x.roll(1, 0), (3, 3), 2),
        lambda m, x: torch.tensordot(x, torch.ones(x.shape[0], 4), ([0], [0])),
        lambda m, x: torch.cumsum(x, 0),
    ],
)
def test_what_is_not_linear_in_each_image_is_refused(function):
    with pytest.raises(UnsupportedLayerError):
        capture(Fn(function), (4, 4))
