"""Fine-tuning: it learns, keeps what is proved, and gives back nothing worse than it got."""

from functools import cache
from itertools import count
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import fheconv
from fheconv.networks.bounds import layer_bounds, worst_case_inputs
from fheconv.training.thinning import lookups
from fheconv.training.trainable import TrainableNetwork
from tests.support.nets import BLOCKS, integer_images, quantize, quantized, random_net, real_images

SHAPE = (1, 5, 5)


def problem(seed, n):
    """Images of three patterns under noise, and which pattern each is."""
    rng = np.random.default_rng(seed)
    patterns = np.random.default_rng(7).uniform(0, 1, (3, *SHAPE))
    labels = rng.integers(0, 3, n)
    images = 0.5 * patterns[labels] + 0.5 * rng.uniform(0, 1, (n, *SHAPE))
    return images.astype(np.float32).clip(0.01, 0.99), labels


def images_of(seed, n):
    return problem(seed, n)[0]


def trained_module():
    """A network of two convolutions and a linear layer that tells the patterns apart."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip
    images, labels = map(torch.tensor, problem(0, 240))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.03)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(images), labels).backward()
        optimizer.step()
    return module.double()


MODULE = trained_module()
# Widths that are proved, and windows that are not: the latter are trained in floats and quantized again.
KINDS = {
    "proved": {},
    "windows": {"accumulator_bits": None, "activation_bits": None, "rounding_bits": 3, "overflow": "defined"},
}


def small(**options):
    return quantize(MODULE, images_of(0, 60), **{"accumulator_bits": 5, "activation_bits": 2, **options})


def badly_calibrated():
    """A network with accumulators of 4 bits, calibrated on noise, so that much is left to learn."""
    noise = np.random.default_rng(0).uniform(
        *(images_of(0, 60).min(), images_of(0, 60).max()), (60, *images_of(0, 1).shape[1:])
    )
    return quantize(MODULE, noise, accumulator_bits=4, activation_bits=2, input_bits=2)


def error(network, teacher, images):
    """The mean squared error to what the float network computes, as a share of its variance."""
    meant = teacher(images)
    return float(np.square(network(images) - meant).mean() / meant.var())


def cross_entropy(logits, labels):
    return float(nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels)))


def classes(images):
    """What the float network says."""
    return small().source(images).argmax(axis=1)


def same(a, b, images):
    return np.array_equal(a.integers(images), b.integers(images)) and np.array_equal(a(images), b(images))


@cache
def narrow_and_tuned():
    """A network before and after training."""
    network = badly_calibrated()
    return network, fheconv.finetune(network, images_of(0, 240), epochs=60, batch_size=32)


@pytest.mark.slow
def test_it_learns_what_the_float_network_computes():
    """On images that were neither trained on nor held out."""
    network, tuned = narrow_and_tuned()
    others = images_of(1, 500)
    before, after = (error(one, network.source, others) for one in (network, tuned))
    assert after < 0.8 * before
    assert tuned.budget(4).fits
    assert tuned.config == network.config


def test_it_learns_classes():
    """Also those that the float network does not know: each class has the next one's number."""
    network = badly_calibrated()
    images, labels = problem(0, 240)
    tuned = fheconv.finetune(network, (images, (labels + 1) % 3), epochs=60, batch_size=32)
    images, labels = problem(1, 500)
    before, after = (cross_entropy(one(images), (labels + 1) % 3) for one in (network, tuned))
    assert after < 0.8 * before
    assert tuned.budget(4).fits


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("options", [{"accumulator_bits": 8}, {"rounding_bits": 4}], ids=str)
@pytest.mark.sampled(7)
def test_every_epoch_keeps_the_proof(block, options):
    """Widths by exact bounds, and inputs that reach them stay within 2^P − 1."""
    network = quantized(7, block, size=(1, 5, 6), **options)
    images = random_net(7, block, size=(1, 5, 6))[1].astype(np.float32).clip(*ends(network))
    epochs = []

    def recorded(module, calibration, original=TrainableNetwork.quantized):
        epochs.append(original(module, calibration))
        return epochs[-1]

    with mock.patch.object(TrainableNetwork, "quantized", recorded):
        fheconv.finetune(network, images, epochs=2, batch_size=3, learning_rate=0.3)
    assert len(epochs) == 2
    for one in epochs:
        assert one.budget().proved
        for layer, before in zip(one.layers, network.layers, strict=True):
            if getattr(layer, "lookup", None) is None:
                continue
            limit = network.config.accumulator_bits_of(layer.name, looks_up=True)
            assert layer.lookup.bits <= limit
            assert layer.lookup.output == before.lookup.output
            bounds = layer_bounds(layer, one.shapes)
            assert (bounds.channel_minimum >= layer.lookup.minimum).all()
            assert (bounds.channel_maximum - layer.lookup.minimum < 2**limit).all()
            if layer.convolution is not None:
                witnesses = worst_case_inputs(layer, one.shapes[layer.sources[0]], bounds)
                reached = layer.accumulate([witnesses] * (layer.sources[0] + 1))
                offset = np.moveaxis(reached, 1, -1) - layer.lookup.minimum
                assert 0 <= offset.min() <= offset.max() < 2**limit
        q = integer_images(one, 0, 3)
        assert np.isfinite(one(real_images(one, q))).all()


