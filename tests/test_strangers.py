"""Ten models as others bring them, from quantization to an encrypted image where that is affordable."""

import numpy as np
import pytest
import torch

import fheconv
from tests.support.strangers import NAMES, stranger

CONFIG = fheconv.CompileConfig(p_error=1e-3)
# Encrypted images that take longer, or more keys than this, are left out.
MOST_SECONDS, MOST_KEYS = 20, 2**30
# What `compile` refuses, because it would take too long.
REFUSED: set[str] = set()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fheconv.CostWarning")
@pytest.mark.parametrize("name", NAMES)
def test_models_of_others(name, tmp_path):
    model, shape, outputs = stranger(name, tmp_path)
    images, others = np.random.default_rng(0).uniform(0, 1, (2, 60, *shape)).astype(np.float32)
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
        assert np.corrcoef(*about_mean)[0, 1] > 0.8
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
