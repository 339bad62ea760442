"""Saved circuits: both sides from files, what is in the files, and files that are no good."""

import copy
import json
import os
import pickle
import stat
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fheconv
from fheconv.circuits.files import archive as artifacts
from fheconv.circuits.files.recipe import Recipe
from fheconv.circuits.keys import EVALUATION, StoredKeys
from fheconv.circuits.native.worker import Worker, worker
from tests.support.files import parts_of, sealed, secret_rows, secrets_held, shown, zipped
from tests.support.nets import integer_images, quantized

P_ERROR = 1e-4


@pytest.fixture(scope="module")
def network():
    return quantized(3, depth=1, size=(1, 4, 4), accumulator_bits=4)


@pytest.fixture(scope="module")
def circuit(network):
    made = fheconv.compile(network, fheconv.CompileConfig(p_error=P_ERROR))
    made.keygen()
    return made


@pytest.fixture(scope="module")
def folder(circuit, tmp_path_factory):
    made = tmp_path_factory.mktemp("saved")
    circuit.save(made)
    return made


@pytest.fixture(scope="module")
def client(folder):
    made = fheconv.load_client(folder / "client.zip")
    made.keygen()
    return made


@pytest.fixture(scope="module")
def keys(client):
    return client.evaluation_keys


@pytest.fixture(scope="module")
def server(folder):
    return fheconv.load_server(folder / "server.zip")


@pytest.fixture
def session():
    made = Worker()
    yield made
    made.stop()


def images(network, count):
    q = integer_images(network, 0, count)[:count]
    return (q - network.input.zero_point) * network.input.scale


def test_both_sides_from_files_do_what_the_circuit_does(network, circuit, client, server, keys):
    x = images(network, 3)
    encrypted = client.encrypt(x)
    results = server.run(encrypted, keys)
    np.testing.assert_array_equal(client.decrypt(results), network(x))
    np.testing.assert_array_equal(client.decrypt(results, dequantize=False), network.integers(x))
    one = client.decrypt(server.run(client.encrypt(x[0]), keys))
    np.testing.assert_array_equal(one, network(x[0]))
    assert client.fingerprint == server.fingerprint == encrypted.fingerprint


def test_a_network_without_lookups_and_an_empty_batch(tmp_path):
    weight = np.array([[[[1, -1], [2, 3]], [[0, 1], [1, 0]]]])
    network = fheconv.quantize(fheconv.Conv.of(weight), np.arange(18).reshape(2, 3, 3) % 4)
    circuit = fheconv.compile(network)
    x = np.arange(36).reshape(2, 2, 3, 3) % 4
    circuit.save(tmp_path)
    client = fheconv.load_client((tmp_path / "client.zip").read_bytes())
    server = fheconv.load_server((tmp_path / "server.zip").read_bytes())
    client.keygen()
    for some in (x, x[:0]):
        result = client.decrypt(server.run(client.encrypt(some), client.evaluation_keys))
        np.testing.assert_array_equal(result, network(some))
        assert result.shape == network(some).shape


def test_keys_of_the_circuit_are_those_of_its_client(network, circuit, server, folder, tmp_path):
    circuit.save_keys(tmp_path / "keys")
    client = fheconv.load_client(folder / "client.zip")
    client.load_keys(tmp_path / "keys")
    x = images(network, 1)
    results = server.run(circuit.encrypt(x), client.evaluation_keys)
    np.testing.assert_array_equal(client.decrypt(results), network(x))
    np.testing.assert_array_equal(circuit.decrypt(results), network(x))
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o600
    with pytest.raises(fheconv.ArtifactError, match="exists"):
        client.save_keys(tmp_path / "keys")
    client.save_keys(tmp_path / "keys", overwrite=True)


