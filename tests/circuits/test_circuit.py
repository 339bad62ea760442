import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

import fheconv
from fheconv.circuits.native.handle import Handle
from fheconv.circuits.native.protocol import UNLIMITED
from fheconv.circuits.native.worker import worker
from tests.support.files import secrets_held, shown
from tests.support.layers import random_network, unlike_calibration, with_weight


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    module = torch.nn.Conv2d(2, 3, 3, padding=1)
    return fheconv.quantize(module, torch.rand(4, 2, 6, 5), fheconv.QuantConfig(weight_bits=3, input_bits=3))


@pytest.fixture(scope="module")
def circuit(network):
    circuit = fheconv.compile(network)
    circuit.keygen()
    return circuit


@pytest.mark.parametrize("engine", ["conv", "matrix"])
@pytest.mark.parametrize("seed", range(100, 124))
@pytest.mark.sampled(5)
def test_encrypted_results_are_the_clear_integers(engine, seed):
    network, images, _ = random_network(seed)
    circuit = fheconv.compile(network, fheconv.CompileConfig(engine=engine))
    circuit.keygen()
    assert circuit.cost.engine == engine
    assert circuit.cost.assigned_bits >= circuit.cost.accumulator_bits
    for x in (images[:1], unlike_calibration(network, seed)):
        assert circuit.verify(x).ok
        np.testing.assert_array_equal(circuit.predict(x, fhe="execute"), network(x))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("seed", range(200, 206))
@pytest.mark.parametrize("compress_input", [False, True])
def test_worst_case_images_come_out_right_encrypted(seed, compress_input):
    """Every channel's greatest and least accumulator, which no calibration image comes near."""
    from fheconv.networks.bounds import layer_bounds, worst_case_inputs

    network, _, _ = random_network(seed)
    layer = network.last
    bounds = layer_bounds(layer, network.shapes)
    worst = worst_case_inputs(layer, network.input_shape, bounds)
    circuit = fheconv.compile(network, fheconv.CompileConfig(compress_input=compress_input))
    circuit.keygen()
    images = (worst - network.input.zero_point) * network.input.scale
    integers = circuit.decrypt(circuit.run(circuit.encrypt(images)), dequantize=False)
    per_channel = np.moveaxis(integers, 1, 0).reshape(layer.shape[0], -1)
    np.testing.assert_array_equal(per_channel.min(axis=1), bounds.channel_minimum)
    np.testing.assert_array_equal(per_channel.max(axis=1), bounds.channel_maximum)


@pytest.mark.parametrize("engine", ["conv", "matrix"])
def test_calibrated_on_dark_images_and_right_on_bright_ones(engine):
    rng = np.random.default_rng(0)
    dark = rng.integers(0, 2, (3, 1, 6, 6))
    module = torch.nn.Conv2d(1, 2, 3, padding=1)
    network = fheconv.quantize(module, dark, fheconv.QuantConfig(weight_bits=5, input_bits=4))
    circuit = fheconv.compile(network, fheconv.CompileConfig(engine=engine))
    circuit.keygen()
    bright = np.concatenate([np.full((1, 1, 6, 6), 15), rng.integers(0, 16, (2, 1, 6, 6))])
    assert np.abs(network.integers(bright)).max() > np.abs(network.integers(dark)).max() * 5
    assert circuit.verify(bright).ok
    with pytest.raises(fheconv.InputRangeError, match="16"):
        circuit.encrypt(bright + 1)


def test_images_in_any_memory_order_come_out_right(circuit, network):
    """Permuted from (H, W, C), say: Concrete takes memory as it lies."""
    x = unlike_calibration(network, 7, 2)
    expected = network(x)
    permuted = np.ascontiguousarray(np.moveaxis(x, 1, -1)).transpose(0, 3, 1, 2)
    tensor = torch.tensor(x).contiguous(memory_format=torch.channels_last)
    for image in (np.asfortranarray(x), permuted, np.repeat(x, 2, axis=3)[..., ::2], tensor):
        for fhe in ("disable", "simulate", "execute"):
            np.testing.assert_array_equal(circuit.predict(image, fhe=fhe), expected)


