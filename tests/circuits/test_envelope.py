import hashlib
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fheconv
from fheconv.circuits.files.envelope import HEADER_LIMIT, VERSION, Envelope, Incoming

ENVELOPE = Envelope(magic=b"testing\0", what="parcel", maker="pack()", names=("name", "count"))
HEADER = {"name": "ä", "count": 3}
PREFIX = struct.calcsize(">8sHIQ")
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner), max_leaves=5
)


def sealed(body):
    """Bytes with a digest that fits, whatever they are."""
    return body + hashlib.sha256(body).digest()


def parcel(header, payload=b"", *, version=VERSION, magic=ENVELOPE.magic, sizes=None):
    sizes = sizes or (len(header), len(payload))
    return sealed(struct.pack(">8sHIQ", magic, version, *sizes) + header + payload)


@given(values, values, st.lists(st.binary(max_size=50), max_size=4))
def test_what_is_packed_is_unpacked(name, count, payload):
    data = ENVELOPE.pack({"name": name, "count": count}, payload)
    for kind in (bytes, bytearray, memoryview):
        fields, unpacked = ENVELOPE.unpack(kind(data), len(data))
        assert fields == {"name": name, "count": count}
        assert bytes(unpacked) == b"".join(payload)


def arrived(data, sizes):
    """What a check of `data` in pieces of these sizes, and a last one, ends with."""
    incoming = Incoming(ENVELOPE, len(data))
    for size in (*sizes, len(data)):
        incoming.feed(data[:size])
        data = data[size:]
    return incoming, incoming.close()


@given(values, st.binary(max_size=300), st.lists(st.integers(0, 60)))
def test_bytes_that_arrive_in_pieces_are_checked_like_all_at_once(name, payload, sizes):
    data = ENVELOPE.pack({"name": name, "count": 1}, [payload])
    incoming, fields = arrived(data, sizes)
    assert fields == {"name": name, "count": 1}
    assert data[incoming.payload_start : -32] == payload
    assert (incoming.size, incoming.digest) == (len(data), data[-32:].hex())


@given(values, st.lists(st.integers(0, 60)), st.integers(0, 200), st.integers(1, 255))
def test_damage_is_noticed_wherever_pieces_end(name, sizes, at, change):
    data = bytearray(ENVELOPE.pack({"name": name, "count": 1}, [b"payload"]))
    data[at % len(data)] ^= change
    with pytest.raises(fheconv.ArtifactError, match="parcel"):
        arrived(bytes(data), sizes)


@given(st.data())
def test_every_damaged_byte_and_every_cut_is_noticed(data):
    good = ENVELOPE.pack(HEADER, [b"payload"])
    at = data.draw(st.integers(0, len(good) - 1))
    flipped = bytearray(good)
    flipped[at] ^= data.draw(st.integers(1, 255))
    for bad in (bytes(flipped), good[:at], good + good[: at + 1]):
        with pytest.raises(fheconv.ArtifactError, match="parcel"):
            ENVELOPE.unpack(bad, 10_000)


@given(st.binary(max_size=200))
def test_other_bytes_are_refused(data):
    for bad in (data, ENVELOPE.magic + data, sealed(data), sealed(ENVELOPE.magic + data)):
        with pytest.raises(fheconv.ArtifactError):
            ENVELOPE.unpack(bad, 10_000)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"9" * 10_000, "not JSON"),
        (b"[]", "must be an object of count, name"),
        (b"null", "must be an object"),
        (b"{}", "must be an object"),
        (b'{"name": 1}', "must be an object"),
        (b'{"name": 1, "count": 2, "more": 3}', "must be an object"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_headers_that_somebody_sealed_are_checked(header, reason):
    with pytest.raises(fheconv.ArtifactError, match=reason):
        ENVELOPE.unpack(parcel(header), 1_000_000)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no parcel"),
        (ENVELOPE.magic, "truncated: 8 bytes"),
        (parcel(json.dumps(HEADER).encode(), version=2), "format version 2"),
        (parcel(json.dumps(HEADER).encode(), magic=b"fheconv\0"), "no parcel.*otherwise than pack"),
        (parcel(b"", sizes=(HEADER_LIMIT + 1, 0)), "header claims"),
        (parcel(b"", sizes=(10, 0)), "truncated"),
        (parcel(b"", sizes=(0, 2**63)), "truncated"),
        (parcel(b"{}", b"more", sizes=(2, 0)), "followed by other bytes"),
        ("text", "takes bytes, not str"),
        (None, "takes bytes, not NoneType"),
    ],
)
def test_refusals_say_what_is_wrong(data, reason):
    with pytest.raises(fheconv.ArtifactError, match=reason):
        ENVELOPE.unpack(data, 10_000)


def test_sizes_are_bounded_by_who_reads():
    data = ENVELOPE.pack(HEADER, [bytes(100)])
    with pytest.raises(fheconv.ArtifactError, match=f"more than {len(data) - 1}.*max_bytes"):
        ENVELOPE.unpack(data, len(data) - 1)
    with pytest.raises(fheconv.InvalidArgumentError, match="max_bytes"):
        ENVELOPE.unpack(data, 0)


def test_a_header_that_nobody_would_read_is_not_written():
    with pytest.raises(fheconv.ArtifactError, match="fewer images"):
        ENVELOPE.pack({"name": "x" * HEADER_LIMIT, "count": 0}, [])


def test_a_reader_does_not_see_later_changes():
    data = bytearray(ENVELOPE.pack(HEADER, [b"payload"]))
    _, payload = ENVELOPE.unpack(data, 10_000)
    data[:] = bytes(len(data))
    assert bytes(payload) == b"payload"
