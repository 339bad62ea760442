"""Ten thousand damaged, foreign and absurd inputs: the right integers or one of fheconv's errors."""

import datetime
import hashlib
import json
import struct
from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
import torch

import fheconv
from fheconv.circuits.native.worker import worker

COUNTS = {"images": 1800, "bytes": 5100, "forged": 100, "calls": 200, "arguments": 2800}

BASE = np.array([[[0, 3, 1, 7], [2, 2, 5, 0], [6, 1, 4, 3]]]) / 7
DIGEST = hashlib.sha256().digest_size
PREFIX = struct.Struct(">8sHIQ")


def compiled(seed):
    rng = np.random.default_rng(seed)
    config = fheconv.QuantConfig(weight_bits=3, input_bits=3, input_range=(0, 1))
    network = fheconv.quantize(rng.normal(size=(2, 1, 2, 2)), BASE, config)
    circuit = fheconv.compile(network)
    circuit.keygen()
    return circuit


@pytest.fixture(scope="module")
def circuit():
    return compiled(0)


def oracle(network, x):
    """The integers by torch, in double precision, from the quantizer's definition."""
    x = np.asarray(x.detach() if isinstance(x, torch.Tensor) else x)
    batch = x.reshape(-1, *network.input_shape)
    q = np.rint(batch.astype(np.float64) / network.input.scale) + network.input.zero_point
    weight = network.last.convolution.weight
    y = torch.conv2d(torch.tensor(q), torch.tensor(weight, dtype=torch.float64))
    y = y.numpy().astype(np.int64) + network.last.bias
    return y if x.ndim == 4 else y[0]


def through(circuit, encrypted):
    return circuit.decrypt(circuit.run(encrypted), dequantize=False)


def outcome(step, *arguments):
    """What `step` returns, or None if it raises one of fheconv's errors; any other error is a failure."""
    try:
        return step(*arguments)
    except fheconv.FheConvError:
        return None


class Hostile:
    def __array__(self, *arguments, **options):
        raise RuntimeError("no array")

    def __repr__(self):
        return "Hostile()"


def mutated_image(rng):
    """A good image with one to three changes, or something else altogether."""
    x = BASE.copy()
    if rng.integers(2):
        x = np.stack([x, x[:, ::-1]][: rng.integers(1, 3)])
    for _ in range(rng.integers(1, 4)):
        if x.dtype.kind not in "biuf":
            return x
        match rng.integers(16):
            case 0:
                flat = x.copy().reshape(-1)
                odd = (np.nan, np.inf, -np.inf, 1e300, -1e-3, 1.08, 1.05, -0.0, 5e-324, 0.5, 2.0**63)
                if flat.size and flat.dtype.kind == "f":
                    with np.errstate(over="ignore"):
                        flat[rng.integers(flat.size)] = odd[rng.integers(len(odd))]
                x = flat.reshape(x.shape)
            case 1:
                kinds = ("f2", "f4", "i1", "u1", "i8", "u8", "?", "O", "c8", "U", "S", "m8[s]", ">f8")
                with np.errstate(all="ignore"):
                    try:
                        x = x.astype(kinds[rng.integers(len(kinds))])
                    except (ValueError, TypeError):
                        return Hostile()
            case 2:
                x = x.swapaxes(0, x.ndim - 1) if x.ndim else x
            case 3:
                x = x[None]
            case 4:
                x = x[:0] if x.ndim else x
            case 5:
                x = x[..., :-1] if x.ndim else x
            case 6:
                return x.tolist()
            case 7:
                return [x.tolist(), [1.0]]
            case 8:
                others = (
                    None,
                    "image",
                    b"image",
                    {},
                    {1},
                    7,
                    1.5,
                    [],
                    [[]],
                    [None],
                    Hostile(),
                    datetime.date.min,
                )
                return others[rng.integers(len(others))]
            case 9:
                shapes = ((10**9, 5), (10**6, 10**6), (0, 1, 3, 4), (10**9, 0, 3, 4), (1,) * 30)
                return np.broadcast_to(0.0, shapes[rng.integers(len(shapes))])
            case 10:
                if x.dtype.kind in "fi":
                    y = torch.tensor(x.astype(x.dtype.newbyteorder("=")))
                    return y.requires_grad_() if y.is_floating_point() else y
            case 11:
                return torch.zeros(1, 3, 4, device="meta") if rng.integers(2) else torch.eye(3).to_sparse()
            case 12:
                return np.ma.masked_array(x, mask=rng.random(x.shape) < 0.5) if x.dtype.kind == "f" else x
            case 13:
                return np.asfortranarray(x)
            case 14:
                return np.array([(1.0, 2)], dtype=[("a", "f8"), ("b", "i4")])
            case _:
                noise = np.asarray(rng.integers(0, 8, x.shape) / 7)
                x = noise if x.dtype.kind == "f" else x
    return x