@pytest.mark.slow
def test_keys_in_a_file_or_in_bytes_serve_alike(
    network, client, server, keys, session, tmp_path, monkeypatch
):
    x = images(network, 1)
    monkeypatch.chdir(tmp_path)  # a worker works in another folder
    keys.save("evaluation")
    stored = StoredKeys.of("evaluation")
    again = fheconv.EvaluationKeys.from_bytes(keys.to_bytes())
    assert again == keys
    assert stored.name == again.name == keys.to_bytes()[-32:].hex()
    assert stored.read() == keys.payload
    beside = server.beside(session)
    for one in (again, stored):
        np.testing.assert_array_equal(client.decrypt(beside.run(client.encrypt(x), one)), network(x))


@pytest.mark.slow
def test_a_server_keeps_a_few_key_sets_and_takes_others_up_again(network, folder, session):
    server = fheconv.load_server(folder / "server.zip").beside(session, keys_in_memory=1)
    x = images(network, 1)
    clients = [fheconv.load_client(folder / "client.zip") for _ in range(2)]
    for client in clients:
        client.keygen()
    all_keys = [client.evaluation_keys for client in clients]
    for _ in range(2):
        for client, keys in zip(clients, all_keys, strict=True):
            np.testing.assert_array_equal(client.decrypt(server.run(client.encrypt(x), keys)), network(x))


@pytest.mark.slow
def test_both_sides_outlive_the_native_library(network, client, server, keys):
    x = images(network, 1)
    encrypted = client.encrypt(x)
    worker().stop()
    results = server.run(encrypted, keys)
    worker().stop()
    np.testing.assert_array_equal(client.decrypt(results), network(x))


@pytest.mark.slow
def test_what_belongs_to_others_is_refused_before_the_library_sees_it(
    network, client, server, keys, folder, session, monkeypatch
):
    other = fheconv.load_client(folder / "client.zip")
    other.keygen()
    assert other.evaluation_keys.payload != keys.payload
    encrypted = client.encrypt(images(network, 1))
    wrong = fheconv.compile(quantized(4, depth=1, size=(1, 4, 4), accumulator_bits=4))
    wrong.keygen()
    stopped = server.beside(session)
    monkeypatch.setattr(session, "request", None)  # nothing may get to it
    with pytest.raises(fheconv.ArtifactError, match="other keys"):
        stopped.run(encrypted, other.evaluation_keys)
    with pytest.raises(fheconv.ArtifactError, match="belongs to another circuit"):
        stopped.run(wrong.encrypt(np.zeros(wrong.network.input_shape)), keys)
    with pytest.raises(fheconv.ArtifactError, match="keys belong to another circuit"):
        stopped.run(encrypted, wrong.evaluation_keys)
    with pytest.raises(fheconv.ArtifactError, match="evaluation keys, not bytes"):
        stopped.run(encrypted, keys.payload)
    with pytest.raises(fheconv.ArtifactError, match=r"encrypt\(\)"):
        stopped.run(server.run(encrypted, keys), keys)
    large = fheconv.Ciphertext(**{**vars(encrypted), "values": (b"0" * 10**6,)})
    with pytest.raises(fheconv.ArtifactError, match=r"value of 1,000,000 bytes"):
        stopped.run(large, keys)
    with pytest.raises(fheconv.ArtifactError, match="other keys"):
        other.decrypt(server.run(encrypted, keys))


def test_bytes_that_are_no_ciphertext_are_an_error_and_the_server_goes_on(network, client, server, keys):
    encrypted = client.encrypt(images(network, 1))
    for bad in (b"", b"0" * 1000, encrypted.values[0][:-20]):
        with pytest.raises(fheconv.ExecutionError):
            server.run(fheconv.Ciphertext(**{**vars(encrypted), "values": (bad,)}), keys)
    np.testing.assert_array_equal(client.decrypt(server.run(encrypted, keys)), network(images(network, 1)))


