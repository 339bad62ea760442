"""Names circuits by all that their results depend on.

Keys and ciphertexts bear the fingerprint of their circuit, and go together only if it is the same. Whoever
has the same keys needs only the same parameters; but a result that is read with another circuit's scale or
bias is a wrong number and nothing shows it. So the fingerprint covers the interface too.

In files of format 1 it did not: there a circuit is named by `first_fingerprint`.

Keys are of a *key set*, which several circuits may share: it is named by `keyset_of`, from the parameters of
its keys alone.
"""

import hashlib
import json
from dataclasses import dataclass

from fheconv.circuits.files.interface import interface_text
from fheconv.lowering.interface import Interface


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Says what makes a circuit the one it is, each as a SHA-256 in hexadecimal.

    parameters: of Concrete's parameters, on which the keys depend.
    program: of what a server computes, as Concrete's text.
    interface: of how images become inputs, and results numbers.

    Example:
        >>> one = Identity(parameters="ab", program="cd", interface="ef")
        >>> one.fingerprint == Identity(parameters="ab", program="cd", interface="00").fingerprint
        False
    """

    parameters: str
    program: str
    interface: str

    @classmethod
    def of(cls, specs: bytes, mlir: bytes, interface: bytes) -> "Identity":
        """Return the identity of a circuit's `specs.json`, `circuit.mlir` and `interface.json`."""
        return cls(parameters=digest(specs), program=digest(mlir), interface=digest(interface))

    @property
    def fingerprint(self) -> str:
        """The name of the circuit, in hexadecimal."""
        return digest(f"{self.parameters} {self.program} {self.interface}".encode())


def identity_of(specs: bytes, mlir: bytes, interface: Interface) -> Identity:
    """Return the identity of a compiled circuit. How images share a ciphertext belongs to it, if they do."""
    return Identity.of(specs, mlir, interface_text(interface))


def keyset_of(specs: bytes) -> str:
    """Return the name of the key set of Concrete's parameters, in hexadecimal.

    It covers every number of every key. So whoever has keys of that name has keys of these very parameters,
    no matter which circuit they were made for.
    """
    return digest(json.dumps(json.loads(specs)["keyset"]).encode())


def first_fingerprint(specs: bytes, mlir: bytes) -> str:
    """Return a circuit's name in files of format 1."""
    return digest(specs + mlir)


def digest(data: bytes) -> str:
    """Return the SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