def test_images(circuit):
    rng = np.random.default_rng(1)
    right = 0
    for _ in range(COUNTS["images"]):
        x = mutated_image(rng)
        encrypted = outcome(circuit.encrypt, x)
        if encrypted is not None:
            np.testing.assert_array_equal(through(circuit, encrypted), oracle(circuit.network, x))
            right += 1
    assert 300 < right < COUNTS["images"] - 300  # both happen


def mutated_bytes(rng, samples):
    """One to three accidents that bytes have."""
    data = bytearray(samples[rng.integers(len(samples))])
    for _ in range(rng.integers(1, 4)):
        # Half of them in the first bytes, where the structure is.
        at = int(rng.integers(min(len(data), 300) if rng.integers(2) else len(data))) if data else 0
        length = int(rng.integers(1, 64))
        match rng.integers(7):
            case 0 if data:
                data[at] ^= 1 << int(rng.integers(8))
            case 1:
                del data[at:]
            case 2:
                data[at:at] = rng.bytes(length)
            case 3:
                del data[at : at + length]
            case 4:
                data[at : at + length] = rng.bytes(length)
            case 5:
                data[at : at + length] = data[:length]
            case _:
                other = samples[rng.integers(len(samples))]
                data = bytearray(other[:at] + data[at:])
    return bytes(data)


def use(circuit, data):
    """Decrypt what the bytes hold, evaluated first if they say that they are images."""
    ciphertext = fheconv.Ciphertext.from_bytes(data, max_bytes=2**24)
    if ciphertext.kind == "input":
        ciphertext = circuit.run(ciphertext)
    return circuit.decrypt(ciphertext, dequantize=False)


@pytest.fixture(scope="module")
def samples(circuit):
    """The bytes of images and results, of one image and of a batch, and their integers."""
    pairs = []
    for x in (BASE, np.stack([BASE, 1 - BASE])):
        encrypted = circuit.encrypt(x)
        expected = oracle(circuit.network, x)
        pairs += [(encrypted.to_bytes(), expected), (circuit.run(encrypted).to_bytes(), expected)]
    return pairs


def test_bytes(circuit, samples):
    rng = np.random.default_rng(2)
    whole = dict(samples)
    refused = 0
    for _ in range(COUNTS["bytes"]):
        data = mutated_bytes(rng, list(whole))
        result = outcome(use, circuit, data)
        if data in whole:  # a mutation that changed nothing, or gave another sample
            np.testing.assert_array_equal(result, whole[data])
        else:
            assert result is None
            refused += 1
    assert refused > 0.9 * COUNTS["bytes"]


def forged(rng, data):
    """Bytes altered by somebody who computes lengths and digest anew, and whether the payload is whole."""
    _, version, size, _ = PREFIX.unpack_from(data)
    header = json.loads(data[PREFIX.size : PREFIX.size + size])
    payload = bytearray(data[PREFIX.size + size : -DIGEST])
    whole = True
    match rng.integers(6):
        case 0:
            odd = (None, 0, -1, 1e9, "", "output", "input", [], {}, True, False, "\0", "f" * 64, [1] * 9)
            header[list(header)[rng.integers(len(header))]] = odd[rng.integers(len(odd))]
        case 1:
            del header[list(header)[rng.integers(len(header))]]
        case 2:
            moved = int(rng.integers(1, 100))
            header["lengths"] = [header["lengths"][0] - moved, moved, *header["lengths"][1:]]
        case 3:
            text = bytearray(json.dumps(header).encode())
            text[rng.integers(len(text))] ^= 1 << int(rng.integers(8))
            header = bytes(text)
        case 4:  # the start of a value says what it is and how large
            whole = False
            at = int(rng.integers(min(len(payload), 400)))
            payload[at : at + 4] = rng.bytes(4)
        case _:
            whole = False
            cut = int(rng.integers(1, 3000))
            payload = payload[:-cut] if rng.integers(2) else payload + rng.bytes(cut)
            header["lengths"][-1] = len(payload) - sum(header["lengths"][:-1])
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = PREFIX.pack(b"fheconv\0", version, len(text), len(payload)) + text + payload
    return body + hashlib.sha256(body).digest(), whole


@pytest.mark.slow
def test_forged_bytes(circuit, samples):
    """No digest keeps out who computes it anew: the payload's noise is out of reach, a crash is not allowed.

    The native library may die of them, in its worker; the next call has to work.
    """
    rng = np.random.default_rng(3)
    for i in range(COUNTS["forged"]):
        data, expected = samples[rng.integers(len(samples))]
        data, whole = forged(rng, data)
        result = outcome(use, circuit, data)
        if result is not None and whole:
            np.testing.assert_array_equal(result.reshape(expected.shape), expected)
        if i % 50 == 0:
            np.testing.assert_array_equal(use(circuit, samples[0][0]), samples[0][1])


