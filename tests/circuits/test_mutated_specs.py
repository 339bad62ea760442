"""Parameters of an attacker's making: whatever a client takes protects its images as promised.

How secure parameters are is estimated here anew, without a number from fheconv: the least block size with
which BKZ finds the secret as an unusually short vector (Alkim, Ducas, Pöppelmann and Schwabe 2016, section
6.3; the secret is binary, so its part of the lattice is scaled as Bai and Galbraith 2014 do), and the price
of sieving in such blocks (Becker, Ducas, Gama and Laarhoven 2016), as the lattice estimator adds them up.
"""

import json
import math
import random
import time
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import fheconv
from fheconv.circuits.client import Client
from fheconv.circuits.files.archive import read_client
from fheconv.circuits.files.security import check_security
from fheconv.circuits.files.specs import Specs
from tests.support.files import parts_of, sealed, secrets_held, zipped
from tests.support.nets import splitting

PROMISED = 128
MUTATIONS = 12_000
SECONDS = 60
HEAD = 8


def log2_delta(block):
    """The logarithm of the root Hermite factor that BKZ reaches with blocks of this size."""
    return (math.log2(math.pi * block) / block + math.log2(block / (2 * math.pi * math.e))) / (
        2 * (block - 1)
    )


@cache
def security(dimension, variance):
    """Bits of work to find a binary secret, from any number of samples with 64-bit words."""
    noise = 64 + math.log2(variance) / 2  # log2 of its standard deviation
    scale = noise + 1  # of the secret's part: a bit less 1/2 has the standard deviation 1/2

    def size(block):
        """The size of a lattice in which blocks suffice, or None."""
        delta = log2_delta(block)
        best = round(math.sqrt(dimension * max(64 - scale, 0) / delta)) - dimension
        for samples in range(max(1, best - 60), max(1, best + 60), 3):
            size = dimension + samples + 1
            volume = (64 * samples + scale * dimension) / size
            if noise + math.log2(block) / 2 <= (2 * block - size - 1) * delta + volume:
                return size
        return None

    low, high = 40, 40 + 4 * dimension
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if size(middle) else (middle + 1, high)
    return min(dimension, 0.292 * low + 16.4 + math.log2(8 * (size(low) or 1)))


def weakest(specs):
    """The security of the least secure encryption, as the native library encrypts: with keys by position."""
    secrets = [key["params"]["lweDimension"] for key in specs["keyset"]["lweSecretKeys"]]
    found = []
    for kind in ("lweBootstrapKeys", "lweKeyswitchKeys", "packingKeyswitchKeys"):
        for key in specs["keyset"][kind]:
            params = key["params"]
            size = params.get("glweDimension", 1) * params.get("polynomialSize", secrets[key["outputId"]])
            found.append((min(size, secrets[key["outputId"]]), params["variance"]))
    for circuit in specs["circuits"]:
        for side in (*circuit["inputs"], *circuit["outputs"]):
            encryption = side["typeInfo"]["lweCiphertext"]["encryption"]
            size = min(secrets[encryption["keyId"]], encryption["lweDimension"])
            found.append((size, encryption["variance"]))
    return min(security(*one) for one in found)


@pytest.mark.parametrize(
    ("dimension", "noise"), [(10, -10), (300, -14), (655, -20), (2048, -56), (8192, -62)]
)
def test_the_estimate_tells_secure_from_insecure(dimension, noise):
    found = security(dimension, 4.0**noise)
    assert (found >= PROMISED) == (dimension == 8192)
    assert security(dimension, 4.0 ** (noise + 3)) >= found
    assert security(10, 0.1) <= 10