def ends(network):
    """The least and the greatest real image value."""
    q = network.input
    return ((end - q.zero_point) * q.scale for end in (q.minimum, q.maximum))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learning_rate", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("labelled", [False, True])
def test_nothing_worse_than_given_comes_back(learning_rate, labelled, kind):
    network, images, held_out = small(**KINDS[kind]), images_of(0, 40), images_of(2, 30)
    data, validation = images, held_out
    if labelled:
        data, validation = (images, classes(images)), (held_out, classes(held_out))
    tuned = fheconv.finetune(
        network, data, validation=validation, epochs=4, learning_rate=learning_rate, batch_size=16
    )

    def loss(one):
        if not labelled:
            return error(one, network.source, held_out)
        logits, meant = (torch.tensor(part(held_out)) for part in (one, network.source))
        soft = nn.functional.kl_div(
            *(nn.functional.log_softmax(part / 2, dim=1) for part in (logits, meant)),
            log_target=True,
            reduction="batchmean",
        )
        return float(nn.functional.cross_entropy(logits, torch.tensor(classes(held_out))) + 4 * soft)

    assert loss(tuned) <= loss(network)
    assert tuned.config == network.config
    if kind == "proved":
        assert tuned.budget(5).fits


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_fixes_everything_and_the_callers_generator_is_left_alone(kind):
    network, images = small(**KINDS[kind]), images_of(0, 40)

    def last(seed):
        """What the last epoch leaves: each held-out loss is taken for the least."""
        with mock.patch("fheconv.training.finetuning.held_out_loss", side_effect=count(0, -1)):
            return fheconv.finetune(
                network,
                images,
                epochs=4,
                learning_rate=0.1,
                batch_size=8,
                augment=lambda x: (x + 0.1 * torch.rand_like(x)).clamp(0, 1),
                seed=seed,
            )

    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = last(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert same(one, last(3), images)
    assert not same(one, last(4), images)
    assert not same(one, network, images)


def test_augmented_images_are_learned_with_what_the_float_network_makes_of_them():
    seen = []

    def flipped(batch):
        seen.append(len(batch))
        return batch.flip(-1).double()

    network = small()
    fheconv.finetune(network, images_of(0, 30), validation=images_of(1, 10), augment=flipped, epochs=2)
    assert sum(seen) == 60


def test_patience_counts_epochs_without_a_better_loss():
    network, images = small(), images_of(0, 20)
    measured = []

    def unchanged(module, calibration):
        measured.append(module)
        return network

    with mock.patch.object(TrainableNetwork, "quantized", unchanged):
        assert fheconv.finetune(network, images, epochs=10, patience=3) is network
        assert len(measured) == 3
        measured.clear()
        # Of so many epochs only one in three is measured, and none goes by unmeasured.
        fheconv.finetune(network, images, epochs=120, patience=2)
        assert len(measured) == 1


@pytest.mark.parametrize("images", [images_of(0, 20) * 16, np.rint(images_of(0, 20) * 15).astype(np.int64)])
def test_images_of_any_range(images):
    network = quantize(MODULE, images, accumulator_bits=6, activation_bits=2)
    tuned = fheconv.finetune(network, images, epochs=3, learning_rate=0.1)
    assert tuned.input == network.input
    held = images[:5]
    assert np.isfinite(tuned(held)).all()
    assert fheconv.finetune(network, torch.tensor(images), epochs=1).budget(6).fits


@pytest.mark.parametrize("options", [{}, {"accumulator_bits": 6}], ids=str)
def test_a_network_may_be_one_convolution(options):
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 1, (60, 1, 6, 6))
    conv = fheconv.Conv.of(rng.normal(size=(2, 1, 3, 3)), rng.normal(size=2), padding=1)
    network = fheconv.quantize(conv, images, fheconv.QuantConfig(weight_bits=3, input_bits=2, **options))
    tuned = fheconv.finetune(network, images, epochs=10)
    assert tuned.budget().accumulator_bits <= network.budget().accumulator_bits
    assert error(tuned, network.source, images) <= error(network, network.source, images)