def test_calls(circuit):
    """Ciphertexts of the wrong kind, of other keys, of other circuits, and no ciphertexts."""
    rng = np.random.default_rng(4)
    other, twin = compiled(5), fheconv.compile(circuit.network)
    twin.keygen()
    circuits = (circuit, other, twin)
    inputs = [each.encrypt(BASE) for each in circuits]
    outputs = [each.run(x) for each, x in zip(circuits, inputs, strict=True)]
    good = [*inputs, *outputs]
    strange = [None, 7, "text", b"", BASE, [inputs[0]], Hostile(), circuit.network]
    for _ in range(COUNTS["calls"]):
        kind = ("run", "decrypt")[rng.integers(2)]
        at, i = int(rng.integers(3)), int(rng.integers(len(good) + len(strange) + 1))
        if i < len(good):
            argument = good[i]
        elif i < len(good) + len(strange):
            argument = strange[i - len(good)]
        else:  # the circuit's values under another's name
            argument = replace(
                inputs[at], values=inputs[at - 1].values, fingerprint=inputs[at - 2].fingerprint
            )
        result = outcome(getattr(circuits[at], kind), argument)
        if any(argument is c for c in (inputs[at] if kind == "run" else outputs[at],)):
            result = circuits[at].decrypt(result, dequantize=False) if kind == "run" else result
            if kind == "run":
                np.testing.assert_array_equal(result, oracle(circuits[at].network, BASE))
            else:
                np.testing.assert_array_equal(result, circuits[at].network(BASE))
        elif i < len(good) + len(strange):
            assert result is None
    assert worker().pid is not None


ODD = (
    None, -1, 0, 1, 2, 3, 7, 10**30, 2**63, 1.0, 2.5, float("nan"), float("inf"), True, "", "same", "valid",
    "x", (), (1,), (2, 1), (1, 2, 3), (0, 0), (-1, 1), ((1, 0), (0, 1)), ("a", "b"), [1, 1], {}, Hostile(),
    b"1", np.int8(2), np.array([1, 2]), np.array(1.5),
)  # fmt: skip
WEIGHTS = (np.ones((2, 2)), np.ones((2, 1, 2, 2)), np.arange(9).reshape(1, 1, 3, 3), np.zeros((1, 1, 1, 1)))
IMAGES = (BASE, BASE[None], np.arange(12).reshape(1, 3, 4), np.zeros((1, 3, 4)))


def pick(rng, values):
    return values[rng.integers(len(values))]


def options(rng, *names):
    """Values that mean nothing, mostly, for one or two of the names."""
    return {pick(rng, names): pick(rng, ODD) for _ in range(rng.integers(1, 3))}


def output_shape(rng):
    shape = pick(rng, [(1, 1, 3, 4), (3, 4), *ODD])
    weight = pick(rng, [(2, 1, 2, 2), (2, 2), *ODD])
    more = options(rng, "stride", "padding", "dilation", "groups")
    got = outcome(partial(fheconv.conv_output_shape, shape, weight, **more))
    if got is not None and len(shape) == 4:
        # No option that both take may mean something else.
        expected = fheconv.conv(np.zeros(shape), np.zeros(weight), **more).shape
        assert got == expected


def matrix(rng):
    weight, shape = pick(rng, [*WEIGHTS, *WEIGHTS, *ODD]), pick(rng, [(1, 3, 4), (3, 4), (1, 3, 4), *ODD])
    names = (
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
        "transposed",
        "output_padding",
        "format",
    )
    more = options(rng, *names, "flip_kernel", "memory_limit")
    got = outcome(partial(fheconv.filter_matrix, weight, shape, **more))
    if got is not None and not {"padding_mode", "transposed", "output_padding", "flip_kernel"} & set(more):
        x = np.arange(np.prod(shape)).reshape(shape)
        conv_options = {n: v for n, v in more.items() if n not in ("format", "memory_limit")}
        plain = x if np.ndim(weight) == 2 else x[None]
        np.testing.assert_array_equal(
            x.reshape(-1) @ got, fheconv.conv(plain, weight, **conv_options).reshape(-1)
        )


def configuration(rng):
    for kind in (fheconv.QuantConfig, fheconv.CompileConfig):
        outcome(partial(kind, **options(rng, *(field.name for field in fields(kind)))))


def quantization(rng):
    names = ("weight_bits", "input_bits", "input_range", "accumulator_bits", "method", "rounding_bits")
    config = outcome(partial(fheconv.QuantConfig, **options(rng, *names)))
    arguments = [pick(rng, [*WEIGHTS, *ODD]), pick(rng, [*IMAGES, *IMAGES, *ODD])]
    if rng.integers(3) == 0:
        arguments.append(config if rng.integers(4) else pick(rng, ODD))
    network = outcome(fheconv.quantize, *arguments)
    if network is not None and network.input_shape == (1, 3, 4):
        x = np.asarray(arguments[1])
        np.testing.assert_array_equal(network.integers(x), oracle(network, x))


@pytest.mark.parametrize("function", [output_shape, matrix, configuration, quantization])
def test_arguments(function):
    rng = np.random.default_rng(6)
    with np.errstate(all="ignore"):
        for i in range(COUNTS["arguments"] // 4):
            try:
                function(rng)
            except BaseException as error:
                error.add_note(f"in round {i}")
                raise


def test_there_are_ten_thousand():
    assert sum(COUNTS.values()) == 10_000
