"""A retrained network runs under the keys of the old one, and nothing runs under keys that do not fit."""

import copy
import json

import numpy as np
import pytest

import fheconv
from fheconv.circuits.files.identity import Identity, keyset_of
from tests.support.files import parts_of, sealed, zipped
from tests.support.nets import integer_images, quantized

CONFIG = fheconv.CompileConfig(p_error=1e-4)


def trained(seed, bits=4):
    return quantized(seed, depth=1, size=(1, 4, 4), accumulator_bits=bits)


def image(network):
    q = integer_images(network, 0, 3)[2:]
    return (q - network.input.zero_point) * network.input.scale


OLD, NEW = trained(3), trained(8)


@pytest.fixture(scope="module")
def old():
    return fheconv.compile(OLD, CONFIG)


@pytest.fixture(scope="module")
def new(old):
    return fheconv.compile(NEW, keys_of=old)


@pytest.fixture(scope="module")
def folders(old, new, tmp_path_factory):
    made = [tmp_path_factory.mktemp("saved") for _ in range(2)]
    old.save(made[0])
    new.save(made[1])
    return made


def test_a_retrained_network_has_the_key_set_and_its_own_fingerprint(old, new):
    assert new.keyset == old.keyset
    assert new.fingerprint != old.fingerprint
    assert new.has_keys_of(old)
    assert new.config.p_error == CONFIG.p_error


@pytest.mark.slow
def test_the_old_circuit_has_the_keys_that_the_new_one_makes(old, new):
    new.keygen()
    assert old.evaluation_keys.key_id == new.evaluation_keys.key_id
    np.testing.assert_allclose(old.predict(image(OLD), fhe="execute"), OLD(image(OLD)))
    np.testing.assert_allclose(new.predict(image(NEW), fhe="execute"), NEW(image(NEW)))


@pytest.mark.slow
def test_saved_versions_run_under_keys_that_were_made_once(folders, tmp_path):
    first = fheconv.load_client(folders[0] / "client.zip")
    first.keygen()
    first.save_keys(tmp_path / "keys.secret")
    keys = fheconv.EvaluationKeys.from_bytes(first.evaluation_keys.to_bytes())
    second = fheconv.load_client(folders[1] / "client.zip", keys_of=first)
    again = fheconv.load_client(folders[1] / "client.zip")
    again.load_keys(tmp_path / "keys.secret")
    old, new = (fheconv.load_server(folder / "server.zip") for folder in folders)
    np.testing.assert_allclose(first.decrypt(old.run(first.encrypt(image(OLD)), keys)), OLD(image(OLD)))
    for client in (second, again):
        encrypted = client.encrypt(image(NEW))
        np.testing.assert_allclose(client.decrypt(new.run(encrypted, keys)), NEW(image(NEW)))
        with pytest.raises(fheconv.ArtifactError, match="another circuit"):
            old.run(encrypted, keys)
        with pytest.raises(fheconv.ArtifactError, match="another circuit"):
            first.decrypt(new.run(encrypted, keys))


def test_a_network_is_compiled_for_the_keys_of_a_client_file(old, folders):
    circuit = fheconv.compile(NEW, CONFIG, keys_of=folders[0] / "client.zip")
    assert circuit.keyset == old.keyset
    assert not circuit.has_keys_of(old)


def test_a_narrower_network_runs_under_wider_keys_and_is_as_exact():
    wide = fheconv.compile(trained(3, bits=5), fheconv.CompileConfig(p_error=1e-2))
    narrow = fheconv.compile(OLD, keys_of=wide)
    assert narrow.keyset == wide.keyset
    assert narrow.cost.p_error < wide.cost.p_error
    assert narrow.cost.complexity > fheconv.compile(OLD, wide.config).cost.complexity


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "config"),
    [
        (trained(3, bits=6), CONFIG),
        (OLD, fheconv.CompileConfig(p_error=1e-9)),
        (OLD, fheconv.CompileConfig(p_error=1e-4, security_level=132)),
    ],
    ids=["wider", "fails less often", "more secure"],
)
def test_what_needs_other_keys_is_refused(old, network, config):
    with pytest.raises(fheconv.CompilationError, match="cannot run under the given keys"):
        fheconv.compile(network, config, keys_of=old)


