"""What a file declares costs nothing: memory and time are bounded by its own size, or by a stated limit."""

import json
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

import fheconv
from fheconv.circuits.files import archive, plain
from fheconv.circuits.files.archive import load_manifest, read_client, read_server
from fheconv.circuits.files.interface import MOST_DEPTH, MOST_OPERATORS, MOST_VALUES, interface_from_dict
from fheconv.circuits.files.plain import read_json
from fheconv.circuits.keys import ENVELOPE, EVALUATION, StoredKeys, read_key_file
from tests.support.files import parts_of, sealed, zipped

# The most memory for a file of a few hundred kilobytes, and the most seconds on a slow machine.
MEMORY = 128 * 2**20
SECONDS = 20


def peak(call):
    """The most memory that a call that must raise `ArtifactError` holds at once, and its message."""
    tracemalloc.start()
    started = time.monotonic()
    try:
        with pytest.raises(fheconv.ArtifactError) as raised:
            call()
        assert time.monotonic() - started < SECONDS
        return tracemalloc.get_traced_memory()[1], str(raised.value)
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def circuit():
    weight = np.array([[[[1, -1], [2, 3]]]])
    made = fheconv.compile(fheconv.quantize(fheconv.Conv.of(weight), np.arange(18).reshape(2, 1, 3, 3) % 16))
    made.keygen()
    return made


@pytest.fixture(scope="module")
def parts(circuit, tmp_path_factory):
    return parts_of(circuit.save(tmp_path_factory.mktemp("saved"))[1])


def client_zip(parts, **options):
    """A client.zip in which everything fits."""
    parts = sealed(parts)
    return zipped({name: parts[name] for name in archive.CLIENT}, **options)


def changed(parts, **fields):
    return {**parts, "interface.json": json.dumps({**json.loads(parts["interface.json"]), **fields}).encode()}


def array(count, value=0, shape=None):
    return {"shape": [count] if shape is None else shape, "values": [value] * count}


def chain(depth, operator="relu"):
    expression = {"operator": "x", "arguments": [], "options": {}}
    for _ in range(depth):
        expression = {"operator": operator, "arguments": [expression], "options": {}}
    return {"activation": expression, "view": None, "last": None}


def tree(depth):
    """An expression of 2^depth operators, nested no deeper than `depth`."""
    expression = {"operator": "x", "arguments": [], "options": {}}
    for _ in range(depth):
        expression = {"operator": "add", "arguments": [expression, expression], "options": {}}
    return {"activation": expression, "view": None, "last": None}


def constants():
    """A function of constants, which would be far larger than each of them."""
    row, column = array(2**11, 1.0, [1, 2**11]), array(2**11, 1.0, [2**11, 1])
    inner = {"operator": "add", "arguments": [row, column], "options": {}}
    return {"activation": inner, "view": None, "last": None}


JUST_LESS = MOST_VALUES - 1

