"""Controls learn the classes of images with one hidden layer of ReLUs, or with none."""

import numpy as np
import pytest
import torch
from torch import nn

from fheconv.basics.samples import Samples
from fheconv.training.controls import control


def examples(seed, n=200):
    """Images of two values, whose class no linear model can tell: whether their signs differ."""
    images = np.random.default_rng(seed).uniform(-1, 1, (n, 1, 1, 2)).astype(np.float32)
    return Samples(images, (np.prod(images, axis=(1, 2, 3)) < 0).astype(int))


def right(model, of):
    with torch.no_grad():
        return float((model(torch.tensor(of.images)).argmax(1).numpy() == of.classes).mean())


def trained(lookups, **options):
    return control(examples(0), lookups=lookups, classes=2, **{"epochs": 30, **options})


def test_a_hidden_layer_learns_what_a_linear_model_cannot():
    hidden, linear = trained(16), trained(0)
    assert right(hidden, examples(1)) > 0.9 > right(linear, examples(1))
    assert [layer.out_features for layer in hidden if isinstance(layer, nn.Linear)] == [16, 2]
    assert sum(isinstance(layer, nn.ReLU) for layer in hidden) == 1
    assert not any(isinstance(layer, nn.ReLU) for layer in linear)


def test_one_seed_gives_one_model_and_leaves_the_generator_alone():
    state, (one, again, other) = torch.get_rng_state(), (trained(4, epochs=1, seed=s) for s in (0, 0, 1))
    assert torch.equal(one[1].weight, again[1].weight)
    assert not torch.equal(one[1].weight, other[1].weight)
    assert torch.equal(state, torch.get_rng_state())


def test_what_is_given_for_validation_chooses_the_model():
    """Here the classes are exchanged: the best model is the one that is least sure."""
    images, classes = examples(1)
    given = trained(16, validation=Samples(images, 1 - classes))
    assert right(given, examples(1)) < right(trained(16), examples(1))


@pytest.mark.parametrize("lookups", [0, 3])
def test_images_are_changed(lookups):
    given = []
    trained(lookups, epochs=1, augment=lambda images: given.append(images) or -images)
    assert len(given) > 1
