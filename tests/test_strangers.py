"""Ten models as others bring them, from quantization to an encrypted image where that is affordable."""

import numpy as np
import pytest
import torch

import fheconv
from tests.support.strangers import NAMES, stranger

# Circuits that take longer than a minute an image are not compiled.
CONFIG = fheconv.CompileConfig(p_error=1e-3, most_seconds=60)
# Encrypted images that take longer, or more keys than this, are left out.
MOST_SECONDS, MOST_KEYS = 20, 2**30
# Images of a model, of which the first calibrate. Few crops have the score of a face, so it takes many to
# compare.
CALIBRATING = 60
IMAGES = {"PNet, its scores (facenet-pytorch)": 480, "PNet of Keras, its scores (mtcnn)": 480}
# With five bits, 52 layers with gates do not get closer to the float model.
LEAST_CORRELATION = {"direction of text (rapidocr)": 0.4}
# What `compile` refuses, because it would take too long.
REFUSED = {"direction of text (rapidocr)"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fheconv.CostWarning")
@pytest.mark.parametrize("name", NAMES)
def test_models_of_others(name):
    model, images, outputs = stranger(name, IMAGES.get(name, 2 * CALIBRATING))
    images, others = np.split(images, [CALIBRATING])
    network = fheconv.quantize(model, images, outputs=outputs)
    with torch.no_grad():
        expected = model(torch.tensor(others))
    expected = (expected if outputs is None else expected[outputs]).numpy()
    results = network(np.clip(others, *network.input.real_range))
    assert results.shape == expected.shape
    if network.source.trained:
        np.testing.assert_allclose(results, expected, atol=1e-4)
    else:
        about_mean = ((values - values.mean(axis=0)).ravel() for values in (results, expected))
        assert np.corrcoef(*about_mean)[0, 1] > LEAST_CORRELATION.get(name, 0.7)
    forecast = network.forecast(CONFIG)
    assert forecast.lookups == network.budget().lookups
    try:
        circuit = fheconv.compile(network, CONFIG)
    except fheconv.CostError:
        assert name in REFUSED
        return
    assert name not in REFUSED
    if forecast.seconds < MOST_SECONDS and forecast.key_bytes < MOST_KEYS:
        circuit.keygen()
        assert circuit.verify(others[:1]).as_promised