def test_a_client_without_keys_says_so(folder, network):
    client = fheconv.load_client(folder / "client.zip")
    for step in (
        lambda: client.encrypt(images(network, 1)),
        lambda: client.evaluation_keys,
        lambda: client.save_keys("nowhere"),
    ):
        with pytest.raises(fheconv.NotCompiledError, match="keygen"):
            step()


def test_no_file_and_no_server_holds_a_secret(circuit, client, server, keys, folder, tmp_path):
    """The secret keys are numbers 0 and 1: where 32 of them stand in a row, that is no accident."""
    (both,) = secrets_held(client)
    client.save_keys(tmp_path / "keys")
    assert both in (tmp_path / "keys").read_bytes()
    for path in folder.iterdir():
        with zipfile.ZipFile(path) as archive:
            assert sum(secret_rows(archive.read(name)) for name in archive.namelist()) == 0
    assert secret_rows(keys.to_bytes()) == 0
    assert secrets_held(server) == []
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        for side in (client, server):
            with pytest.raises(fheconv.ArtifactError, match="cannot be copied"):
                attempt(side)
    assert repr(both)[2:40] not in shown(client) + repr(keys)


# Files that are no good.


def changed(parts, name, **fields):
    return {**parts, name: json.dumps({**json.loads(parts[name]), **fields}).encode()}


@pytest.fixture(scope="module")
def parts(folder):
    return parts_of(folder / "server.zip")


def load(data, tmp_path):
    (tmp_path / "server.zip").write_bytes(data)
    return fheconv.load_server(tmp_path / "server.zip")