@pytest.mark.parametrize("engine", ["conv", "matrix", "shifts"])
def test_weights_in_any_memory_order_come_out_right(engine):
    rng = np.random.default_rng(1)
    weight = np.asfortranarray(rng.normal(size=(3, 2, 3, 2)))
    network = fheconv.quantize(weight, np.asfortranarray(rng.random((1, 2, 5, 6))))
    circuit = fheconv.compile(network, fheconv.CompileConfig(engine=engine))
    circuit.keygen()
    assert circuit.verify(unlike_calibration(network, 8)).ok


def test_all_ways_to_predict_agree(circuit, network):
    x = unlike_calibration(network, 1, 3)
    expected = network(x)
    for fhe in ("disable", "simulate", "execute"):
        y = circuit.predict(x, fhe=fhe)
        np.testing.assert_array_equal(y, expected)
        assert y.dtype == np.float64
    np.testing.assert_array_equal(circuit.decrypt(circuit.run(circuit.encrypt(x))), expected)
    integers = circuit.decrypt(circuit.run(circuit.encrypt(x)), dequantize=False)
    np.testing.assert_array_equal(integers, network.integers(x))
    with pytest.raises(fheconv.InvalidArgumentError, match="encrypted"):
        circuit.predict(x, fhe="encrypted")


def test_one_image_an_empty_batch_and_a_tensor_keep_torchs_shapes(circuit, network):
    x = torch.rand(2, 6, 5) * 0.9
    for fhe in ("disable", "simulate", "execute"):
        assert circuit.predict(x, fhe=fhe).shape == (3, 6, 5)
        assert circuit.predict(x[None].repeat(2, 1, 1, 1), fhe=fhe).shape == (2, 3, 6, 5)
        assert circuit.predict(x[None][:0], fhe=fhe).shape == (0, 3, 6, 5)


def test_the_result_is_close_to_torchs():
    torch.manual_seed(1)
    module = torch.nn.Conv2d(1, 2, 3, stride=2)
    images = torch.rand(2, 1, 9, 9)
    network = fheconv.quantize(module, images, fheconv.QuantConfig(weight_bits=8, input_bits=8))
    circuit = fheconv.compile(network)
    circuit.keygen()
    y = circuit.predict(images, fhe="execute")
    # At most half a step of weight, of input and of bias, over 9 taps of weights below 1/3.
    error = 9 * (0.5 * network.input.scale / 3 + 0.5 / 3 / 127) + network.last.scale.max()
    assert np.abs(y - module(images).detach().numpy()).max() < error < 0.03


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x * 1000, "outside the input range"),
        (lambda x: np.where(np.arange(5) == 2, np.nan, x), r"\(0, 0, 0, 2\) is nan"),
        (lambda x: np.where(np.arange(5) == 3, -np.inf, x), r"\(0, 0, 0, 3\) is -inf"),
        (lambda x: x[:, :1], "shape"),
        (lambda x: x[0, 0], "shape"),
        (lambda x: x.transpose(0, 1, 3, 2), "shape"),
        (lambda x: "image", "numbers"),
        (lambda x: [[1], [2, 3]], "numbers"),
        (lambda x: x + 1j, "complex"),
    ],
)
def test_images_that_cannot_be_encrypted_are_refused(circuit, change, words):
    x = np.full((1, 2, 6, 5), 0.5)
    for step in (circuit.encrypt, circuit.predict, circuit.verify, circuit.network):
        with pytest.raises(fheconv.InputRangeError, match=words):
            step(change(x))