@pytest.mark.slow
def test_a_retrained_network_runs_in_stages_under_the_keys_of_the_old_one(tmp_path):
    size = {"size": (1, 5, 5), "accumulator_bits": 5, "activation_bits": 2, "input_bits": 2}
    first, network = (quantized(seed, "conv", **size) for seed in (3, 4))
    old_file, _ = fheconv.compile(first, CONFIG).save(tmp_path / "old")
    staged = fheconv.compile(network, CONFIG, keys_of=old_file, stages="layers", blocks=2)
    client_file, server_file = staged.save(tmp_path / "new")
    owner = fheconv.load_client(old_file)
    owner.keygen()
    client = fheconv.load_client(client_file, keys_of=owner)
    server = fheconv.load_server(server_file)
    assert server.blocks == staged.blocks
    result = server.run(client.encrypt(image(network)), owner.evaluation_keys)
    np.testing.assert_allclose(client.decrypt(result), network(image(network)))


@pytest.mark.slow
def test_stages_that_need_other_keys_are_refused(old):
    for network in (NEW, trained(3, bits=6)):  # as a whole, the first of them runs under these keys
        with pytest.raises(fheconv.CompilationError, match="cannot run under the given keys"):
            fheconv.compile(network, CONFIG, keys_of=old, stages="layers")


def test_the_failure_probability_that_suffices_is_named(old):
    with pytest.raises(fheconv.CompilationError, match=r"p_error=0.0001[^0-9].*compiles") as caught:
        fheconv.compile(OLD, fheconv.CompileConfig(p_error=0.000095), keys_of=old)
    assert "cannot run under the given keys" in str(caught.value)


def test_keys_of_another_kind_and_what_are_no_keys_are_refused(old):
    linear = fheconv.quantize(np.array([[1, -1], [2, 0]]), np.arange(9).reshape(1, 3, 3))
    with pytest.raises(fheconv.CompilationError, match="with lookups, and this network has none"):
        fheconv.compile(linear, keys_of=old)
    with pytest.raises(fheconv.CompilationError, match="without lookups, and this network has lookups"):
        fheconv.compile(OLD, keys_of=fheconv.compile(linear))
    with pytest.raises(fheconv.InvalidArgumentError, match="keys_of=7"):
        fheconv.compile(OLD, keys_of=7)
    with pytest.raises(fheconv.InvalidArgumentError, match="lanes=2"):
        fheconv.compile(OLD, fheconv.CompileConfig(lanes=2), keys_of=old)
    ranged = fheconv.CompileConfig(parameters=fheconv.ParameterRange(glwe_dimensions=(1,)))
    with pytest.raises(fheconv.InvalidArgumentError, match="parameters together with keys_of"):
        fheconv.compile(OLD, ranged, keys_of=old)


def test_much_dearer_keys_are_warned_of_and_too_dear_ones_refused():
    wide = fheconv.compile(trained(3, bits=7), fheconv.CompileConfig(p_error=1e-2))
    with pytest.warns(fheconv.CostWarning, match="times as long as under keys of its own"):
        fheconv.compile(OLD, keys_of=wide)
    seconds = OLD.forecast(wide.config).seconds * 2
    with pytest.raises(fheconv.CostError, match="Under the given keys"):
        fheconv.compile(OLD, fheconv.CompileConfig(p_error=1e-2, most_seconds=seconds), keys_of=wide)


