"""Checks the parameters in a file from elsewhere before a client makes keys with them.

Whoever writes `client.zip` chooses how its owner encrypts. Parameters without enough noise, or an input that
is declared clear, would give the images away to whoever sees the ciphertexts. So what Concrete is told must
be as noisy as what its own optimiser chooses: for a secret of n random bits, the standard deviation of the
noise is at least 2^(SLOPE · n + BIAS) of the torus, and nowhere less than 2^FLOOR. That is the line by which
Concrete 2.11 gets 128 bits of security out of the lattice estimator (Albrecht, Player and Scott 2015); its
parameters for 132 bits lie above.
"""

import json
import math
from typing import Any

from fheconv.basics.errors import ArtifactError

SLOPE, BIAS, FLOOR = -0.02569678, 2.67593137, -62.0
# The line was fitted to dimensions from 553 on; below 450 Concrete has no parameters.
LEAST_DIMENSION = 450
# Of the numbers above, which are rounded.
TOLERANCE = 1e-4


def check_security(specs: bytes) -> None:
    """Raise `ArtifactError` unless these are parameters of Concrete's with 128 bits of security.

    `specs` is what Concrete writes of a circuit's keys and inputs.
    """
    try:
        parameters = json.loads(specs)
        keyset, circuits = parameters["keyset"], parameters["circuits"]
        dimensions = [_dimension(key, position) for position, key in enumerate(keyset["lweSecretKeys"])]
        kinds = "lweBootstrapKeys", "lweKeyswitchKeys", "packingKeyswitchKeys"
        keys = [key for kind in kinds for key in keyset[kind]]
        for key in keys:
            _check(_at(dimensions, key["outputId"]), key["params"]["variance"])
        if not dimensions or min(dimensions) < LEAST_DIMENSION:
            raise ArtifactError(
                f"The encryption's parameters are not secure: there are secrets of {dimensions} bits, and "
                f"each needs {LEAST_DIMENSION} or more. Do not use this file; ask whoever gave it to you."
            )
        inputs = [one for circuit in circuits for one in circuit["inputs"]]
        for one in inputs:
            if set(one["typeInfo"]) != {"lweCiphertext"}:
                raise ArtifactError("This circuit takes images in clear: nothing would be encrypted.")
            encryption = one["typeInfo"]["lweCiphertext"]["encryption"]
            _check(_at(dimensions, encryption["keyId"]), encryption["variance"])
        for key in keys:
            params, output = key["params"], _at(dimensions, key["outputId"])
            _require(params["inputLweDimension"], _at(dimensions, key["inputId"]))
            _require(params.get("outputLweDimension", output), output)
        for one in (*inputs, *(one for circuit in circuits for one in circuit["outputs"])):
            _check_shapes(one, dimensions)
        if len(circuits) != 1 or len(inputs) != 1:
            raise ValueError(f"{len(circuits)} circuits with {len(inputs)} inputs")
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"The encryption's parameters are altered: {error!r:.200}.") from error


def _dimension(key: Any, position: int) -> int:
    """Return the bits of a secret key. Its `id` must be its position: the native library goes by that."""
    dimension = key["params"]["lweDimension"]
    if type(dimension) is not int or key["params"]["keyType"] != "binary":
        raise ValueError(f"a secret key of {key['params']!r:.100}")
    if type(key["id"]) is not int or key["id"] != position:
        raise ValueError(f"secret key {position} has the id {key['id']!r:.50}")
    return dimension


def _at(dimensions: list[int], number: Any) -> int:
    if type(number) is not int or not 0 <= number < len(dimensions):
        raise ValueError(f"no secret key {number!r:.50}")
    return dimensions[number]


def _require(found: Any, expected: Any) -> None:
    if found != expected or isinstance(found, float | bool):
        raise ValueError(f"{found!r:.100} where {expected} belongs")


def _check_shapes(one: Any, dimensions: list[int]) -> None:
    """Raise `ValueError` unless the shapes of a value are those of ciphertexts under its secret key."""
    ciphertext = one["typeInfo"]["lweCiphertext"]
    encryption, compression = ciphertext["encryption"], ciphertext["compression"]
    dimension = _at(dimensions, encryption["keyId"])
    _require(encryption["lweDimension"], dimension)
    # A ciphertext has a number for each bit of the secret, and its body. Compressed, it has a seed for them.
    last = {"none": dimension + 1, "seed": 3}[compression]
    _require(ciphertext["concreteShape"]["dimensions"], [*ciphertext["abstractShape"]["dimensions"], last])
    _require(one["rawInfo"]["shape"]["dimensions"], ciphertext["concreteShape"]["dimensions"])


def _check(dimension: int, variance: Any) -> None:
    """Raise `ArtifactError` for less noise than a secret of so many bits needs."""
    if type(variance) is not float or not 0 < variance < 1:
        raise ValueError(f"a variance of {variance!r:.50}")
    noise, least = math.log2(variance) / 2, max(SLOPE * dimension + BIAS, FLOOR)
    if dimension < LEAST_DIMENSION or noise < least - TOLERANCE:
        raise ArtifactError(
            f"The encryption's parameters are not secure: for a secret of {dimension} bits the noise has a "
            f"standard deviation of 2^{noise:.1f}, and 128 bits of security need 2^{least:.1f} and at least "
            f"{LEAST_DIMENSION} bits. Do not use this file; ask whoever gave it to you."
        )
