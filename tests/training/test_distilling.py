"""Students imitate a model, keep to their budget, and are modules like any other."""

from functools import cache
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fheconv
from fheconv.capture.model import capture
from fheconv.training.students import students
from fheconv.training.thinning import lookups

SHAPE = (1, 6, 6)


def images_of(seed, n):
    """Images of three patterns under noise."""
    rng = np.random.default_rng(seed)
    patterns = np.random.default_rng(7).uniform(0, 1, (3, *SHAPE))
    images = 0.5 * patterns[rng.integers(0, 3, n)] + 0.5 * rng.uniform(0, 1, (n, *SHAPE))
    return torch.tensor(images, dtype=torch.float32)


def teacher(*last):
    """A model whose logits are no linear function of its images."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(36, 24), nn.Tanh(), nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 3), *last
    )
    with torch.no_grad():
        model[3].weight *= 4
        model[5].weight *= 8
    return model.eval()


MODEL = teacher()


def distill(lookup_budget, training=None, **options):
    options = {"epochs": 4, **options}
    return fheconv.distill(
        MODEL, images_of(0, 200) if training is None else training, lookup_budget=lookup_budget, **options
    )


@cache
def distilled(lookup_budget):
    return distill(lookup_budget, epochs=60)


def error(student, images):
    """The mean squared error to the model's centred logits, as a share of their variance."""
    with torch.no_grad():
        meant, got = (one - one.mean(dim=1, keepdim=True) for one in (MODEL(images), student(images)))
    return float((got - meant).square().mean() / meant.var())


def same(a, b):
    with torch.no_grad():
        return torch.equal(a(images_of(2, 9)), b(images_of(2, 9)))


def test_a_student_imitates_the_model_on_other_images():
    """Better with more lookups."""
    images = images_of(1, 500)
    none, some = error(distilled(0), images), error(distilled(24), images)
    assert some < none < 1
    assert some < 0.5


@pytest.mark.parametrize("lookup_budget", [0, 1, 24])
def test_a_student_keeps_to_its_budget(lookup_budget):
    student = distilled(lookup_budget) if lookup_budget != 1 else distill(1)
    network = fheconv.quantize(student, images_of(0, 200))
    assert network.forecast().lookups == network.budget().lookups <= lookup_budget
    assert not student.training


def test_a_student_runs_encrypted():
    images = images_of(3, 2)
    network = fheconv.quantize(
        distill(6), images_of(0, 200), fheconv.QuantConfig(accumulator_bits=6, input_bits=2)
    )
    circuit = fheconv.compile(network, fheconv.CompileConfig(p_error=1e-6))
    circuit.keygen()
    got = circuit.decrypt(circuit.run(circuit.encrypt(images)), dequantize=False)
    np.testing.assert_array_equal(got, network.integers(images))


def values_looked_up(student, image):
    """What the activations of a student hold for one image."""
    counts = []
    for layer in student:
        if isinstance(layer, nn.PReLU):
            layer.register_forward_hook(lambda *given: counts.append(given[-1].numel()))
    assert student(torch.zeros(1, *image)).shape == (1, 3)
    return sum(counts)


@given(image=st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple), most=st.integers(0, 80))
def test_every_kind_takes_nearly_its_budget(image, most):
    """For images of any number of axes and any size."""
    linear, *others = students(image, most)
    assert values_looked_up(linear.build(image, 3), image) == 0
    assert bool(others) == bool(most)
    for kind in others:
        assert 0.6 * most < values_looked_up(kind.build(image, 3), image) <= most


@pytest.mark.sampled(3)
@pytest.mark.parametrize("image", [(36,), (2, 9), (1, 6, 8), (1, 4, 4, 4)], ids=str)
def test_lookups_are_those_that_are_captured(image):
    kind = students(image, 40)[-1]
    student = kind.build(image, 3)
    assert lookups(capture(student, image)) == values_looked_up(student, image)


