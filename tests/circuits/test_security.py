"""Parameters that a client takes, and those that would give its images away."""

import copy
import json

import numpy as np
import pytest

import fheconv
from fheconv.circuits.files.security import check_security
from tests.support import serving
from tests.support.files import parts_of, sealed, zipped
from tests.support.nets import quantized


def specs_of(network, **options):
    return fheconv.compile(network, fheconv.CompileConfig(**options)).exported().specs


@pytest.mark.filterwarnings("ignore::fheconv.CostWarning")  # no keys are made
@pytest.mark.parametrize("security_level", [128, 132])
@pytest.mark.parametrize("p_error", [0.3, 1e-2, 1e-5, 1e-9])
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.sampled(5)
def test_all_that_concrete_chooses_is_secure(bits, p_error, security_level):
    network = quantized(3, depth=1, size=(1, 4, 4), accumulator_bits=bits)
    check_security(specs_of(network, p_error=p_error, security_level=security_level))


@pytest.mark.parametrize("bits", [2, 8])
def test_so_are_circuits_without_lookups(bits):
    weight = np.array([[[[1, -1], [2, 3]]]]) * bits
    network = fheconv.quantize(fheconv.Conv.of(weight), np.arange(18).reshape(2, 1, 3, 3))
    check_security(specs_of(network, lanes=1))


@pytest.fixture(scope="module")
def specs():
    return json.loads(specs_of(quantized(3, depth=1, size=(1, 4, 4), accumulator_bits=4), p_error=1e-4))


def keyset(specs):
    return specs["keyset"]


def bootstrap(specs):
    return specs["keyset"]["lweBootstrapKeys"][0]


def keyswitch(specs):
    return specs["keyset"]["lweKeyswitchKeys"][0]


def image(specs):
    return specs["circuits"][0]["inputs"][0]["typeInfo"]["lweCiphertext"]["encryption"]


def change_noise(of):
    def change(specs):
        place = of(specs)
        place = place.get("params", place)
        place["variance"] /= 4**0.01  # a hundredth of a bit

    return change


def shorten(specs):
    for key in specs["keyset"]["lweSecretKeys"]:
        key["params"]["lweDimension"] -= 1


def make_tiny(specs):
    for key in specs["keyset"]["lweSecretKeys"]:
        key["params"]["lweDimension"] = 100
    for place in (bootstrap(specs)["params"], keyswitch(specs)["params"], image(specs)):
        place["variance"] = 0.9


@pytest.mark.parametrize(
    "change", [*map(change_noise, (bootstrap, keyswitch, image)), shorten, make_tiny], ids=range(5)
)
def test_less_noise_or_shorter_secrets_are_not_secure(change, specs):
    altered = copy.deepcopy(specs)
    change(altered)
    with pytest.raises(fheconv.ArtifactError, match="not secure"):
        check_security(json.dumps(altered).encode())


def declare_clear(specs):
    specs["circuits"][0]["inputs"][0]["typeInfo"] = {"plaintext": {}}


def test_images_in_clear_are_refused(specs):
    altered = copy.deepcopy(specs)
    declare_clear(altered)
    with pytest.raises(fheconv.ArtifactError, match="in clear"):
        check_security(json.dumps(altered).encode())


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("keyset"),
        lambda s: s.update(circuits=[]),
        lambda s: s["circuits"][0].update(inputs=[]),
        lambda s: s["keyset"].pop("packingKeyswitchKeys"),
        lambda s: s["keyset"]["lweSecretKeys"].pop(),
        lambda s: s["keyset"]["lweSecretKeys"][0]["params"].update(keyType="ternary"),
        lambda s: s["keyset"]["lweSecretKeys"][0]["params"].update(lweDimension="2048"),
        lambda s: image(s).update(variance="0"),
        lambda s: image(s).update(variance=0.0),
        lambda s: image(s).update(variance=float("nan")),
    ],
    ids=range(10),
)
def test_altered_parameters_are_refused(change, specs):
    altered = copy.deepcopy(specs)
    change(altered)
    with pytest.raises(fheconv.ArtifactError, match="parameters are altered"):
        check_security(json.dumps(altered).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"7", b"\xff", b"[" * 10**5], ids=range(5))
def test_what_are_no_parameters_is_refused(data):
    with pytest.raises(fheconv.ArtifactError, match="parameters are altered"):
        check_security(data)


def test_a_client_file_with_weak_parameters_is_not_loaded(specs, tmp_path):
    serving.save(tmp_path)
    weak = copy.deepcopy(specs)
    change_noise(image)(weak)
    parts = {**parts_of(tmp_path / "client.zip"), "specs.json": json.dumps(weak).encode()}
    with pytest.raises(fheconv.ArtifactError, match="not secure"):
        fheconv.load_client(zipped(sealed(parts)))