def test_calls_in_the_wrong_order_name_the_missing_one(network, circuit):
    fresh = fheconv.compile(network)
    x = np.zeros(network.input_shape)
    with pytest.raises(fheconv.NotCompiledError, match="keygen"):
        fresh.encrypt(x)
    with pytest.raises(fheconv.NotCompiledError, match="keygen"):
        fresh.predict(x, fhe="execute")
    with pytest.raises(fheconv.NotCompiledError, match="keygen"):
        fresh.run(circuit.encrypt(x))
    encrypted = circuit.encrypt(x)
    with pytest.raises(fheconv.ArtifactError, match=r"run\(\)"):
        circuit.decrypt(encrypted)
    with pytest.raises(fheconv.ArtifactError, match=r"encrypt\(\)"):
        circuit.run(circuit.run(encrypted))
    with pytest.raises(fheconv.ArtifactError, match="ndarray"):
        circuit.run(x)


def test_ciphertexts_of_other_keys_or_circuits_are_refused(network, circuit):
    x = np.zeros(network.input_shape)
    twin = fheconv.compile(network)
    twin.keygen()
    with pytest.raises(fheconv.ArtifactError, match="other keys"):
        twin.run(circuit.encrypt(x))
    with pytest.raises(fheconv.ArtifactError, match="other keys"):
        twin.decrypt(circuit.run(circuit.encrypt(x)))
    other_network, _, _ = random_network(3)
    other = fheconv.compile(other_network)
    other.keygen()
    with pytest.raises(fheconv.ArtifactError, match="another circuit"):
        other.run(circuit.encrypt(x))
    old = twin.encrypt(x)
    twin.keygen()
    with pytest.raises(fheconv.ArtifactError, match="other keys"):
        twin.run(old)


def test_verify_reports_what_differs(circuit, network, monkeypatch):
    x = unlike_calibration(network, 5, 2)
    report = circuit.verify(x)
    assert report.ok
    assert report.values == 2 * 3 * 6 * 5
    right = fheconv.QuantizedNetwork.accumulate
    shift = np.zeros((2, *network.output_shape), np.int64)
    shift[1, 2, 5, 4] = 1
    monkeypatch.setattr(fheconv.QuantizedNetwork, "accumulate", lambda self, q: right(self, q) + shift)
    report = circuit.verify(x)
    assert not report.ok
    assert report.wrong == 1
    (mismatch,) = report.mismatches
    assert mismatch.position == (0, 1, 2, 5, 4)
    assert mismatch.expected == mismatch.got + 1
    assert "(0, 1, 2, 5, 4)" in str(report)
    assert not report.as_promised
    assert "MORE than the expected" in str(report)


def test_the_cost_is_known_before_any_key_is_made(network):
    circuit = fheconv.compile(network, fheconv.CompileConfig(engine="conv", lanes=1))
    cost = circuit.cost
    assert cost.lookups == 0
    assert cost.key_bytes == 0
    assert cost.multiply_adds == 3 * 2 * 9 * 6 * 5
    assert cost.accumulator_bits == network.budget().accumulator_bits <= cost.assigned_bits
    assert cost.p_error <= 2**-64
    circuit.keygen()
    x = np.zeros((2, *network.input_shape))
    encrypted = circuit.encrypt(x)
    overhead = 4096  # the library's own header of each value
    assert 0 <= encrypted.nbytes - 2 * cost.input_bytes <= 2 * overhead
    assert 0 <= circuit.run(encrypted).nbytes - 2 * cost.output_bytes <= 2 * overhead
    assert "lookups" in str(cost)
    assert cost.engine == cost.to_dict()["layers"][0]["engine"] == "conv"


def test_compressed_inputs_are_small(network):
    plain, small = (fheconv.compile(network, fheconv.CompileConfig(compress_input=c)) for c in (False, True))
    assert small.cost.input_bytes * 50 < plain.cost.input_bytes


