"""Reads Concrete's parameters of a circuit, and writes them as Concrete does.

Concrete's native library takes a secret key by its place in the list, whatever `id` the file gives it, and
believes every size it is told. So parameters from elsewhere are never passed on as they are understood here:
`Specs.of` takes the numbers that Concrete chooses, `Specs.to_dict` writes all the rest from them, and a file
must be equal to that (see `fheconv.circuits.files.security`).
"""

import math
from dataclasses import dataclass
from typing import Any

# The bounds of Concrete's own search for parameters (`DEFAULT_DOMAINS` of its optimiser).
POLYNOMIAL_SIZES = tuple(2**power for power in range(8, 18))
MOST_GLWE_DIMENSIONS = 6
MOST_DIMENSIONS = 2**20
WORD_BITS = 64
# The most keys of a kind. Concrete gives each width of lookups in a network its own.
MOST_KEYS = 64
# The most and the greatest moduli into which a value wider than lookups allow is split.
MOST_MODULI, GREATEST_MODULUS = 16, 2**16
# A compressed ciphertext is the seed of its random numbers (two words) and its body.
SEEDED_WORDS = 3

_WORD = {"integerPrecision": WORD_BITS}
_MODULUS: dict[str, Any] = {"modulus": {"modulus": {"native": {}}}}
_BINARY = {"keyType": "binary"}
_NAME = "circuit"
_SIDES = ("input", "output")


