"""Cascades: each image is answered by one of the two circuits, by the margin of the first."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import fheconv
from fheconv.circuits.cascade import margins_of

SHAPE = (1, 4, 4)
CONFIG = fheconv.QuantConfig(weight_bits=2, activation_bits=2, input_bits=2)


def images_of(seed, n):
    return np.random.default_rng(seed).integers(0, 4, (n, *SHAPE))


def module_of(seed, *, hidden=3, classes=3, size=16):
    torch.manual_seed(seed)
    layers = [nn.Linear(size, hidden), nn.ReLU()] if hidden else []
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(hidden or size, classes))


@cache
def circuit(*, hidden=3, classes=3):
    network = fheconv.quantize(module_of(0, hidden=hidden, classes=classes), images_of(0, 40), CONFIG)
    return fheconv.compile(network, fheconv.CompileConfig(p_error=1e-6))


@pytest.mark.parametrize("quantile", [0.0, 0.4, 1.0])
def test_each_image_is_answered_by_one_circuit(quantile):
    first, second, images = circuit(hidden=0), circuit(), images_of(1, 60)
    margins = margins_of(first.predict(images))
    margin = np.quantile(margins, quantile) + (quantile == 1.0)
    cascade = fheconv.Cascade(first, second, margin=margin)
    asked = margins < margin
    expected = np.where(asked[:, None], second.predict(images), first.predict(images))
    np.testing.assert_array_equal(cascade.predict(images), expected)
    np.testing.assert_array_equal(cascade.predict(images[0]), expected[0])
    assert cascade.score(images, expected.argmax(axis=1)) == 1
    cost = cascade.cost(images)
    assert cost.share == asked.mean()
    assert cost.lookups == pytest.approx(asked.mean() * second.cost.lookups)
    assert first.cost.complexity <= cost.complexity <= first.cost.complexity + second.cost.complexity
    assert cost.seconds > 0
    assert f"{asked.mean():.1%}" in str(cost)


def test_a_fitted_margin_costs_no_right_answer():
    """Even where the first circuit is right as often: it is right above the median of its margins."""
    first, second, images = circuit(hidden=0), circuit(), images_of(1, 200)
    scores, answers = first.predict(images), second.predict(images).argmax(axis=1)
    margins = margins_of(scores)
    classes = np.where(margins > np.median(margins), scores.argmax(axis=1), answers)
    cascade = fheconv.Cascade.fit(first, second, images, classes)
    assert 0 < cascade.cost(images).share <= 0.5
    right, least = answers == classes, np.nextafter(cascade.margin, 0)
    assert (cascade.predict(images).argmax(axis=1) == classes)[right].all()
    less = fheconv.Cascade(first, second, margin=least)
    assert not (less.predict(images).argmax(axis=1) == classes)[right].all()


def test_no_second_circuit_is_asked_where_the_first_is_as_good():
    first, images = circuit(hidden=0), images_of(1, 50)
    cascade = fheconv.Cascade.fit(first, circuit(), (images, first.predict(images).argmax(axis=1)))
    assert cascade.margin == 0
    assert cascade.cost(images).lookups == 0


@pytest.mark.slow
def test_encrypted_images_get_the_scores_of_clear_ones():
    first, second, images = circuit(hidden=0), circuit(), images_of(2, 4)
    margins = margins_of(first.predict(images))
    cascade = fheconv.Cascade(first, second, margin=np.median(margins))
    cascade.keygen()
    np.testing.assert_array_equal(cascade.predict(images, fhe="execute"), cascade.predict(images))


@pytest.mark.slow
def test_one_set_of_keys_serves_both_circuits():
    """It is made once, and each circuit runs under it."""
    second, images = circuit(hidden=5), images_of(2, 3)
    network = fheconv.quantize(module_of(1, hidden=2), images_of(0, 40), CONFIG)
    first = fheconv.compile(network, keys_of=second)
    margins = margins_of(first.predict(images))
    cascade = fheconv.Cascade(first, second, margin=np.median(margins))
    cascade.keygen()
    assert first.evaluation_keys.key_id == second.evaluation_keys.key_id
    assert 0 < cascade.cost(images).share < 1
    np.testing.assert_array_equal(cascade.predict(images, fhe="execute"), cascade.predict(images))


def test_a_cascade_shows_itself():
    shown = repr(fheconv.Cascade(circuit(hidden=0), circuit(), margin=2))
    assert "0 lookups" in shown
    assert "3 lookups, where the margin is below 2" in shown


BAD = {
    "a network": (lambda: {"first": circuit().network}, "first is a QuantizedNetwork; a cascade takes"),
    "other classes": (lambda: {"second": circuit(classes=4)}, r"into \(3,\), and the second .* \(4,\)"),
    "one class": (lambda: {"first": circuit(classes=1), "second": circuit(classes=1)}, "two or more"),
    "a negative margin": (lambda: {"margin": -1.0}, "margin=-1.0 must be a number of at least 0"),
    "no number": (lambda: {"margin": float("nan")}, "margin=nan"),
    "a word": (lambda: {"margin": "auto"}, "margin='auto'"),
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_refused(what):
    changed, words = BAD[what]
    arguments = {"first": circuit(hidden=0), "second": circuit(), "margin": 1.0, **changed()}
    with pytest.raises(fheconv.InvalidArgumentError, match=words):
        fheconv.Cascade(**arguments)
