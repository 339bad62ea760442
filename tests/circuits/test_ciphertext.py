import hashlib
import json
import struct
from dataclasses import replace

import numpy as np
import pytest

import fheconv
from tests.support.layers import random_network, unlike_calibration

FIELDS = {
    "kind": "input",
    "fingerprint": "ab" * 32,
    "key_id": "cd" * 16,
    "images": 3,
    "batched": True,
    "values": (b"one", b"", b"three"),
}
CIPHERTEXT = fheconv.Ciphertext(**FIELDS)
DATA = CIPHERTEXT.to_bytes()


def envelope(header, payload=b"onethree", version=1):
    """The documented format, written by hand, with a digest that fits."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = struct.pack(">8sHIQ", b"fheconv\0", version, len(header), len(payload)) + header + payload
    return body + hashlib.sha256(body).digest()


def header(**changes):
    fields = {name: FIELDS[name] for name in ("kind", "fingerprint", "key_id", "images", "batched")}
    return {**fields, "lengths": [3, 0, 5], **changes}


def test_the_format_is_the_documented_one():
    assert envelope(header()) == DATA
    for data in (DATA, bytearray(DATA), memoryview(DATA)):
        assert fheconv.Ciphertext.from_bytes(data) == CIPHERTEXT
    empty = fheconv.Ciphertext(**{**FIELDS, "images": 0, "values": ()})
    assert fheconv.Ciphertext.from_bytes(empty.to_bytes()) == empty


@pytest.mark.sampled(3)
@pytest.mark.parametrize("batch", [None, 0, 1, 2, 5])
def test_what_went_through_bytes_runs_and_decrypts(batch):
    network, _, _ = random_network(7)
    circuit = fheconv.compile(network)
    circuit.keygen()
    x = unlike_calibration(network, 0, batch if batch is not None else 1)
    x = x[0] if batch is None else x
    again = fheconv.Ciphertext.from_bytes(circuit.encrypt(x).to_bytes())
    result = fheconv.Ciphertext.from_bytes(circuit.run(again).to_bytes())
    np.testing.assert_array_equal(circuit.decrypt(result), network(x))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("text", "takes bytes, not str"),
        (None, "takes bytes, not NoneType"),
        (b"", "begin otherwise"),
        (b"\x89PNG" + DATA, "begin otherwise"),
        (b"fhe", "truncated: 3 bytes, of at least 54"),
        (DATA[:40], "truncated: 40 bytes"),
        (DATA[:-1], "truncated"),
        (DATA + b"\0", "followed by other bytes"),
        (DATA[:60] + b"\0" + DATA[61:], "altered: its SHA-256"),
        (DATA[:-1] + bytes([DATA[-1] ^ 1]), "altered: its SHA-256"),
        (envelope(header(), version=2), "format version 2, and this fheconv reads version 1"),
        (DATA[:10] + b"\xff" * 4 + DATA[14:], "header claims 4,294,967,295"),
        (DATA[:14] + b"\xff" * 8 + DATA[22:], "truncated"),
        (envelope(b"\xff{}"), "not JSON"),
        (envelope(b"[" * 100_000), "not JSON"),
        (envelope(b"9" * 100_000), "not JSON"),
        (envelope([]), "object of batched"),
        (envelope({**header(), "more": 1}), "object of batched"),
        (envelope(header(lengths=[3, 0, 4])), "add up"),
        (envelope(header(lengths=[9, 0, -1])), "add up"),
        (envelope(header(lengths=[3.0, 0, 5])), "add up"),
        (envelope(header(lengths=8)), "add up"),
        (envelope(header(kind="key")), "kind 'key'"),
        (envelope(header(kind=["input"])), "kind"),
        (envelope(header(key_id=7)), "key_id is 7"),
        (envelope(header(images=2)), "of 2 images has 3 values"),
        (envelope(header(images=3.0)), "of 3.0 images"),
        (envelope(header(batched=1)), "batched is 1"),
        (envelope(header(batched=False)), "without a batch has 3"),
    ],
)
def test_what_is_no_ciphertext_says_why(data, words):
    with pytest.raises(fheconv.ArtifactError, match=words):
        fheconv.Ciphertext.from_bytes(data)


def test_more_bytes_than_allowed_are_refused():
    assert fheconv.Ciphertext.from_bytes(DATA, max_bytes=len(DATA)) == CIPHERTEXT
    with pytest.raises(fheconv.ArtifactError, match=f"{len(DATA)} bytes, more than {len(DATA) - 1}"):
        fheconv.Ciphertext.from_bytes(DATA, max_bytes=len(DATA) - 1)
    with pytest.raises(fheconv.InvalidArgumentError, match="max_bytes"):
        fheconv.Ciphertext.from_bytes(DATA, max_bytes=0)


def test_a_batch_whose_header_could_not_be_read_again_is_not_written(monkeypatch):
    monkeypatch.setattr("fheconv.circuits.files.envelope.HEADER_LIMIT", 100)
    with pytest.raises(fheconv.ArtifactError, match="fewer images"):
        CIPHERTEXT.to_bytes()


def test_a_ciphertext_of_other_fields_cannot_be_made():
    with pytest.raises(fheconv.ArtifactError, match="tuple of bytes"):
        fheconv.Ciphertext(**{**FIELDS, "values": ["one"]})


def test_a_ciphertext_that_claims_another_number_of_images_is_refused():
    network, _, _ = random_network(7)
    circuit = fheconv.compile(network)
    circuit.keygen()
    result = circuit.run(circuit.encrypt(unlike_calibration(network, 0, 3)))
    for images in (5, 2**40):
        with pytest.raises(fheconv.ArtifactError, match=f"holds {images} images"):
            circuit.decrypt(replace(result, images=images))


def test_results_answer_the_images_that_they_were_computed_of():
    fields = {"kind": "input", "fingerprint": "f", "key_id": "k", "batched": True}
    images = fheconv.Ciphertext(**fields, images=2, values=(b"a", b"b"))
    results = images.with_results(value * 2 for value in images.values)
    assert (results.kind, results.values) == ("output", (b"aa", b"bb"))
    assert results.answers(images)
    others = [
        images,
        images.with_results((b"aa",)),
        replace(results, images=3, values=(b"aa", b"bb", b"cc")),
        replace(results, images=3),
        *(replace(results, **{name: "other"}) for name in ("fingerprint", "key_id")),
    ]
    assert not any(other.answers(images) for other in others)