@dataclass(frozen=True, kw_only=True)
class EvaluationKey:
    """A key that encrypts the secret key number `input` under the secret key number `output`.

    It splits numbers into `levels` digits of `base_log` bits. `variance` is that of its noise, in the torus.
    `glwe` is the dimension and the polynomial size of what it is made of, None for a keyswitch.
    """

    input: int
    output: int
    levels: int
    base_log: int
    variance: float
    glwe: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class Side:
    """Says how the images or the results are encrypted: `values` of them, under the secret key number `key`.

    `variance` is that of the noise, in the torus. `seeded` says that ciphertexts are compressed. A value has
    `width` bits. `moduli` are those into which it is split, none of them if it is not.
    """

    values: int
    key: int
    variance: float
    seeded: bool
    width: int
    signed: bool
    moduli: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Specs:
    """Concrete's parameters of a circuit. `dimensions` are the lengths of the secret keys, in bits.

    `seeded` says that the evaluation keys are compressed.
    """

    dimensions: tuple[int, ...]
    bootstraps: tuple[EvaluationKey, ...]
    keyswitches: tuple[EvaluationKey, ...]
    packings: tuple[EvaluationKey, ...]
    seeded: bool
    input: Side
    output: Side

    @property
    def noise(self) -> list[tuple[int, float]]:
        """The bits of the secret key, and the variance, of everything that is encrypted."""
        keys = (*self.bootstraps, *self.keyswitches, *self.packings)
        used = [(key.output, key.variance) for key in keys]
        used += [(side.key, side.variance) for side in (self.input, self.output)]
        return [(self.dimensions[number], variance) for number, variance in used]

    @classmethod
    def of(cls, data: Any) -> "Specs":
        """Return the parameters that Concrete chose, from JSON data.

        Raises `LookupError`, `TypeError`, `AttributeError` or `ValueError` for what Concrete does not choose.
        """
        keyset = data["keyset"]
        circuit = _only(data["circuits"], "circuit")
        secrets = _some(keyset["lweSecretKeys"])
        for place, key in enumerate(secrets):
            _require(key["id"] == place, f"secret key {place} has the id {key['id']!r:.50}")
        dimensions = tuple(_integer(key["params"]["lweDimension"], 1, MOST_DIMENSIONS) for key in secrets)
        bootstraps, keyswitches, packings = (
            tuple(_key(key, dimensions, glwe) for key in _some(keyset[kind], least=0))
            for kind, glwe in (
                ("lweBootstrapKeys", True),
                ("lweKeyswitchKeys", False),
                ("packingKeyswitchKeys", True),
            )
        )
        return cls(
            dimensions=dimensions,
            bootstraps=bootstraps,
            keyswitches=keyswitches,
            packings=packings,
            seeded=any(key["compression"] == "seed" for key in keyset["lweBootstrapKeys"]),
            input=_side(_only(circuit["inputs"], "input"), len(dimensions)),
            output=_side(_only(circuit["outputs"], "output"), len(dimensions)),
        )

    def check(self) -> None:
        """Raise `ValueError` for keys that do not go together as Concrete's do."""
        used = {self.input.key, self.output.key}
        for key in (*self.bootstraps, *self.keyswitches):
            used.add(key.output)
            _require(key.input != key.output, "a key encrypts itself")
        _require(used == set(range(len(self.dimensions))), "there are secret keys without use")
        for key in (*self.bootstraps, *self.packings):
            size = math.prod(key.glwe or ())
            _require(size == self.dimensions[key.output], f"{size} bits are those of another secret key")
        split = bool(self.input.moduli)
        _require(self.input.moduli == self.output.moduli, "images and results are split otherwise")
        _require(len(self.packings) == split, "only values that are split are packed, with one key")
        _require(len(self.bootstraps) == 1 or not split, "values that are split have one bootstrap")
        _require(not self.output.seeded, "results are compressed")

    def to_dict(self) -> dict[str, Any]:
        """Return the parameters as Concrete writes them, ready for JSON."""
        sizes = self.dimensions
        return {
            "keyset": {
                "lweSecretKeys": [
                    {"id": number, "params": {"lweDimension": size, **_WORD, **_BINARY}}
                    for number, size in enumerate(sizes)
                ],
                "lweBootstrapKeys": self._keys(self.bootstraps, self._bootstrap),
                "lweKeyswitchKeys": self._keys(self.keyswitches, self._keyswitch),
                "packingKeyswitchKeys": self._keys(self.packings, self._packing),
            },
            **named_circuit(self._written(self.input), self._written(self.output)),
        }

    def _keys(self, keys: tuple[EvaluationKey, ...], params: Any) -> list[dict[str, Any]]:
        return [
            {
                "id": number,
                "inputId": key.input,
                "outputId": key.output,
                "params": params(key),
                "compression": _compression(self.seeded),
            }
            for number, key in enumerate(keys)
        ]

    def _bootstrap(self, key: EvaluationKey) -> dict[str, Any]:
        size = {"inputLweDimension": self.dimensions[key.input]}
        return {**_digits(key), **_glwe(key), **_noise(key), **_BINARY, **size}

    def _keyswitch(self, key: EvaluationKey) -> dict[str, Any]:
        sizes = {
            "inputLweDimension": self.dimensions[key.input],
            "outputLweDimension": self.dimensions[key.output],
        }
        return {**_digits(key), **_noise(key), **_BINARY, **sizes}

    def _packing(self, key: EvaluationKey) -> dict[str, Any]:
        sizes = {
            "inputLweDimension": self.dimensions[key.input],
            "innerLweDimension": self.dimensions[self.bootstraps[0].input],
        }
        return {**_digits(key), **_glwe(key), **sizes, **_noise(key), **_BINARY}

    def _written(self, side: Side) -> dict[str, Any]:
        """Return how a side is encrypted, as Concrete writes it."""
        mode: dict[str, Any] = {"crt": {"moduli": list(side.moduli)}} if side.moduli else {"native": {}}
        encryption = {
            "keyId": side.key,
            "variance": side.variance,
            "lweDimension": self.dimensions[side.key],
            **_MODULUS,
        }
        shape = {"dimensions": list(self._shape(side))}
        return {
            "rawInfo": {"shape": shape, **_WORD, "isSigned": False},
            "typeInfo": {
                "lweCiphertext": {
                    "abstractShape": {"dimensions": [1, side.values]},
                    "concreteShape": shape,
                    **_WORD,
                    "encryption": encryption,
                    "compression": _compression(side.seeded),
                    "encoding": {"integer": {"width": side.width, "isSigned": side.signed, "mode": mode}},
                }
            },
        }

    def _shape(self, side: Side) -> tuple[int, ...]:
        """Return the shape of a side's ciphertexts, in words."""
        words = SEEDED_WORDS if side.seeded else self.dimensions[side.key] + 1
        split = (len(side.moduli),) if side.moduli else ()
        return 1, side.values, *split, words