@pytest.mark.parametrize("bits", [31, 45, 59])
def test_weights_on_which_the_native_compiler_would_abort_are_refused_before_it_is_called(network, bits):
    with pytest.raises(fheconv.AccumulatorOverflowError) as caught:
        fheconv.compile(with_weight(network, 2**bits))
    if bits < 59:  # at 59 the bounds themselves pass 2**63
        assert caught.value.layer == "conv"
        assert caught.value.limit == 58


def test_what_concrete_cannot_compile_names_the_layer_and_its_width(network):
    """Just below the widths that are refused: no crypto parameters reach 2**-64 there."""
    with pytest.raises(fheconv.CompilationError, match=r"NoParametersFound.*'conv', 31 bits"):
        fheconv.compile(with_weight(network, 2**24 - 1))


def test_all_zero_filters_run_encrypted():
    network = fheconv.quantize(np.zeros((2, 1, 3, 3)), np.random.default_rng(0).random((1, 1, 5, 5)))
    circuit = fheconv.compile(network)
    circuit.keygen()
    assert circuit.verify(np.zeros((1, 1, 5, 5))).ok


def test_compile_takes_quantized_networks_only():
    with pytest.raises(fheconv.InvalidArgumentError, match="quantize it first"):
        fheconv.compile(torch.nn.Conv2d(1, 1, 3))


def test_a_compile_config_without_meaning_is_refused():
    with pytest.raises(fheconv.InvalidArgumentError, match="fft"):
        fheconv.CompileConfig(engine="fft")
    with pytest.raises(fheconv.InvalidArgumentError, match="p_error"):
        fheconv.CompileConfig(p_error=1.5)


def test_a_batch_rides_in_lanes_and_every_image_comes_out_right(network):
    circuit = fheconv.compile(network)
    circuit.keygen()
    assert circuit.cost.lanes == 4
    x = unlike_calibration(network, 6, 6)
    encrypted = circuit.encrypt(x)
    assert len(encrypted.values) == 2
    assert encrypted.images == 6
    one_by_one = fheconv.compile(network, fheconv.CompileConfig(lanes=1))
    one_by_one.keygen()
    assert len(one_by_one.encrypt(x).values) == 6
    for each in (circuit, one_by_one):
        assert each.verify(x).ok
        assert each.verify(x[0]).ok
    before = circuit.encrypt(x)
    circuit.keygen()
    with pytest.raises(fheconv.ArtifactError, match="other keys"):
        circuit.run(before)
    assert circuit.verify(x).ok


def test_lanes_that_do_not_fit_are_refused_and_auto_takes_what_fits(network):
    with pytest.raises(fheconv.AccumulatorOverflowError, match="each of 9 images"):
        fheconv.compile(network, fheconv.CompileConfig(lanes=9))
    rng = np.random.default_rng(0)
    wide = fheconv.quantize(
        rng.normal(size=(1, 8, 3, 3)),
        rng.random((1, 8, 6, 6)),
        fheconv.QuantConfig(weight_bits=8, input_bits=8),
    )
    circuit = fheconv.compile(wide)
    assert circuit.cost.lanes == 2
    circuit.keygen()
    assert circuit.verify(unlike_calibration(wide, 0, 3)).ok
    with pytest.raises(fheconv.InvalidArgumentError, match="lanes=0"):
        fheconv.CompileConfig(lanes=0)