def test_the_same_circuit_is_saved_as_the_same_bytes(circuit, folder, tmp_path):
    circuit.save(tmp_path)
    for name in ("client.zip", "server.zip"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: {**p, "../../escaped": b"x"}, "escaped"),
        (lambda p: {**p, "/etc/passwd": b"x"}, "belong"),
        (lambda p: {name: part for name, part in p.items() if name != "circuit.mlir"}, "belong"),
        (lambda p: changed(p, "manifest.json", format=3), "format 3, and this fheconv reads formats 1 and 2"),
        (lambda p: changed(p, "manifest.json", format="1"), "names no format"),
        (lambda p: changed(p, "manifest.json", concrete="2.9.0"), "concrete-python 2.9.0"),
        (lambda p: changed(p, "manifest.json", fingerprint="0" * 64), "altered: its contents have"),
        (lambda p: changed(p, "manifest.json", fingerprint=7), "manifest is altered"),
        (lambda p: changed(p, "manifest.json", more=7), "manifest is altered"),
        (lambda p: changed(p, "manifest.json", cost={}), "manifest is altered"),
        (lambda p: changed(p, "manifest.json", cost={"layers": [[]]}), "manifest is altered"),
        (lambda p: changed(p, "manifest.json", input_shape=["a"]), "manifest is altered"),
        (lambda p: changed(p, "manifest.json", class_names=[7]), "manifest is altered"),
        (lambda p: changed(p, "config.json", p_error=2), "compile options in .* are altered"),
        (lambda p: changed(p, "config.json", parameters=[7]), "compile options in .* are altered"),
        (lambda p: {**p, "config.json": b"{}"}, "compile options in .* are altered"),
        (lambda p: {**p, "config.json": b"[" * 10**5}, "not JSON"),
        (lambda p: {**p, "manifest.json": b"\xff"}, "not JSON"),
        (lambda p: {**p, "circuit.mlir": p["circuit.mlir"] + b" "}, "altered: its contents have"),
        (lambda p: {**p, "specs.json": b"{}"}, "altered: its contents have"),
    ],
)
def test_files_of_others_are_refused_and_say_why(change, words, parts, tmp_path):
    with pytest.raises(fheconv.ArtifactError, match=words):
        load(zipped(change(parts)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["server.zip"]


@pytest.mark.parametrize("mlir", [b"", b"no program", b"module { }", b"\x00" * 99], ids=str)
def test_programs_that_are_none_are_a_compilation_error(mlir, parts, tmp_path):
    with pytest.raises(fheconv.CompilationError):
        load(zipped(sealed({**parts, "circuit.mlir": mlir})), tmp_path)


def test_a_program_compiled_otherwise_than_it_was_is_refused(parts, tmp_path):
    with pytest.raises(fheconv.ArtifactError, match="other parameters here"):
        load(zipped(changed(parts, "config.json", p_error=0.3)), tmp_path)


def test_altered_parts_are_noticed(parts, tmp_path):
    altered = {**parts, "circuit.mlir": parts["circuit.mlir"].replace(b"1", b"2", 1)}
    with pytest.raises(fheconv.ArtifactError, match=r"SHA-256 of circuit\.mlir"):
        load(zipped(altered, digests=False), tmp_path)


def test_digests_that_are_none_are_refused(parts, tmp_path):
    for digests in (b"[]", b"7", b"null"):
        with pytest.raises(fheconv.ArtifactError, match="is no object"):
            load(zipped({**parts, artifacts.DIGESTS: digests}, digests=False), tmp_path)


def test_a_client_is_no_server_and_a_server_no_client(folder):
    with pytest.raises(fheconv.ArtifactError, match=r"is a client\.zip; give the server\.zip"):
        fheconv.load_server(folder / "client.zip")
    with pytest.raises(fheconv.ArtifactError, match=r"is a server\.zip; give the client\.zip"):
        fheconv.load_client(folder / "server.zip")


def test_bombs_are_not_unpacked(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "MOST_BYTES", 10**6)
    bomb = zipped({**parts, "circuit.mlir": b"\0" * 10**7})
    assert len(bomb) < 10**5
    with pytest.raises(fheconv.ArtifactError, match="unpack to more than 1,000,000"):
        load(bomb, tmp_path)
    with pytest.raises(fheconv.ArtifactError, match="no file of a circuit has more"):
        load(b"0" * (10**6 + 1), tmp_path)


def test_a_bomb_that_lies_about_its_size_is_noticed(parts, tmp_path):
    honest = zipped({**parts, "circuit.mlir": b"\0" * 10**7})
    lying = honest.replace((10**7).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    assert lying != honest
    with pytest.raises(fheconv.ArtifactError, match="truncated, altered"):
        load(lying, tmp_path)


@given(data=st.data())
def test_whatever_happens_to_a_file_is_an_artifact_error(folder, data):
    """Bytes cut off, flipped or put in; a client's file, whose loading takes no time."""
    good = (folder / "client.zip").read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    flipped = good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    for bad in (good[:at], good[:at] + data.draw(st.binary(min_size=1, max_size=9)) + good[at:], flipped):
        try:
            client = fheconv.load_client(bad)
        except fheconv.ArtifactError:
            continue
        # Not every byte of a zip means something; what was read is what was saved.
        assert client.manifest.to_dict() == fheconv.load_client(good).manifest.to_dict()


def test_files_that_cannot_be_read_or_written_say_so(circuit, tmp_path):
    with pytest.raises(fheconv.ArtifactError, match="cannot be read"):
        fheconv.load_client(tmp_path / "missing.zip")
    (tmp_path / "file").touch()
    with pytest.raises(fheconv.ArtifactError, match="no folder"):
        circuit.save(tmp_path / "file")
    with pytest.raises(fheconv.ArtifactError, match="cannot be read"):
        StoredKeys.of(tmp_path / "missing")


def test_damaged_evaluation_keys_are_refused(keys, tmp_path):
    data = keys.to_bytes()
    for bad, words in (
        (data[:-1], "truncated"),
        (data[:5000] + bytes([data[5000] ^ 1]) + data[5001:], "SHA-256"),
        (data + b"0", "followed"),
        (b"PK" + data, "begin otherwise"),
        (EVALUATION.pack({"fingerprint": 7, "key_id": "a"}, []), "fingerprint is 7"),
        (EVALUATION.pack({"fingerprint": "a", "key_id": ""}, []), "key_id is ''"),
    ):
        (tmp_path / "keys").write_bytes(bad)
        with pytest.raises(fheconv.ArtifactError, match=words):
            StoredKeys.of(tmp_path / "keys")
        with pytest.raises(fheconv.ArtifactError, match=words):
            fheconv.EvaluationKeys.from_bytes(bad)
    with pytest.raises(fheconv.ArtifactError, match="max_bytes"):
        StoredKeys.of(tmp_path / "keys", max_bytes=5)


def test_class_names_are_written_and_checked(tmp_path):
    network = quantized(3, depth=1, size=(1, 4, 4), accumulator_bits=4)
    circuit = fheconv.compile(network, fheconv.CompileConfig(p_error=P_ERROR))
    names = [f"class {n}" for n in range(network.output_shape[0])]
    if len(network.output_shape) == 1:
        circuit.save(tmp_path, class_names=names)
        assert fheconv.load_client(tmp_path / "client.zip").manifest.class_names == tuple(names)
    for wrong in ("abc", [1, 2], names[1:], [*names, "more"]):
        with pytest.raises(fheconv.InvalidArgumentError, match="class_names"):
            circuit.save(tmp_path, class_names=wrong)


def test_a_circuit_that_depends_on_none_of_its_lookups(tmp_path):
    """Concrete leaves the lookups out, and is configured for a network that has some."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 1, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4, 2)
    )
    with torch.no_grad():
        model[0].bias.fill_(0.5)  # so that activations are not all zero
        model[3].weight.zero_()
    x = np.random.default_rng(0).random((4, 1, 3, 3))
    network = fheconv.quantize(model, x)
    circuit = fheconv.compile(network, fheconv.CompileConfig(p_error=P_ERROR))
    assert circuit.cost.lookups == 0 < circuit.cost.layers[0].lookups
    circuit.save(tmp_path)
    client = fheconv.load_client(tmp_path / "client.zip")
    server = fheconv.load_server(tmp_path / "server.zip")
    client.keygen()
    results = server.run(client.encrypt(x), client.evaluation_keys)
    np.testing.assert_array_equal(client.decrypt(results), network(x))


def test_the_ends_of_the_input_range_can_be_encrypted_and_no_more(network, client):
    assert client.input_range == tuple(image.flat[0] for image in images(network, 2))
    for end, outside in zip(client.input_range, (-1, 1), strict=True):
        client.encrypt(np.full(network.input_shape, end))
        with pytest.raises(fheconv.InputRangeError):
            client.encrypt(np.full(network.input_shape, end + outside * network.input.scale))


def test_a_manifest_of_other_shapes_is_refused(folder):
    inside = parts_of(folder / "client.zip")
    manifest = json.loads(inside["manifest.json"])
    for changes in ({"output_shape": [77]}, {"input_shape": [1, 4, 5]}, {"class_names": ["a"] * 1000}):
        altered = json.dumps({**manifest, **changes}).encode()
        with pytest.raises(fheconv.ArtifactError, match="altered"):
            fheconv.load_client(zipped({**inside, "manifest.json": altered}))


def test_a_ciphertext_in_a_file(network, client, tmp_path):
    encrypted = client.encrypt(images(network, 1))
    encrypted.save(tmp_path / "x.ct")
    assert fheconv.Ciphertext.load(tmp_path / "x.ct") == encrypted
    with pytest.raises(fheconv.ArtifactError, match="max_bytes"):
        fheconv.Ciphertext.load(tmp_path / "x.ct", max_bytes=100)
    with pytest.raises(fheconv.ArtifactError, match="cannot be read"):
        fheconv.Ciphertext.load(tmp_path)


@pytest.fixture
def fhe():
    from concrete import fhe

    return fhe


@pytest.fixture
def recipe(fhe):
    return Recipe.of(fheconv.CompileConfig(configuration=fhe.Configuration(p_error=0.01))).to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("own", [{}, {"p_error": 0.001}], ids=["alone", "with another p_error"])
def test_a_configuration_of_concretes_own_is_saved(fhe, network, tmp_path, own):
    settings = {
        "p_error": P_ERROR,
        "parameter_selection_strategy": fhe.ParameterSelectionStrategy.MONO,
        "security_level": type(fhe.Configuration().security_level)(132),
        "compress_input_ciphertexts": True,
    }
    config = fheconv.CompileConfig(configuration=fhe.Configuration(**settings), **own)
    circuit = fheconv.compile(network, config)
    circuit.save(tmp_path)
    client, server = (getattr(fheconv, f"load_{n}")(tmp_path / f"{n}.zip") for n in ("client", "server"))
    assert server.cost.p_error == circuit.cost.p_error <= own.get("p_error", P_ERROR)
    client.keygen()
    x = images(network, 1)
    np.testing.assert_array_equal(
        client.decrypt(server.run(client.encrypt(x), client.evaluation_keys)), network(x)
    )


@pytest.mark.parametrize("name", ["composable", "dataflow_parallelize", "use_gpu"])
def test_a_setting_that_changes_what_a_server_does_is_not_saved(fhe, name):
    with pytest.raises(fheconv.InvalidArgumentError, match=rf"configuration\.{name}=True cannot be saved"):
        Recipe.of(fheconv.CompileConfig(configuration=fhe.Configuration(**{name: True})))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("p_error", 0),
        ("p_error", 1.0),
        ("p_error", "0.1"),
        ("p_error", float("nan")),
        ("security_level", 80),
        ("security_level", 128.0),
        ("parameter_selection_strategy", "other"),
        ("multi_parameter_strategy", None),
        ("loop_parallelize", 1),
        ("use_gpu", True),
        ("verbose", True),
    ],
)
def test_settings_that_no_file_has_are_refused(recipe, name, value):
    assert Recipe.from_dict(recipe).to_dict() == recipe
    with pytest.raises((ValueError, fheconv.InvalidArgumentError)):
        Recipe.from_dict({**recipe, "settings": {**recipe["settings"], name: value}})


def test_a_setting_that_is_missing_is_refused(recipe):
    settings = {name: value for name, value in recipe["settings"].items() if name != "p_error"}
    with pytest.raises(ValueError, match="the settings must be"):
        Recipe.from_dict({**recipe, "settings": settings})


@pytest.mark.slow
def test_parameters_that_were_chosen_are_saved(network, tmp_path):
    parameters = fheconv.ParameterRange(glwe_dimensions=(1,), keyswitch_levels=(1, 2, 3))
    config = fheconv.CompileConfig(p_error=P_ERROR, parameters=parameters, security_level=132)
    fheconv.compile(network, config).save(tmp_path)
    server = fheconv.load_server(tmp_path / "server.zip", time_limit=100.0)
    client = fheconv.load_client(tmp_path / "client.zip")
    client.keygen()
    x = images(network, 1)
    np.testing.assert_array_equal(
        client.decrypt(server.run(client.encrypt(x), client.evaluation_keys)), network(x)
    )


@pytest.mark.slow
def test_the_client_needs_neither_torch_nor_concrete_in_its_process(folder):
    script = (
        "import sys, fheconv, numpy as np\n"
        f"client = fheconv.load_client({str(folder / 'client.zip')!r})\n"
        "client.keygen()\n"
        "client.encrypt(np.zeros(client.manifest.input_shape))\n"
        "print(sorted({'torch', 'concrete', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert done.stdout == "[]\n", done.stderr


def test_the_manifest_shows_itself(folder):
    manifest = artifacts.load_manifest(folder / "client.zip")
    assert manifest.fingerprint in str(manifest)
    assert manifest == artifacts.load_manifest(folder / "server.zip")