def forged(folder, change):
    """A client.zip with other parameters, and with everything in it that can be made to fit them."""
    parts = parts_of(folder / "client.zip")
    specs, manifest = json.loads(parts["specs.json"]), json.loads(parts["manifest.json"])
    change(specs)
    text = json.dumps(specs).encode()
    identity = manifest["identity"]
    identity["parameters"] = Identity.of(text, b"", b"").parameters
    manifest["fingerprint"] = Identity(**identity).fingerprint
    return zipped(sealed({**parts, "specs.json": text, "manifest.json": json.dumps(manifest).encode()}))


def take_another_place(specs):
    """Encrypt under the short secret, whose noise would be that of the long one."""
    specs["circuits"][0]["inputs"][0]["typeInfo"]["lweCiphertext"]["encryption"]["keyId"] = 1


def claim_a_shorter_secret(specs):
    short = specs["keyset"]["lweSecretKeys"][1]["params"]
    short["lweDimension"] -= 1


@pytest.mark.parametrize("change", [take_another_place, claim_a_shorter_secret])
def test_a_forged_file_gets_no_ciphertext_under_keys_of_other_parameters(folders, change):
    with pytest.raises(fheconv.ArtifactError, match=r"altered|not secure"):
        fheconv.load_client(forged(folders[0], change))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """The files of a circuit that is secure, but has other parameters."""
    folder = tmp_path_factory.mktemp("foreign")
    fheconv.compile(NEW, fheconv.CompileConfig(p_error=1e-3)).save(folder)
    return folder


@pytest.mark.slow
def test_secure_files_of_other_parameters_do_not_get_the_keys(folders, foreign, tmp_path):
    """Whatever the file says of itself: the key set is computed from the parameters it would be used with."""
    owner = fheconv.load_client(folders[0] / "client.zip")
    owner.keygen()
    owner.save_keys(tmp_path / "keys")
    with pytest.raises(fheconv.ArtifactError, match="other parameters than the given keys"):
        fheconv.load_client(foreign / "client.zip", keys_of=owner)
    with pytest.raises(fheconv.ArtifactError, match="other parameters"):
        fheconv.load_client(foreign / "client.zip").load_keys(tmp_path / "keys")
    server = fheconv.load_server(foreign / "server.zip")
    stranger = fheconv.load_client(foreign / "client.zip")
    stranger.keygen()
    with pytest.raises(fheconv.ArtifactError, match="other parameters"):
        server.run(stranger.encrypt(image(NEW)), owner.evaluation_keys)


def test_every_number_of_a_key_is_part_of_the_key_sets_name(folders):
    specs = json.loads(parts_of(folders[0] / "client.zip")["specs.json"])
    names = {keyset_of(json.dumps(specs).encode())}
    numbers = 0
    for kind, keys in specs["keyset"].items():
        for place, key in enumerate(keys):
            for name, value in {**key["params"], **key}.items():
                if isinstance(value, int | float | str):
                    altered = copy.deepcopy(specs)
                    held = altered["keyset"][kind][place]
                    (held if name in held else held["params"])[name] = f"not {value}"
                    names.add(keyset_of(json.dumps(altered).encode()))
                    numbers += 1
    assert len(names) == numbers + 1
    changed = copy.deepcopy(specs)
    changed["circuits"][0]["inputs"] = []
    assert keyset_of(json.dumps(changed).encode()) in names


def test_a_file_that_hides_what_it_was_compiled_for_is_not_served(tmp_path):
    """Without the restriction to the given keys, Concrete would choose others."""
    wide = fheconv.compile(trained(3, bits=5), fheconv.CompileConfig(p_error=1e-2))
    narrow = fheconv.compile(OLD, keys_of=wide)
    narrow.save(tmp_path)
    parts = parts_of(tmp_path / "server.zip")
    assert fheconv.load_server(tmp_path / "server.zip").keyset == wide.keyset
    config = json.loads(parts["config.json"])
    del config["keys_given"]
    with pytest.raises(fheconv.ArtifactError, match="chooses other parameters"):
        fheconv.load_server(zipped(sealed({**parts, "config.json": json.dumps(config).encode()})))