def test_verify_holds_the_failures_against_the_promise(network):
    """With a promise of one wrong value in twenty there are some, and no more than that."""
    sloppy = fheconv.compile(network, fheconv.CompileConfig(p_error=0.05, lanes=1))
    sloppy.keygen()
    report = sloppy.verify(unlike_calibration(network, 7, 4), runs=3)
    assert report.values == 3 * 4 * 3 * 6 * 5
    assert report.as_promised
    assert report.rate < 0.1
    strict = replace(report, wrong=report.values // 5)
    assert not strict.as_promised
    with pytest.raises(fheconv.InvalidArgumentError, match="runs=0"):
        sloppy.verify(np.zeros(network.input_shape), runs=0)


def test_the_verdict_is_on_the_program_that_ran(network):
    """A batch rides in lanes, compiled apart from the circuit of one image."""
    sloppy = fheconv.compile(network, fheconv.CompileConfig(p_error=0.2, lanes=4))
    sloppy.keygen()
    report = sloppy.verify(unlike_calibration(network, 8, 4), runs=4)
    of_four = Handle(worker(), ("compile", (network, sloppy.config, 4, None)), UNLIMITED)
    assert report.promised == of_four.compiled.p_error != sloppy.cost.p_error
    assert report.as_promised


def test_nothing_is_verified_in_an_empty_batch(circuit, network):
    with pytest.raises(fheconv.InputRangeError, match="empty batch"):
        circuit.verify(np.zeros((0, *network.input_shape)))
    with pytest.raises(fheconv.InvalidArgumentError, match="show=-1"):
        circuit.verify(np.zeros(network.input_shape), show=-1)


def test_a_circuit_is_neither_pickled_nor_copied_and_shows_no_secret(circuit):
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(fheconv.ArtifactError, match="secret keys"):
            attempt(circuit)
    held = secrets_held(circuit)
    assert held
    assert not any(repr(keys)[2:40] in shown(circuit) for keys in held)
    again = pickle.loads(pickle.dumps(circuit.network))
    x = unlike_calibration(circuit.network, 9)
    np.testing.assert_array_equal(again(x), circuit.network(x))


def test_configs_of_another_kind_are_refused(network):
    for config in ("auto", {}, fheconv.QuantConfig()):
        with pytest.raises(fheconv.InvalidArgumentError, match="CompileConfig"):
            fheconv.compile(network, config)
        with pytest.raises(fheconv.InvalidArgumentError, match="CompileConfig"):
            fheconv.compile_tiled(network, 4, config)
    with pytest.raises(fheconv.InvalidArgumentError, match="p_error=5e-324"):
        fheconv.CompileConfig(p_error=5e-324)
    assert isinstance(fheconv.CompileConfig(p_error=np.float32(1e-5)).p_error, float)


def test_a_whole_configuration_passes_through(network):
    from concrete import fhe

    plain = fheconv.compile(network, fheconv.CompileConfig(p_error=1e-6))
    config = fheconv.CompileConfig(configuration=fhe.Configuration(p_error=1e-6))
    assert fheconv.compile(network, config).cost.complexity == plain.cost.complexity
    config = fheconv.CompileConfig(configuration=fhe.Configuration(p_error=0.1), p_error=1e-6)
    assert fheconv.compile(network, config).cost.p_error <= 1e-6
    with pytest.raises(fheconv.InvalidArgumentError, match=r"concrete.fhe.Configuration"):
        fheconv.CompileConfig(configuration={"p_error": 1e-6})


def test_more_security_costs_more(network):
    plain, more = (
        fheconv.compile(network, fheconv.CompileConfig(security_level=level)).cost.complexity
        for level in (128, 132)
    )
    assert more > plain


def test_batches_of_other_lane_keys_are_refused(network, tmp_path):
    """A key file holds the keys of single images. Whoever loads it makes others for batches in lanes."""
    first, second = (fheconv.compile(network) for _ in range(2))
    first.keygen()
    first.save_keys(tmp_path / "keys")
    second.load_keys(tmp_path / "keys")
    x = unlike_calibration(network, 3, 4)
    assert first.cost.lanes > 1
    result = first.run(first.encrypt(x))
    np.testing.assert_array_equal(first.decrypt(result), network(x))
    second.encrypt(x)
    with pytest.raises(fheconv.ArtifactError, match="other keys"):
        second.decrypt(result)
    np.testing.assert_array_equal(second.decrypt(first.run(first.encrypt(x[:1]))), network(x[:1]))
