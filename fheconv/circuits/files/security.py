"""Checks Concrete's parameters in a file from elsewhere before a client makes keys with them.

Whoever writes `client.zip` chooses how its owner encrypts. Parameters without enough noise, a secret key that
is too short, or an input that is declared clear, would give the images away to whoever sees the ciphertexts.
So a file is accepted only if Concrete itself could have written it, in two respects.

Noise: for a secret of n random bits, Concrete's noise has a standard deviation of 2^(slope · n + bias) of the
torus, and nowhere less than 2^FLOOR. It has such a line for each security level, got out of the lattice
estimator (Albrecht, Player and Scott 2015). Everything that is encrypted under any secret key must lie on one
of these lines.

Text: the parameters are written anew from the numbers that Concrete chooses, and the file must be the same,
byte for byte. So it holds nothing unknown, nothing twice, no id that is not the key's place in the list (the
native library goes by the place), and no size that does not follow from the numbers that were checked.
"""

import json
import math

from fheconv.basics.errors import ArtifactError
from fheconv.basics.security import FLOOR, LEAST_DIMENSION, LINES
from fheconv.circuits.files.plain import read_json
from fheconv.circuits.files.specs import Specs

# The logarithm of a variance that Concrete computed from these numbers differs by less.
TOLERANCE = 1e-7
# Parameters take some kilobytes.
MOST_BYTES = 2**16


def check_security(text: bytes) -> Specs:
    """Return the parameters of a circuit, in which everything that is encrypted has 128 bits of security.

    `text` is what Concrete writes of a circuit's keys, inputs and outputs. Raises `ArtifactError` for
    parameters that Concrete would not choose.
    """
    data = read_json(text, "The encryption's parameters are altered: specs.json", MOST_BYTES)
    try:
        for circuit in data["circuits"]:
            if any(set(one["typeInfo"]) != {"lweCiphertext"} for one in circuit["inputs"]):
                raise ArtifactError("This circuit takes images in clear: nothing would be encrypted.")
        specs = Specs.of(data)
        _check_noise(specs)
        specs.check()
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"The encryption's parameters are altered: {error!r:.200}.") from error
    if json.dumps(specs.to_dict()).encode() != text:
        raise ArtifactError(
            "The encryption's parameters are altered: with these keys Concrete would write others. Do not "
            "use this file; ask whoever gave it to you."
        )
    return specs


def _check_noise(specs: Specs) -> None:
    """Raise `ArtifactError` for too little noise or too short secrets, `ValueError` for other noise."""
    if min(specs.dimensions) < LEAST_DIMENSION:
        raise ArtifactError(
            f"The encryption's parameters are not secure: there are secrets of {min(specs.dimensions)} bits, "
            f"and each needs {LEAST_DIMENSION} or more. Do not use this file; ask whoever gave it to you."
        )
    levels = set(LINES)
    for dimension, variance in specs.noise:
        noise = math.log2(variance) / 2
        lines = {level: max(slope * dimension + bias, FLOOR) for level, (slope, bias) in LINES.items()}
        least = min(lines.values())
        if noise < least - TOLERANCE:
            raise ArtifactError(
                f"The encryption's parameters are not secure: for a secret of {dimension} bits the noise has "
                f"a standard deviation of 2^{noise:.1f}, and {min(LINES)} bits of security need "
                f"2^{least:.1f}. Do not use this file; ask whoever gave it to you."
            )
        levels &= {level for level, line in lines.items() if abs(noise - line) <= TOLERANCE}
    if not levels:
        raise ValueError(f"the noise is that of no one security level of {' or '.join(map(str, LINES))} bits")