DECLARED = {
    "a large image": {"input_shape": [1, 2**11, 2**11]},
    "an image beyond all limits": {"input_shape": [2**20, 2**20, 2**20]},
    "an image of many axes": {"input_shape": [2] * 10**5},
    "an image of huge sizes": {"input_shape": [10**4000] * 3},
    "large results": {"shape": [1, 2**11, 2**11]},
    "results beyond all limits": {"shape": [1, 2**26]},
    "results with many planes": {"shape": [1, JUST_LESS], "factors": array(100, 1), "start": array(100)},
    "large results and a function": {"shape": [1, JUST_LESS], "finish": chain(50, "exp")},
    "a deep function": {"finish": chain(300)},
    "a function of many operators": {"finish": tree(14)},
    "a function of constants": {"shape": [1, 2**11, 2**11], "finish": constants()},
    "a view with a shape of its own": {"finish": {**chain(0), "view": {"shape": [2**40], "values": [0]}}},
    "positions with a shape of their own": {"inputs": {"shape": [2**30], "values": [0]}},
    "many positions": {"inputs": {"shape": [10**5], "values": list(range(10**5))}},
    "many equal numbers": {"bias": array(10**6, 0, [1, 10**6])},
    "many lists": {"bias": {"shape": [1, 1, 1], "values": [[]] * 10**6}},
    "many axes": {"scale": {"shape": [1] * 10**5, "values": [1.0]}},
    "a scale beyond all numbers": {"input": {"scale": 10**4000}},
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("what", DECLARED)
def test_what_an_interface_declares_costs_no_more_than_its_text(what, parts):
    interface, fields = json.loads(parts["interface.json"]), dict(DECLARED[what])
    if "input" in fields:
        fields["input"] = {**interface["input"], **fields["input"]}
    data = client_zip(changed(parts, **fields))
    assert len(data) < 500_000
    memory, _ = peak(lambda: fheconv.load_client(data))
    assert memory < MEMORY
    text = len(json.dumps({**interface, **fields}))
    try:
        found, _ = peak(lambda: interface_from_dict({**interface, **fields}))
    except pytest.fail.Exception:  # by itself it is an interface; only its circuit is another
        return
    assert found < 2**20 + 20 * text


def test_a_large_interface_is_read_in_proportion_to_its_text(parts):
    """What is accepted costs no more than what is refused: 4 million results, of which 4 are given."""
    interface = json.loads(parts["interface.json"])
    interface.update(shape=[1, MOST_VALUES], bias=array(1, 0, [1, 1]), scale=array(1, 1.0, [1, 1]))
    interface["finish"] = chain(50, "exp")
    tracemalloc.start()
    try:
        assert interface_from_dict(interface).output_shape == (1, MOST_VALUES)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", [*archive.SERVER, archive.DIGESTS])
@pytest.mark.parametrize("byte", [b"0", b" ", b"["])
@pytest.mark.sampled(5)
def test_parts_that_unpack_to_much_are_not_unpacked(parts, name, byte):
    data = zipped({**parts, name: byte * 10**8}, digests=name != archive.DIGESTS)
    assert len(data) < 200_000
    for read in (read_server, load_manifest):
        memory, message = peak(lambda read=read: read(data))
        assert "unpack" in message
        assert memory < 2**22


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_parts_packed_by_other_methods_are_refused(parts, method):
    data = client_zip(parts, method=method)
    memory, message = peak(lambda: read_client(data))
    assert "packed otherwise" in message
    assert memory < 2**22


def manifest_with(parts, **fields):
    return {**parts, "manifest.json": json.dumps({**json.loads(parts["manifest.json"]), **fields}).encode()}


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "fields",
    [
        {"input_shape": [2] * 10**5},
        {"output_shape": [2**100]},
        {"fheconv": "1" * 10**6},
        {"class_names": ["x" * 10**6]},
        {"class_names": ["x"] * 10**6},
        {"class_names": [[]] * 10**6},
    ],
    ids=range(6),
)
def test_what_a_manifest_declares_is_bounded(parts, fields):
    data = client_zip(manifest_with(parts, **fields))
    memory, _ = peak(lambda: read_client(data))
    assert memory < MEMORY


@pytest.mark.parametrize("name", ["input_bytes", "output_bytes", "key_bytes", "sent_key_bytes"])
@pytest.mark.parametrize("value", [1, 2**62, 10**30])
def test_sizes_that_the_manifest_makes_up_are_refused(parts, name, value):
    """A client takes answers from a server up to the size that the manifest tells."""
    cost = {**json.loads(parts["manifest.json"])["cost"], name: value}
    with pytest.raises(fheconv.ArtifactError, match=r"do not belong together|manifest is altered"):
        read_client(client_zip(manifest_with(parts, cost=cost)))


@pytest.mark.slow
def test_a_ciphertext_larger_than_any_file_is_refused_before_keys_are_made(parts):
    specs = json.loads(parts["specs.json"])
    count = 2**21  # of 5,256 bytes each
    for side in ("inputs", "outputs"):
        (one,) = specs["circuits"][0][side]
        ciphertext = one["typeInfo"]["lweCiphertext"]
        for shape in (one["rawInfo"]["shape"], ciphertext["concreteShape"], ciphertext["abstractShape"]):
            shape["dimensions"][1] = count
    size = 8 * int(np.prod(specs["circuits"][0]["inputs"][0]["rawInfo"]["shape"]["dimensions"]))
    positions = {"shape": [count], "values": list(range(count))}
    large = changed(
        parts, inputs=positions, outputs=positions, input_shape=[1, 1, count], shape=[1, 1, count]
    )
    manifest = json.loads(parts["manifest.json"])
    manifest["cost"].update(input_bytes=size, output_bytes=size)
    manifest.update(input_shape=[1, 1, count], output_shape=[1, 1, count])
    large = {
        **large,
        "specs.json": json.dumps(specs).encode(),
        "manifest.json": json.dumps(manifest).encode(),
    }
    with pytest.raises(fheconv.ArtifactError, match="a ciphertext has at most"):
        read_client(client_zip(large))


