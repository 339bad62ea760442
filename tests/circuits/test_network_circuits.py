"""Whole networks compiled, and some of them really encrypted."""

import numpy as np
import pytest

import fheconv
from fheconv.networks.integers import blank_image
from tests.support.nets import integer_images, quantize, quantized, random_net, real_images

# Nearly black images in a range up to white are on purpose here.
pytestmark = pytest.mark.filterwarnings("ignore::fheconv.InputScaleWarning")

# Small networks of two and three layers: a convolution, one with pooling, a residual block.
SMALL = [(3, (1, 5, 5)), (11, (1, 5, 5)), (7, (1, 4, 4))]


def dark_network(seed, size, **options):
    """A network calibrated on nearly black images only, which takes white ones."""
    module, images = random_net(seed, depth=1, size=size)
    return quantize(module, np.abs(images) * 0.05, input_range=(0, 1), input_bits=3, **options)


def encrypted(circuit, q):
    """The last accumulators of integer images, by an encrypted run."""
    images = real_images(circuit.network, q)
    return circuit.decrypt(circuit.run(circuit.encrypt(images)), dequantize=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fheconv.CostWarning")  # they are only simulated
@pytest.mark.parametrize("seed", [0, 1, *range(3, 10), 11, 12, 13])
def test_compiled_networks_compute_the_clear_integers_when_simulated(seed):
    network = quantized(seed, size=(1, 5, 5), accumulator_bits=8, activation_bits=3, input_bits=3)
    circuit = fheconv.compile(network, fheconv.CompileConfig(p_error=1e-9))
    budget = network.budget()
    assert circuit.cost.accumulator_bits <= 8
    assert circuit.cost.p_error <= 1e-9
    # Concrete leaves out layers all of whose tables or weights are constant.
    assert circuit.cost.lookups == budget.lookups or folds(network)
    assert circuit.cost.lookups <= budget.lookups
    q = integer_images(network, seed, 2)
    x = real_images(network, q)
    np.testing.assert_array_equal(circuit.predict(x), network(x))
    np.testing.assert_array_equal(circuit.predict(x, fhe="simulate"), network(x))
    np.testing.assert_array_equal(circuit.accumulate(q, "simulate"), network.accumulate(q))


def folds(network):
    """Whether some layer has no weights left, or nothing but constant tables."""
    layers = [layer for layer in network.layers if hasattr(layer, "lookup")]
    tables = [layer.lookup.tables for layer in layers if layer.lookup is not None]
    weights = [
        step.weight for one in layers for term in one.terms for step in term.steps if hasattr(step, "weight")
    ]
    return not all(weight.any() for weight in weights) or any(
        (table == table[:, :1]).all() for table in tables
    )


@pytest.mark.parametrize(("seed", "size"), SMALL)
@pytest.mark.slow
def test_encrypted_results_are_the_clear_integers_on_images_unlike_calibration(seed, size):
    network = dark_network(seed, size, accumulator_bits=5)
    report = network.budget(5).require()
    assert report.proved
    assert 0 < report.lookups <= 40
    circuit = fheconv.compile(network)
    circuit.keygen()
    q = integer_images(network, seed, 5)
    expected = network.accumulate(q)
    assert len(np.unique(expected)) > 5
    np.testing.assert_array_equal(encrypted(circuit, q), expected)
    assert circuit.verify(real_images(network, q[1:2])).ok


@pytest.mark.slow
def test_maxima_come_out_right_encrypted():
    network = dark_network(8, (1, 4, 4), accumulator_bits=5)
    assert [layer.name for layer in network.budget().layers if layer.kind.startswith("maximum")]
    circuit = fheconv.compile(network)
    circuit.keygen()
    q = integer_images(network, 8, 1)[1:]
    np.testing.assert_array_equal(encrypted(circuit, q), network.accumulate(q))


@pytest.mark.slow
def test_rounded_lookups_are_at_most_some_steps_off_encrypted():
    """Rounding is approximate: near a boundary between two columns, either may be looked up."""
    network = dark_network(11, (1, 5, 5), accumulator_bits=8, rounding_bits=4, activation_bits=3)
    (layer, last) = network.layers
    assert (layer.lookup.bits, layer.lookup.dropped_bits) == (8, 4)
    circuit = fheconv.compile(network)
    assert circuit.cost.layers[0].lookup_bits == 4
    circuit.keygen()
    q = integer_images(network, 11, 4)
    # What the last layer makes of one column more or less everywhere before it.
    columns = layer.lookup.tables.astype(np.int64)
    jump = np.abs(np.diff(columns, axis=1)).max()
    matrix = last.terms[0].matrix(network.shapes[1]).toarray()
    most = (np.abs(matrix).sum(axis=0) * jump).reshape(last.shape)
    difference = np.abs(encrypted(circuit, q) - network.accumulate(q))
    assert (difference <= most).all()
    assert difference.mean() <= 0.25 * most.mean()


def outside(network, q):
    """Which of some images lead outside a table."""
    tensors = network.tensors(q)
    wrong = np.zeros(len(q), bool)
    for layer in network.layers:
        table = getattr(layer, "lookup", None)
        if table is not None:
            offset = layer.accumulate(tensors) - table.minimum.reshape(-1, *[1] * (len(layer.shape) - 1))
            wrong |= ((offset < 0) | (offset >= 2**table.bits)).reshape(len(q), -1).any(axis=1)
    return wrong


def defined_network(seed, size):
    module, images = random_net(seed, depth=1, size=size)
    options = {"accumulator_bits": 6, "activation_bits": 3, "overflow": "defined", "margin": 0.0}
    return quantize(module, np.abs(images) * 0.3, input_range=(0, 1), input_bits=3, **options)


@pytest.mark.parametrize(("seed", "size"), [(4, (1, 4, 4)), (3, (1, 4, 4))])
@pytest.mark.slow
def test_what_leaves_a_window_turns_encrypted_as_it_does_in_clear(seed, size):
    """A lookup outside its window gives what the torus gives: an entry with the opposite sign."""
    network = defined_network(seed, size)
    assert not network.budget().proved
    circuit = fheconv.compile(network)
    circuit.keygen()
    q = integer_images(network, seed, 3)
    wraps = outside(network, q)
    assert wraps.any()
    expected, got = network.accumulate(q), encrypted(circuit, q)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(circuit.accumulate(q, "simulate"), got)
    seen = blank_image(network.input, network.input_shape)
    assert not outside(network, seen)[0]
    np.testing.assert_array_equal(encrypted(circuit, seen), network.accumulate(seen))


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    """A circuit, a file with its keys, a ciphertext made with them, and its result in clear."""
    network = dark_network(11, (1, 5, 5), accumulator_bits=5)
    circuit = fheconv.compile(network)
    circuit.keygen()
    path = tmp_path_factory.mktemp("keys") / "circuit.keys"
    circuit.save_keys(path)
    q = integer_images(network, 0, 1)[1:]
    return circuit, path, circuit.encrypt(real_images(network, q)), network.accumulate(q)


@pytest.mark.slow
def test_saved_keys_decrypt_in_a_new_circuit_what_was_encrypted_before(keyed):
    circuit, path, ciphertext, expected = keyed
    other = fheconv.compile(circuit.network)
    with pytest.raises(fheconv.NotCompiledError):
        other.run(ciphertext)
    other.load_keys(path)
    result = other.run(fheconv.Ciphertext.from_bytes(ciphertext.to_bytes()))
    np.testing.assert_array_equal(other.decrypt(result, dequantize=False), expected)
    np.testing.assert_array_equal(circuit.decrypt(result, dequantize=False), expected)


@pytest.mark.slow
def test_keys_of_a_file_replace_those_that_were_made(keyed):
    circuit, path, ciphertext, expected = keyed
    other = fheconv.compile(circuit.network)
    other.keygen()
    with pytest.raises(fheconv.ArtifactError, match="other keys"):
        other.run(ciphertext)
    other.load_keys(path)
    np.testing.assert_array_equal(other.decrypt(other.run(ciphertext), dequantize=False), expected)


def test_a_key_file_is_its_owners_and_is_not_overwritten_by_mistake(keyed, tmp_path):
    circuit, path, _, _ = keyed
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    with pytest.raises(fheconv.ArtifactError, match=r"exists.*overwrite=True"):
        circuit.save_keys(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    copy = tmp_path / "copy.keys"
    copy.write_text("something else")
    copy.chmod(0o644)
    circuit.save_keys(copy, overwrite=True)
    assert copy.read_bytes() == before
    assert copy.stat().st_mode & 0o777 == 0o600
    with pytest.raises(fheconv.ArtifactError, match="cannot be written"):
        circuit.save_keys(tmp_path / "nowhere" / "circuit.keys")


def test_there_is_nothing_to_save_before_keys_are_made(keyed, tmp_path):
    other = fheconv.compile(keyed[0].network)
    with pytest.raises(fheconv.NotCompiledError, match="keygen"):
        other.save_keys(tmp_path / "circuit.keys")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_damaged_and_foreign_key_files_are_refused_and_the_keys_stay(keyed, tmp_path):
    circuit, path, ciphertext, expected = keyed
    data = path.read_bytes()
    middle = len(data) // 2
    bad = tmp_path / "bad.keys"
    for damaged in (
        b"",
        data[:7],
        data[:middle],
        data[:-1],
        data + b"\0",
        data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        ciphertext.to_bytes(),
    ):
        bad.write_bytes(damaged)
        with pytest.raises(fheconv.ArtifactError):
            circuit.load_keys(bad)
    with pytest.raises(fheconv.ArtifactError, match="cannot be read"):
        circuit.load_keys(tmp_path / "nowhere.keys")
    with pytest.raises(fheconv.ArtifactError, match="cannot be read"):
        circuit.load_keys(tmp_path)
    other = fheconv.compile(dark_network(4, (1, 4, 4), accumulator_bits=5))
    with pytest.raises(fheconv.ArtifactError, match="another circuit"):
        other.load_keys(path)
    with pytest.raises(fheconv.NotCompiledError):
        other.encrypt(np.zeros((1, 1, 4, 4)))
    np.testing.assert_array_equal(circuit.decrypt(circuit.run(ciphertext), dequantize=False), expected)
