"""Files whose parameters would make a client encrypt under a short secret are refused."""

import copy
import json

import pytest

import fheconv
from fheconv.circuits.files.security import check_security
from tests.support import serving
from tests.support.files import parts_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("circuit")
    serving.save(folder)
    return folder


@pytest.fixture
def specs(folder):
    return json.loads(parts_of(folder / "client.zip")["specs.json"])


def encrypt_with(specs, dimension):
    """Have the image encrypted under a secret of so many bits, as far as sizes are declared."""
    (image,) = specs["circuits"][0]["inputs"]
    ciphertext = image["typeInfo"]["lweCiphertext"]
    ciphertext["encryption"]["lweDimension"] = dimension
    if ciphertext["compression"] == "none":
        for shape in (ciphertext["concreteShape"], image["rawInfo"]["shape"]):
            shape["dimensions"][-1] = dimension + 1


def short_key(specs, number):
    return {**copy.deepcopy(specs["keyset"]["lweSecretKeys"][0]), "id": number}


def test_a_short_secret_that_nothing_uses_is_refused(specs):
    key = short_key(specs, len(specs["keyset"]["lweSecretKeys"]))
    key["params"]["lweDimension"] = 10
    specs["keyset"]["lweSecretKeys"].append(key)
    with pytest.raises(fheconv.ArtifactError, match="not secure"):
        check_security(json.dumps(specs).encode())


def test_secrets_that_changed_places_are_refused(specs):
    specs["keyset"]["lweSecretKeys"].reverse()
    with pytest.raises(fheconv.ArtifactError, match="has the id"):
        check_security(json.dumps(specs).encode())


@pytest.mark.parametrize("dimension", [10, 600, 2047, 2049, 2048.0])
def test_an_image_encrypted_with_other_dimensions_than_its_secrets_is_refused(specs, dimension):
    encrypt_with(specs, dimension)
    with pytest.raises(fheconv.ArtifactError, match="altered"):
        check_security(json.dumps(specs).encode())


@pytest.mark.parametrize("number", [-1, 2, True, "0", None, 0.0])
def test_secrets_that_do_not_exist_are_refused(specs, number):
    specs["circuits"][0]["inputs"][0]["typeInfo"]["lweCiphertext"]["encryption"]["keyId"] = number
    with pytest.raises(fheconv.ArtifactError, match="altered"):
        check_security(json.dumps(specs).encode())