def test_one_image_a_batch_and_one_result_are_enough():
    """Errors are counted in the variance of all results, not of a batch."""
    module = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(9, 1))
    network = quantize(module, images_of(0, 9), accumulator_bits=6)
    tuned = fheconv.finetune(network, images_of(0, 9), batch_size=1, epochs=3)
    assert np.isfinite(tuned(images_of(0, 9))).all()
    fheconv.finetune(network, images_of(0, 2), epochs=2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lookup_budget_is_kept(kind):
    network, images = small(**{"accumulator_bits": 7, **KINDS[kind]}), images_of(0, 60)
    every = lookups(network.source)
    tuned = fheconv.finetune(network, images, epochs=3, lookup_budget=every // 2)
    assert tuned.budget().lookups <= every // 2 < network.budget().lookups
    if kind == "proved":
        assert tuned.budget(7).fits
    # Where it is kept already, nothing changes but the weights.
    assert lookups(fheconv.finetune(network, images, epochs=1, lookup_budget=every).source) == every
    with pytest.raises(fheconv.InvalidArgumentError, match=r"lookup_budget=1 is too small.* needs \d+"):
        fheconv.finetune(network, images, epochs=1, lookup_budget=1)


def test_an_encrypted_run_gives_the_clear_integers():
    network, tuned = narrow_and_tuned()
    images = images_of(2, 1)
    circuit = fheconv.compile(tuned, fheconv.CompileConfig(p_error=1e-6))
    circuit.keygen()
    got = circuit.decrypt(circuit.run(circuit.encrypt(images)), dequantize=False)
    np.testing.assert_array_equal(got, tuned.integers(images))
    assert not same(network, tuned, images_of(3, 50))


def test_maxima_give_way_to_averages_within_a_lookup_budget():
    torch.manual_seed(0)
    pooled = nn.Sequential(nn.Conv2d(1, 1, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        pooled[0].weight.abs_()  # so that sums are not all below 0
    images = images_of(0, 60)
    network = quantize(pooled.double(), images, overflow="defined", rounding_bits=4)
    tuned = fheconv.finetune(network, images, epochs=3, lookup_budget=4)
    assert (network.budget().lookups, tuned.budget().lookups) == (16 + 8 + 4, 4)
    assert np.isfinite(tuned(images)).all()


@cache
def windows_and_tuned():
    """A network with lookups of 3 bits, before and after it learned other classes, as above."""
    network, (images, labels) = small(**KINDS["windows"]), problem(0, 240)
    return network, fheconv.finetune(network, (images, (labels + 1) % 3), epochs=60, batch_size=32)


@pytest.mark.slow
def test_windows_follow_the_weights():
    network, tuned = windows_and_tuned()
    images, labels = problem(1, 500)
    before, after = (cross_entropy(one(images), (labels + 1) % 3) for one in (network, tuned))
    assert after < 0.8 * before
    assert tuned.config == network.config
    for layer, trained in zip(network.layers, tuned.layers, strict=True):
        if layer.lookup is not None:
            assert not trained.lookup.proved
            assert trained.lookup.bits == layer.lookup.bits
            assert trained.lookup.column_bits == layer.lookup.column_bits
            assert (trained.lookup.minimum != layer.lookup.minimum).any()
    assert tuned.source is not network.source


@pytest.mark.slow
def test_an_encrypted_run_of_trained_windows_agrees_with_the_clear_integers():
    """Rounding before a lookup is approximate, so that a value is one step off now and then."""
    _, tuned = windows_and_tuned()
    images = images_of(2, 2)
    circuit = fheconv.compile(tuned, fheconv.CompileConfig(p_error=1e-6))
    circuit.keygen()
    got = circuit.decrypt(circuit.run(circuit.encrypt(images)))
    off = np.abs(got - tuned(images)).max()
    assert off < 0.5 * np.ptp(tuned(images_of(3, 50)))


BAD = {
    "network": ({"network": MODULE}, "network is a Sequential"),
    "data of another shape": ({"data": np.zeros((3, 1, 4, 4))}, r"shape \(3, 1, 4, 4\)"),
    "data out of range": ({"data": np.full((3, *SHAPE), 9.0)}, "The value 9 at .* outside the input range"),
    "data that is no number": ({"data": np.full((3, *SHAPE), np.nan)}, "nan"),
    "words": ({"data": "digits"}, "images of data"),
    "one image": ({"data": images_of(0, 1)}, r"shape \(1, 1, 5, 5\); give a batch of two or more"),
    "no batch": ({"data": images_of(0, 1)[0]}, "give a batch"),
    "classes of another number": ({"data": (images_of(0, 4), [0, 1, 2])}, r"shape \(3,\).* shape \(4,\)"),
    "classes too great": ({"data": (images_of(0, 4), [0, 1, 2, 3])}, "from 0 to 3; .* integers from 0 to 2"),
    "classes below 0": ({"data": (images_of(0, 4), [0, 1, 2, -1])}, "from -1 to 2; .* from 0 to 2"),
    "fractions for classes": ({"data": (images_of(0, 4), [0.0, 1, 2, 1])}, "are float64 .* needs integers"),
    "no classes": ({"data": (images_of(0, 4), [])}, r"shape \(0,\)"),
    "classes of data only": ({"data": (images_of(0, 2), [0, 1]), "validation": images_of(0, 2)}, "both"),
    "validation": ({"validation": np.zeros((3, 2, 5, 5))}, r"shape \(3, 2, 5, 5\)"),
    "augment": ({"augment": 3}, "augment=3 must be a function"),
    "augment that crops": ({"augment": lambda x: x[..., 1:]}, r"returned .*4\) for images of shape .*5\)"),
    "augment of arrays": ({"augment": lambda x: x.numpy()}, "returned ndarray for images"),
    "epochs": ({"epochs": 0}, "epochs=0 must be an integer of at least 1"),
    "batch_size": ({"batch_size": 1.5}, "batch_size=1.5 must be an integer"),
    "learning_rate": ({"learning_rate": 0}, "learning_rate=0 must be a number above 0"),
    "learning_rate that is no number": ({"learning_rate": float("nan")}, "learning_rate=nan"),
    "patience": ({"patience": 0}, "patience=0 must be an integer of at least 1"),
    "lookup_budget": ({"lookup_budget": True}, "lookup_budget=True must be an integer"),
    "seed": ({"seed": -1}, "seed=-1 must be an integer from 0"),
    "seed too great": ({"seed": 2**64}, "seed=18446744073709551616 must be an integer from 0 to"),
}  # fmt: skip


@pytest.mark.sampled(7)
@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_refused_by_name(what):
    changed, words = BAD[what]
    arguments = {"network": small(), "data": images_of(0, 6), "epochs": 1, **changed}
    network, data = arguments.pop("network"), arguments.pop("data")
    with pytest.raises((fheconv.InvalidArgumentError, fheconv.InputRangeError), match=words):
        fheconv.finetune(network, data, **arguments)