def named_circuit(image: Any, result: Any) -> dict[str, Any]:
    """Return what Concrete writes of the circuit of one function, which has this image and this result."""
    tfhers = {f"{side}_{what}_per_func": {_NAME: [None]} for what in ("types", "shapes") for side in _SIDES}
    circuit = {"inputs": [image], "outputs": [result], "name": _NAME}
    return {"circuits": [circuit], "tfhers_specs": tfhers}


def _digits(key: EvaluationKey) -> dict[str, Any]:
    return {"levelCount": key.levels, "baseLog": key.base_log}


def _glwe(key: EvaluationKey) -> dict[str, Any]:
    dimension, size = key.glwe or (0, 0)
    return {"glweDimension": dimension, "polynomialSize": size}


def _noise(key: EvaluationKey) -> dict[str, Any]:
    return {"variance": key.variance, **_WORD, **_MODULUS}


def _compression(seeded: bool) -> str:
    return "seed" if seeded else "none"


def _key(data: Any, dimensions: tuple[int, ...], glwe: bool) -> EvaluationKey:
    params = data["params"]
    levels = _integer(params["levelCount"], 1, WORD_BITS)
    sizes = None
    if glwe:
        dimension = _integer(params["glweDimension"], 1, MOST_GLWE_DIMENSIONS)
        sizes = dimension, _integer(params["polynomialSize"], POLYNOMIAL_SIZES[0], POLYNOMIAL_SIZES[-1])
        _require(sizes[1] in POLYNOMIAL_SIZES, f"polynomials of size {sizes[1]}")
    return EvaluationKey(
        input=_integer(data["inputId"], 0, len(dimensions) - 1),
        output=_integer(data["outputId"], 0, len(dimensions) - 1),
        levels=levels,
        base_log=_integer(params["baseLog"], 1, WORD_BITS // levels),
        variance=_variance(params["variance"]),
        glwe=sizes,
    )


def _side(data: Any, keys: int) -> Side:
    ciphertext = data["typeInfo"]["lweCiphertext"]
    encryption, encoding = ciphertext["encryption"], ciphertext["encoding"]["integer"]
    moduli = encoding["mode"]["crt"]["moduli"] if "crt" in encoding["mode"] else ()
    _require(len(moduli) <= MOST_MODULI, f"{len(moduli)} moduli")
    return Side(
        values=_integer(ciphertext["abstractShape"]["dimensions"][1], 1, 2**62),
        key=_integer(encryption["keyId"], 0, keys - 1),
        variance=_variance(encryption["variance"]),
        seeded=ciphertext["compression"] == "seed",
        width=_integer(encoding["width"], 1, WORD_BITS),
        signed=encoding["isSigned"] is True,
        moduli=tuple(_integer(one, 2, GREATEST_MODULUS) for one in moduli),
    )


def _integer(value: Any, least: int, most: int) -> int:
    _require(type(value) is int and least <= value <= most, f"{value!r:.50} is not in {least} … {most}")
    return int(value)


def _variance(value: Any) -> float:
    _require(type(value) is float and 0 < value < 1, f"a variance of {value!r:.50}")
    return float(value)


def _some(data: Any, least: int = 1) -> list[Any]:
    _require(isinstance(data, list) and least <= len(data) <= MOST_KEYS, "keys are a list")
    return list(data)


def _only(data: Any, what: str) -> Any:
    _require(isinstance(data, list) and len(data) == 1, f"there is one {what}")
    return data[0]


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
