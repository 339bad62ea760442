"""What the tools of others have trained for integers gives the integers that these tools give."""

import numpy as np
import pytest
import torch

import fheconv
from tests.support.makers import (
    SHAPE,
    results,
    trained_by_brevitas,
    trained_by_layers_of_brevitas,
    trained_by_torchao,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [trained_by_brevitas, lambda: trained_by_brevitas(quant_tensors=True), trained_by_torchao],
    ids=["Brevitas", "Brevitas's own tensors", "PT2E of torchao"],
)
def test_networks_give_what_their_makers_give(make):
    model, images = make(), torch.rand(50, *SHAPE)
    network = fheconv.quantize(model, images[:1])  # which chooses nothing
    with torch.no_grad():
        expected = results(model, images).numpy()
    assert len({*np.round(expected.ravel(), 4)}) > 20
    np.testing.assert_allclose(network(images), expected, atol=1e-6)
    assert network.input.bits == 4
    assert len(network.layers) == 2  # no lookup for images: the client rounds them


@pytest.mark.slow
def test_layers_of_brevitas_that_round_what_they_read():
    model, images = trained_by_layers_of_brevitas(), torch.rand(50, *SHAPE)
    network = fheconv.quantize(model, images[:1])
    with torch.no_grad():
        expected = results(model, images).numpy()
    np.testing.assert_allclose(network(images), expected, atol=1e-6)