def network(*, channels=1, inputs=(5, 5), **options):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 2, 3)
    model = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(2, 2, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    images = torch.rand(20, channels, *inputs)
    model(images)
    return fheconv.quantize(model.eval(), images, fheconv.QuantConfig(**options))


def single(**options):
    weight = np.array([[[[1, -1], [2, 3]]]])
    images = np.arange(18).reshape(2, 1, 3, 3) % 16  # so the integers are the pixels themselves
    return fheconv.quantize(fheconv.Conv.of(weight), images, fheconv.QuantConfig(**options))


KINDS = {
    "filter": lambda: (single(), {}),
    "filter, lanes": lambda: (single(), {"lanes": 4}),
    "filter, compressed": lambda: (single(), {"compress_input": True}),
    "filter, signed": lambda: (single(input_signed=True), {}),
    "filter, 132 bits": lambda: (single(), {"security_level": 132}),
    "lookups": lambda: (network(accumulator_bits=4), {"p_error": 1e-2}),
    "lookups, signed": lambda: (network(accumulator_bits=5, input_signed=True), {"p_error": 1e-2}),
    "lookups, 132 bits": lambda: (network(accumulator_bits=4), {"p_error": 1e-2, "security_level": 132}),
    "lookups, nothing compressed": lambda: (
        network(accumulator_bits=4),
        {"p_error": 1e-2, "compress_input": False, "compress_evaluation_keys": False},
    ),
    "lookups, rounded": lambda: (network(accumulator_bits=8, rounding_bits=4), {"p_error": 1e-2}),
    "lookups of two widths": lambda: (network(accumulator_bits={"0": 8, "2": 4}), {"p_error": 1e-2}),
    "lookups, other parameters": lambda: (
        network(accumulator_bits=4),
        {"p_error": 1e-2, "parameters": fheconv.ParameterRange(log2_polynomial_sizes=(11,))},
    ),
    "values that are split": lambda: (splitting(), {"p_error": 0.3}),
}


@cache
def written(kind):
    """What Concrete writes of a circuit of this kind."""
    quantized, options = KINDS[kind]()
    circuit = fheconv.compile(quantized, fheconv.CompileConfig(**options))
    return circuit.exported(options.get("lanes", 1)).specs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sampled(3)
def test_all_that_concrete_writes_is_taken_and_secure(kind):
    text = written(kind)
    specs = check_security(text)
    assert json.loads(text) == specs.to_dict()
    assert weakest(json.loads(text)) >= PROMISED


def test_the_parameters_of_a_tile_are_taken():
    check_security(fheconv.compile_tiled(single(), (4, 4)).circuit.exported().specs)


# Mutations.


def places(data, path=()):
    """All places in data, each as a list of names and numbers."""
    yield path
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for name, part in inner:
        yield from places(part, (*path, name))


def at(data, path):
    for name in path:
        data = data[name]
    return data


def others_for(value, rng, numbers):
    """What may stand in the place of a value."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return [not value, None, 0, 1, "", "none", "seed", "native", "ternary", [], {}]
    if isinstance(value, int):
        near = [value + 1, value - 1, value * 2, value // 2, -value, value + 2**32, value + 2**64]
        return [*near, 0, 1, 10, 449, 450, 10**30, float(value), str(value), True, None, rng.choice(numbers)]
    if isinstance(value, float):
        scaled = [value * factor for factor in (0.5, 2.0, 1 / 4, 4.0, 1 - 1e-6, 1 + 1e-6, 1 - 1e-12, 1e-20)]
        special = [0.0, 0.9, 1.0, -value, 5e-324, math.nan, math.inf, 0, 1, str(value), None]
        return [*scaled, *special, rng.choice(numbers)]
    if isinstance(value, list):
        return [value[::-1], value + value[:1], value[:1] + value, value[1:], value[:-1], [], {}, None]
    return [{}, [], None, {**value, "more": 1}, dict(list(value.items())[1:]), dict(reversed(value.items()))]


def put(data, path, value):
    at(data, path[:-1])[path[-1]] = value


def mutated(text, rng):
    """The parameters with one to three places changed, or two exchanged."""
    data = json.loads(text)
    numbers = [at(data, path) for path in places(data)]
    numbers = [one for one in numbers if type(one) in (int, float)]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        paths = [path for path in places(data) if path]
        one, two = rng.choice(paths), rng.choice(paths)
        if rng.random() < 0.15 and one != two[: len(one)] and two != one[: len(two)]:
            first, second = at(data, one), at(data, two)
            put(data, one, second)
            put(data, two, first)
        else:
            put(data, one, rng.choice(others_for(at(data, one), rng, numbers)))
    return json.dumps(data).encode()


def consistent(text, rng):
    """Parameters in which everything follows from other numbers, as an attacker would write them."""
    specs = Specs.of(json.loads(text))
    sizes = [*specs.dimensions]
    number = rng.randrange(len(sizes))
    sizes[number] = rng.choice([10, 449, 450, 512, sizes[number] - 1, sizes[number] + 1, 2 * sizes[number]])
    if rng.random() < 0.5:
        return json.dumps(replace(specs, dimensions=tuple(sizes)).to_dict()).encode()

    def variance(of):
        on_line = 4.0 ** max(-0.025696778711484593 * sizes[of] + 2.675931372549016, -62.0)
        return on_line * rng.choice([1.0, 1.0, 0.5, 2.0, 1e-3])

    def key(one):
        glwe = one.glwe and (1, sizes[one.output])
        return replace(one, variance=variance(one.output), levels=rng.choice([1, one.levels]), glwe=glwe)

    changed = replace(
        specs,
        dimensions=tuple(sizes),
        bootstraps=tuple(map(key, specs.bootstraps)),
        keyswitches=tuple(map(key, specs.keyswitches)),
        packings=tuple(map(key, specs.packings)),
        input=replace(specs.input, variance=variance(specs.input.key), width=rng.randint(1, 64)),
        output=replace(specs.output, variance=variance(specs.output.key)),
    )
    return json.dumps(changed.to_dict()).encode()


def twice(text, rng):
    """The parameters with a name that stands twice in its object, once with another value."""
    at_name = rng.choice([place for place in range(len(text)) if text[place : place + 1] == b"{"])
    name = rng.choice(
        [b'"lweDimension": 10, ', b'"variance": 1e-30, ', b'"keyId": 0, ', b'"lweSecretKeys": [], ']
    )
    return text[: at_name + 1] + name + text[at_name + 1 :]


@pytest.mark.slow
def test_no_mutation_that_is_taken_is_less_secure():
    rng = random.Random(0)
    texts = [written(kind) for kind in KINDS]
    taken = set()
    started = time.monotonic()
    for number in range(MUTATIONS):
        mutate = (mutated, mutated, consistent, twice)[number % 4]
        text = mutate(texts[number % len(texts)], rng)
        try:
            check_security(text)
        except fheconv.ArtifactError:
            continue
        taken.add(text)
    assert time.monotonic() - started < SECONDS
    assert len(taken - set(texts)) >= 50  # or the rest would say nothing
    for text in taken:
        assert weakest(json.loads(text)) >= PROMISED


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", KINDS)
def test_each_number_of_the_parameters_matters(kind):
    """Each number is changed alone. What is still taken is as secure, and a size never is."""
    text, rng = written(kind), random.Random(0)
    for path in places(json.loads(text)):
        value = at(json.loads(text), path)
        if not path or type(value) not in (int, float):
            continue
        for other in others_for(value, rng, [0]):
            data = json.loads(text)
            put(data, path, other)
            changed = json.dumps(data).encode()
            try:
                check_security(changed)
            except fheconv.ArtifactError:
                continue
            # Other widths of values and digits make wrong results, and no secret is lost by them.
            assert (
                changed == text
                or path[-1] in ("width", "levelCount", "baseLog", "variance")
                or (path[-2] == "moduli")
            )
            assert weakest(data) >= PROMISED


# Whole files.


def with_specs(parts, specs):
    """A client.zip with other parameters. Its maker makes everything fit: digests, fingerprint, sizes."""
    manifest = json.loads(parts["manifest.json"])
    for name, side in (("input_bytes", "inputs"), ("output_bytes", "outputs")):
        shape = json.loads(specs)["circuits"][0][side][0]["rawInfo"]["shape"]["dimensions"]
        manifest["cost"][name] = 8 * math.prod(shape)
    return zipped(sealed({**parts, "specs.json": specs, "manifest.json": json.dumps(manifest).encode()}))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    client_file, _ = fheconv.compile(single(), fheconv.CompileConfig(lanes=1)).save(
        tmp_path_factory.mktemp("c")
    )
    return client_file


IMAGE = np.array([[[3, 1, 4], [1, 5, 9], [2, 6, 5]]])


def forged(specs, number, *, instead=False):
    """Have the image encrypted under 10 bits: a short key is put first, and every declared size fits it."""
    specs = json.loads(specs)
    short = json.loads(json.dumps(specs["keyset"]["lweSecretKeys"][0]))
    short["id"], short["params"]["lweDimension"] = number, 10
    secrets = specs["keyset"]["lweSecretKeys"]
    specs["keyset"]["lweSecretKeys"] = [short, *secrets[int(instead) :]]
    for side in (specs["circuits"][0]["inputs"][0], specs["circuits"][0]["outputs"][0]):
        ciphertext = side["typeInfo"]["lweCiphertext"]
        ciphertext["encryption"]["lweDimension"] = 10
        for shape in (ciphertext["concreteShape"], side["rawInfo"]["shape"]):
            shape["dimensions"][-1] = 11
    return json.dumps(specs).encode()


def words(value):
    return np.frombuffer(value[: len(value) // 8 * 8], "<u8")


def numbers(value, count, dimension):
    """The numbers of a serialized ciphertext (count, dimension + 1). Before them, Concrete writes a head."""
    return words(value)[HEAD:][: count * (dimension + 1)].reshape(count, dimension + 1)


def recovered(ciphertext, count, width):
    """The pixels of an image encrypted under 10 bits: of all secrets, the one that leaves the least noise."""
    rows = numbers(ciphertext, count, 10)
    secrets = (np.arange(1024)[:, None] >> np.arange(10)) & 1
    phases = rows[:, 10] - (secrets.astype(np.uint64) @ rows[:, :10].T)  # (secrets, values), modulo 2^64
    step = np.uint64(2 ** (63 - width))
    rest = (phases + step // np.uint64(2)) % step
    noise = np.abs(rest.astype(np.float64) - float(step // np.uint64(2))).max(axis=1)
    best = phases[noise.argmin()]
    return ((best + step // np.uint64(2)) // step).astype(np.int64)


def test_the_attack_works_on_a_client_that_checks_nothing_and_its_file_is_refused(file):
    """The whole attack: the pixels are recovered from one ciphertext with 1,024 tries."""
    parts = read_client(file)
    specs = forged(parts.specs, 7)
    encoding = json.loads(specs)["circuits"][0]["inputs"][0]["typeInfo"]["lweCiphertext"]["encoding"]
    client = Client(parts.manifest, parts.interface, specs)
    client.keygen()
    (value,) = client.encrypt(IMAGE).values
    np.testing.assert_array_equal(recovered(value, IMAGE.size, encoding["integer"]["width"]), IMAGE.ravel())
    with pytest.raises(fheconv.ArtifactError):
        fheconv.load_client(with_specs(parts_of(file), specs))


@pytest.mark.parametrize("instead", [False, True])
@pytest.mark.parametrize("number", [0, 1, 7, "0", 0.0, False, None])
def test_a_forged_client_file_is_refused(file, number, instead):
    parts = parts_of(file)
    with pytest.raises(fheconv.ArtifactError, match=r"not secure|altered"):
        fheconv.load_client(with_specs(parts, forged(parts["specs.json"], number, instead=instead)))


def test_what_is_loaded_encrypts_as_its_parameters_say(file):
    """The secret key's length and the noise are measured, on the client's own keys and ciphertexts."""
    parts = parts_of(file)
    (key,) = json.loads(parts["specs.json"])["keyset"]["lweSecretKeys"]
    dimension = key["params"]["lweDimension"]
    encryption = json.loads(parts["specs.json"])["circuits"][0]["inputs"][0]["typeInfo"]["lweCiphertext"]
    client = fheconv.load_client(with_specs(parts, parts["specs.json"]))
    client.keygen()
    (held,) = secrets_held(client)
    secret = words(held)[-dimension:]
    assert set(secret) == {0, 1}
    assert words(held)[-dimension - 1] > 1  # so the secret is not longer, and cut here
    step = 2.0 ** (63 - encryption["encoding"]["integer"]["width"])
    values = client.encrypt(np.stack([IMAGE] * 60)).values
    rows = np.concatenate([numbers(value, IMAGE.size, dimension) for value in values])
    phases = (rows[:, -1] - rows[:, :-1] @ secret).astype(np.int64).reshape(60, -1)
    noise = (phases - IMAGE.ravel() * step) / 2.0**64
    measured, said = float(noise.std()), math.sqrt(encryption["encryption"]["variance"])
    assert said / 1.3 < measured < said * 1.3  # 540 samples: five standard errors are 15 %
    assert security(dimension, measured**2) >= PROMISED


def test_mutations_that_are_taken_load_and_others_do_not(file):
    """A sample goes all the way: through the zip, the manifest and Concrete itself."""
    rng = random.Random(1)
    parts = parts_of(file)
    loaded = refused = 0
    for number in range(200):
        text = (mutated, consistent)[number % 2](parts["specs.json"], rng)
        try:
            check_security(text)
            secure = True
        except fheconv.ArtifactError:
            secure = False
        try:
            data = with_specs(parts, text)
        except (LookupError, TypeError, ValueError):  # there are no sizes to make fit
            continue
        if secure and loaded < 10:
            fheconv.load_client(data)
            loaded += 1
        elif not secure:
            with pytest.raises(fheconv.ArtifactError):
                fheconv.load_client(data)
            refused += 1
    assert loaded >= 3
    assert refused >= 50