# Keys and ciphertexts.


@pytest.mark.parametrize("text", [b"[" * 10**6, b"[],[]," * 10**6, b'{"a":' * 10**6, b'[{"a":1},' * 10**6])
def test_json_of_strangers_is_counted_before_it_is_read(text):
    memory, message = peak(lambda: read_json(text, "It", 2**24))
    assert "objects and arrays" in message
    assert memory < 2**20
    memory, message = peak(lambda: read_json(text, "It", 100))
    assert "at most 100" in message
    assert memory < 2**20


@pytest.mark.parametrize("text", [b'{"a": 1, "a": 2}', b'[{"b": {"a": 1, "a": 1}}]'])
def test_a_name_that_stands_twice_is_refused(text):
    with pytest.raises(fheconv.ArtifactError, match="stands twice"):
        read_json(text, "It", 100)


def test_as_many_objects_as_belong_in_a_text_are_read():
    text = b"[" + b"[]," * (plain.MOST_CONTAINERS - 2) + b"[]]"
    assert len(read_json(text, "It", len(text))) == plain.MOST_CONTAINERS - 1


@pytest.mark.parametrize("envelope", [ENVELOPE, EVALUATION], ids=lambda one: one.what)
def test_sizes_that_a_head_declares_are_not_believed(tmp_path, envelope):
    good = envelope.pack({"fingerprint": "a", "key_id": "b"}, [b"0" * 100])
    path = tmp_path / "keys"
    for place, size in ((10, 4), (14, 8)):  # of the header, of the payload
        path.write_bytes(good[:place] + b"\x7f" * size + good[place + size :])
        reads = [lambda: read_key_file(path)]
        if envelope is EVALUATION:
            reads = [lambda: StoredKeys.of(path), lambda: fheconv.EvaluationKeys.load(path)]
        for read in reads:
            memory, _ = peak(read)
            assert memory < 2**22


def test_a_small_ciphertext_takes_little_memory_to_load(circuit, tmp_path):
    ciphertext = circuit.encrypt(np.zeros((1, 3, 3)))
    path = tmp_path / "images.ct"
    ciphertext.save(path)
    tracemalloc.start()
    try:
        assert fheconv.Ciphertext.load(path) == ciphertext
        assert tracemalloc.get_traced_memory()[1] < 2**20 + 10 * path.stat().st_size
    finally:
        tracemalloc.stop()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("lengths", [[[]] * 10**6, [10**30], [0] * 10**6 + [7], "x" * 10**6])
def test_lengths_that_a_ciphertext_declares_are_bounded(circuit, lengths):
    from fheconv.circuits import ciphertext

    fields = {**vars(circuit.encrypt(np.zeros((1, 3, 3)))), "lengths": lengths}
    del fields["values"]
    data = ciphertext.ENVELOPE.pack(fields, [b"0" * 100])
    memory, _ = peak(lambda: fheconv.Ciphertext.from_bytes(data))
    assert memory < 2**20 + 20 * len(data)


def test_a_function_as_large_as_allowed_is_read(parts):
    interface = json.loads(parts["interface.json"])
    interface_from_dict({**interface, "finish": chain(MOST_DEPTH)})
    with pytest.raises(fheconv.ArtifactError, match="inside each other"):
        interface_from_dict({**interface, "finish": chain(MOST_DEPTH + 1)})
    wide = chain(0)["activation"]
    for _ in range(MOST_OPERATORS):
        if len(json.dumps(wide)) > 10**6:
            break
        wide = {"operator": "add", "arguments": [wide, wide], "options": {}}
    with pytest.raises(fheconv.ArtifactError, match="operators, and at most"):
        interface_from_dict({**interface, "finish": {**chain(0), "activation": wide}})


def test_a_circuit_too_large_for_its_files_is_not_saved(circuit, tmp_path, monkeypatch):
    monkeypatch.setitem(archive.LIMITS, "interface.json", 10)
    with pytest.raises(fheconv.ArtifactError, match=r"interface\.json"):
        circuit.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
