"""The figures of a cost against computations and measurements that Concrete has no part in."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import fheconv
from fheconv.circuits.sizes import sizes_of
from tests.support.files import of_first_format, parts_of, zipped
from tests.support.nets import splitting

# What Concrete writes before the numbers of a key or a ciphertext.
HEADER = 4096


def single(filters, *size):
    images = np.linspace(0, 1, math.prod(size)).reshape(1, *size)
    return fheconv.quantize(np.ones((filters, 1, 1, 1)), images, fheconv.QuantConfig(input_bits=2))


def looking_up(size=5):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 2))
    config = fheconv.QuantConfig(weight_bits=2, input_bits=2, activation_bits=2, accumulator_bits=4)
    return fheconv.quantize(module, torch.rand(20, 1, size, size), config)


def dimension(circuit):
    """The number of numbers of one ciphertext, without the last."""
    (key,) = json.loads(circuit.exported().specs)["keyset"]["lweSecretKeys"]
    return key["params"]["lweDimension"]


@pytest.mark.slow
def test_sizes_of_ciphertexts_do_not_wrap():
    """More than 4 GiB, as the first layer of a ResNet gives for a photograph."""
    circuit = fheconv.compile(single(128, 1, 112, 112), fheconv.CompileConfig(lanes=1))
    cost, each = circuit.cost, 8 * (dimension(circuit) + 1)
    assert cost.output_bytes == 128 * 112 * 112 * each > 2**32
    assert cost.input_bytes == 112 * 112 * each
    wide = fheconv.compile(single(1, 1, 1200, 1200), fheconv.CompileConfig(lanes=1))
    assert wide.cost.input_bytes == 1200 * 1200 * 8 * (dimension(wide) + 1) > 2**32


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.slow
def test_sizes_with_lookups_are_those_of_what_is_sent(compressed):
    config = fheconv.CompileConfig(
        p_error=0.01, compress_evaluation_keys=compressed, compress_input=compressed
    )
    circuit = fheconv.compile(looking_up(), config)
    (bootstrap,) = json.loads(circuit.exported().specs)["keyset"]["lweBootstrapKeys"]
    assert bootstrap["params"]["glweDimension"] > 1  # by which Concrete's own figure is too large
    circuit.keygen()
    encrypted = circuit.encrypt(np.zeros((1, 5, 5)))
    result = circuit.run(encrypted)
    cost = circuit.cost
    assert 0 <= len(circuit.evaluation_keys.payload) - cost.sent_key_bytes < HEADER
    assert 0 <= len(encrypted.values[0]) - cost.input_bytes < HEADER
    assert 0 <= len(result.values[0]) - cost.output_bytes < HEADER
    if not compressed:
        assert cost.key_bytes == cost.sent_key_bytes


def test_keys_take_the_same_memory_however_they_are_sent():
    sent, kept = [], []
    for compressed in (True, False):
        config = fheconv.CompileConfig(p_error=0.01, compress_evaluation_keys=compressed)
        cost = fheconv.compile(looking_up(), config).cost
        sent.append(cost.sent_key_bytes)
        kept.append(cost.key_bytes)
    assert kept[0] == kept[1] == sent[1] > 3 * sent[0]


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [True, False])
def test_a_packing_key_takes_what_is_sent(compressed):
    config = fheconv.CompileConfig(p_error=0.3, compress_evaluation_keys=compressed)
    circuit = fheconv.compile(splitting(), config)
    assert json.loads(circuit.exported().specs)["keyset"]["packingKeyswitchKeys"]
    circuit.keygen()
    assert 0 <= len(circuit.evaluation_keys.payload) - circuit.cost.sent_key_bytes < HEADER


def test_a_packing_key_counts():
    params = {"inputLweDimension": 700, "levelCount": 2, "glweDimension": 1, "polynomialSize": 512}
    packing = {"params": {**params, "integerPrecision": 64}, "compression": "seed"}
    keyset = {"lweBootstrapKeys": [], "lweKeyswitchKeys": [], "packingKeyswitchKeys": [packing]}
    sizes = sizes_of(json.dumps({"keyset": keyset, "circuits": []}).encode())
    assert sizes.key_bytes == sizes.sent_key_bytes == 701 * 2 * 2 * (512 + 512) * 8


@pytest.mark.parametrize("specs", [b"", b"[]", b"{}", b'{"keyset": {}, "circuits": []}'])
def test_other_data_than_parameters_has_no_size(specs):
    with pytest.raises(fheconv.ArtifactError, match="altered"):
        sizes_of(specs)


def test_probabilities_and_counts_are_those_of_the_network():
    asked = fheconv.compile(looking_up(), fheconv.CompileConfig(p_error=0.01)).cost
    assert asked.lookups == 2 * 3 * 3 == sum(layer.lookups for layer in asked.layers)
    assert 0 < asked.p_error <= 0.01
    assert asked.global_p_error == pytest.approx(1 - (1 - asked.p_error) ** 18)
    together = fheconv.compile(looking_up(), fheconv.CompileConfig(global_p_error=0.01)).cost
    assert 0 < together.global_p_error <= 0.01
    assert together.p_error < 0.01 / 18 * 1.01


def test_complexity_follows_the_lookups():
    """With the same parameters, twice the lookups cost twice as much, but for the additions between them."""
    small, large = (
        fheconv.compile(looking_up(size), fheconv.CompileConfig(p_error=0.01)).cost for size in (5, 8)
    )
    assert small.key_bytes == large.key_bytes  # the same parameters
    assert large.complexity / small.complexity == pytest.approx(large.lookups / small.lookups, rel=0.01)


def test_sizes_of_keys_in_files_of_the_first_format_come_from_the_parameters(tmp_path):
    circuit = fheconv.compile(looking_up(), fheconv.CompileConfig(p_error=0.01))
    circuit.save(tmp_path)
    for name, load in (("client.zip", fheconv.load_client), ("server.zip", fheconv.load_server)):
        right = load(tmp_path / name).cost
        (tmp_path / name).with_suffix(".old").write_bytes(of_first_format(tmp_path, name))
        parts = parts_of((tmp_path / name).with_suffix(".old"))
        manifest = json.loads(parts["manifest.json"])
        manifest["cost"]["key_bytes"] *= 3  # as Concrete has it
        assert load(zipped({**parts, "manifest.json": json.dumps(manifest).encode()})).cost == right