def test_the_scale_of_the_images_does_not_matter():
    """A model of darker images is imitated as well."""
    dark = nn.Sequential(nn.Flatten(), nn.Linear(36, 36), *MODEL[1:])
    with torch.no_grad():
        dark[1].weight.copy_(100 * torch.eye(36))
        dark[1].bias.fill_(-3)
    student = fheconv.distill(dark, images_of(0, 200) / 100 + 0.03, lookup_budget=24, epochs=60)
    with torch.no_grad():
        got = student(images_of(1, 500) / 100 + 0.03)
        close = (got - distilled(24)(images_of(1, 500))).abs().mean() / got.std()
    assert close < 0.1


def test_one_seed_gives_one_student():
    state = torch.get_rng_state()
    assert same(distill(8), distill(8))
    assert torch.equal(state, torch.get_rng_state())
    assert not same(distill(8), distill(8, seed=1))


def test_it_takes_what_samples_takes():
    """Classes are ignored."""
    images = images_of(0, 60)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=20)
    ways = [images, images.numpy(), (images, [7] * 60), loader]
    first, *others = (distill(4, way, epochs=1) for way in ways)
    assert all(same(first, other) for other in others)


def test_a_last_softmax_is_not_imitated():
    """Students learn the logits before it."""
    assert same(
        distill(4), fheconv.distill(teacher(nn.Softmax(1)), images_of(0, 200), lookup_budget=4, epochs=4)
    )


def test_a_single_score_is_imitated():
    scoring = nn.Sequential(nn.Flatten(), nn.Linear(36, 1))
    student = fheconv.distill(scoring, images_of(0, 200), lookup_budget=0, epochs=300)
    with torch.no_grad():
        meant, got = scoring(images_of(1, 500)), student(images_of(1, 500))
    assert float((got - meant).square().mean() / meant.var()) < 0.1


def test_images_are_changed_and_the_model_asked_about_changed_ones():
    given = []

    def negative(images):
        given.append(images)
        return -images

    student = distill(24, augment=negative, epochs=60)
    assert len(given) > 1
    images = -images_of(1, 500)
    assert error(student, images) < 0.7 * error(distilled(24), images)


def test_an_interruption_gives_the_best_student_so_far():
    """And is passed on as long as there is none."""
    steps = iter(range(30))

    def interrupted(optimizer, original=torch.optim.AdamW.step):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return original(optimizer)

    with mock.patch.object(torch.optim.AdamW, "step", interrupted):
        student = distill(12, epochs=40)
    assert lookups(capture(student, SHAPE)) <= 12
    with (
        mock.patch.object(torch.optim.AdamW, "step", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        distill(12)


BAD = {
    "lookup_budget": ({"lookup_budget": -1}, "lookup_budget=-1 must be an integer of at least 0"),
    "epochs": ({"epochs": 0}, "epochs=0 must be an integer of at least 1"),
    "batch_size": ({"batch_size": 1.5}, "batch_size=1.5 must be an integer"),
    "learning_rate": ({"learning_rate": 0}, "learning_rate=0 must be a number above 0"),
    "seed": ({"seed": -1}, "seed=-1 must be an integer from 0"),
    "augment": ({"augment": 3}, "augment=3 must be a function"),
    "augment that crops": ({"augment": lambda x: x[..., 1:]}, r"returned .*5\) for images of shape .*6\)"),
    "one image": ({"training": images_of(0, 1)}, r"shape \(1, 1, 6, 6\); give a batch of two or more"),
    "no numbers": ({"training": torch.full((3, *SHAPE), torch.nan)}, "finite"),
    "words": ({"training": "digits"}, "images of training"),
    "validation": ({"validation": torch.zeros(3, 1, 5, 5)}, r"\(200, 1, 6, 6\) .* \(3, 1, 5, 5\)"),
    "an image for result": ({"model": nn.Conv2d(1, 1, 3)}, r"shape \(1, 4, 4\); distill needs \(classes,\)"),
    "another keyword": ({"n_bits": 3}, "distill has no n_bits=3"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_refused_by_name(what):
    changed, words = BAD[what]
    arguments = {"model": MODEL, "training": images_of(0, 200), "lookup_budget": 4, "epochs": 1, **changed}
    with pytest.raises(fheconv.InvalidArgumentError, match=words):
        fheconv.distill(arguments.pop("model"), arguments.pop("training"), **arguments)


def test_training_that_diverges_is_reported():
    with pytest.raises(fheconv.CalibrationError, match="lower the learning rate"):
        distill(0, learning_rate=1e38)
