"""Computes how many bytes keys and ciphertexts take, from the parameters that Concrete chose.

Concrete has figures of its own. Those of ciphertexts wrap at 2^32. That of bootstrapping keys is too large by
a factor of the GLWE dimension, and tells nothing of compression.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from fheconv.basics.errors import ArtifactError


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The bytes of an encrypted image and of its result, and those of evaluation keys.

    `key_bytes` is what a server needs to compute with the keys. `sent_key_bytes` is what a client sends: of
    compressed keys, the random part is only a seed.
    """

    input_bytes: int
    output_bytes: int
    key_bytes: int
    sent_key_bytes: int


def sizes_of(specs: bytes) -> Sizes:
    """Return the sizes for parameters as Concrete writes them.

    Raises `ArtifactError` for anything else.
    """
    try:
        parameters = json.loads(specs)
        keyset, circuits = parameters["keyset"], parameters["circuits"]
        keys = [_bootstrap_key(key) for key in keyset["lweBootstrapKeys"]]
        keys += [_keyswitch_key(key) for key in keyset["lweKeyswitchKeys"]]
        keys += [_packing_key(key) for key in keyset["packingKeyswitchKeys"]]
        return Sizes(
            input_bytes=sum(_ciphertext(one) for circuit in circuits for one in circuit["inputs"]),
            output_bytes=sum(_ciphertext(one) for circuit in circuits for one in circuit["outputs"]),
            key_bytes=sum(full for full, _ in keys),
            sent_key_bytes=sum(sent for _, sent in keys),
        )
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"The encryption's parameters are altered: {error!r:.200}.") from error


def _ciphertext(one: Any) -> int:
    """Return the bytes of one input or output."""
    encrypted = one["typeInfo"]["lweCiphertext"]
    return _product(*encrypted["concreteShape"]["dimensions"]) * _word(encrypted)


def _bootstrap_key(key: Any) -> tuple[int, int]:
    """Return the bytes of a key for each bit of a secret: rows of polynomials, one of them not random."""
    params = key["params"]
    polynomials = _product(params["glweDimension"]) + 1
    rows = _product(params["inputLweDimension"], params["levelCount"]) * polynomials
    return _with_compression(key, rows, polynomials, _product(params["polynomialSize"]))


def _keyswitch_key(key: Any) -> tuple[int, int]:
    """Return the bytes of ciphertexts for each bit of a secret, in each of which one number is not random."""
    params = key["params"]
    rows = _product(params["inputLweDimension"], params["levelCount"])
    return _with_compression(key, rows, _product(params["outputLweDimension"]) + 1, 1)


def _packing_key(key: Any) -> tuple[int, int]:
    """Return the bytes of rows for each bit of a secret and one more. They are never compressed."""
    params = key["params"]
    polynomials = _product(params["glweDimension"]) + 1
    rows = (_product(params["inputLweDimension"]) + 1) * _product(params["levelCount"]) * polynomials
    full = rows * polynomials * _product(params["polynomialSize"]) * _word(params)
    return full, full


def _with_compression(key: Any, rows: int, parts: int, size: int) -> tuple[int, int]:
    """Return the bytes of rows of parts in memory, and as they are sent: without the random parts."""
    full = rows * parts * size * _word(key["params"])
    return full, full // parts if key["compression"] == "seed" else full


def _word(params: Any) -> int:
    """Return the bytes of one number."""
    return _product(params["integerPrecision"]) // 8


def _product(*numbers: Any) -> int:
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"sizes of {numbers!r:.100}")
    return math.prod(numbers)
