"""Evaluation keys on the disk: what stays, what goes, and what a crash leaves."""

import os
import stat
import threading

import pytest

import fheconv
from fheconv.circuits.keys import EvaluationKeys
from fheconv.serving.disk import ForeignKeys, KeysInUse, StoreFull, UnknownKeys
from fheconv.serving.keystore import KeyStore

CIRCUIT, KEYSET = "c" * 64, "e" * 64
SIZE = 10_000


def keys(number, circuit=CIRCUIT):
    return EvaluationKeys(fingerprint=circuit, key_id=f"owner {number}", payload=os.urandom(SIZE))


def send(store, some, name=None):
    with store.receive() as upload:
        for chunk in some.chunks():
            upload.feed(chunk)
        upload.keep(name or some.name)
    return some.name


def size(some):
    return len(some.to_bytes())


@pytest.fixture
def opened(tmp_path):
    """A function that opens a store, closing the one before."""
    made = []

    def open_store(**options):
        while made:
            made.pop().close()
        limits = {"max_bytes": 10**6, "quota": 10**6, "expiry": 1000.0, **options}
        made.append(KeyStore(tmp_path / "store", {CIRCUIT: KEYSET}, **limits))
        return made[0]

    yield open_store
    while made:
        made.pop().close()


def names(store):
    return {path.stem for path in store.folder.glob("*.keys")}


def age(store, name, seconds):
    """Let keys have been used so long ago, as the next process sees it."""
    path = store.folder / f"{name}.keys"
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_keys_are_stored_by_content_and_found_by_the_next_process(opened):
    some = keys(1)
    store = opened()
    with pytest.raises(UnknownKeys):
        store.size_of(some.name)
    assert send(store, some) == send(store, some)
    assert store.size_of(some.name) == size(some)
    for again in (store, opened()):
        with again.use(some.name) as stored:
            assert stored.read() == some.payload
            assert (stored.key_id, stored.name) == (some.key_id, some.name)
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((store.folder / f"{some.name}.keys").stat().st_mode) == 0o600


def test_what_did_not_arrive_leaves_nothing(opened):
    some, data = keys(1), keys(1).to_bytes()
    store = opened()
    damaged = data[:500] + bytes([data[500] ^ 1]) + data[501:]
    for bad, words in ((data[:500], "truncated"), (damaged, "SHA-256")):
        with store.receive() as upload:
            upload.feed(bad)
            with pytest.raises(fheconv.ArtifactError, match=words):
                upload.keep(some.name)
    with store.receive() as upload:
        upload.feed(data)  # and its sender goes away
    with pytest.raises(ForeignKeys, match="another circuit"):
        send(store, keys(1, circuit="d" * 64))
    with pytest.raises(ForeignKeys, match="digest"):
        send(store, some, name="0" * 64)
    with pytest.raises(fheconv.ArtifactError, match="more than 1,000"):
        send(opened(max_bytes=1000), some)
    assert {path.name for path in store.folder.iterdir()} == {".lock"}
    # None of it counts any longer.
    send(opened(quota=size(some)), some)


def test_a_crash_leaves_whole_files_only(opened):
    store = opened()
    kept = send(store, keys(1))
    (store.folder / ".incoming-0123").write_bytes(b"half of something")
    (store.folder / "notes.txt").write_text("of the owner")
    again = opened()
    assert {path.name for path in store.folder.iterdir()} == {".lock", "notes.txt", f"{kept}.keys"}
    assert again.size_of(kept) > SIZE


def test_a_damaged_file_is_noticed_at_its_first_use_and_can_be_sent_again(opened):
    some = keys(1)
    path = opened().folder / f"{send(opened(), some)}.keys"
    data = path.read_bytes()
    path.write_bytes(data[:-100] + b"x" + data[-99:])
    store = opened()
    assert store.size_of(some.name)
    with pytest.raises(UnknownKeys, match="lost on the disk"), store.use(some.name):
        pass
    assert not path.exists()
    send(store, some)
    with store.use(some.name) as stored:
        assert stored.read() == some.payload
    path.unlink()
    with pytest.raises(UnknownKeys, match="lost on the disk"), store.use(some.name):
        pass
    send(store, some)


def test_the_oldest_unused_make_room(opened):
    some = [keys(number) for number in range(4)]
    store = opened(quota=2 * size(some[0]) + 10)
    for one in some[:2]:
        send(store, one)
    with store.use(some[0].name):
        pass
    send(store, some[2])
    assert names(store) == {some[0].name, some[2].name}
    with store.use(some[0].name):
        send(store, some[3])
        with store.use(some[3].name), pytest.raises(StoreFull, match="no room"):
            send(store, some[1])
    assert names(store) == {some[0].name, some[3].name}
    send(store, some[1])
    assert len(names(store)) == 2


def test_when_keys_were_used_outlives_the_process(opened):
    first, second, third = (keys(number) for number in range(3))
    store = opened(quota=2 * size(first) + 10)
    for one in (first, second):
        send(store, one)
    age(store, second.name, 500)
    store = opened(quota=2 * size(first) + 10)
    send(store, third)
    assert names(store) == {first.name, third.name}
    age(store, third.name, 1001)
    assert names(opened()) == {first.name}


def test_unused_keys_expire_and_used_ones_do_not(opened, monkeypatch):
    some = keys(1)
    store = opened()
    send(store, some)
    later = os.path.getmtime(store.folder / f"{some.name}.keys") + 2000
    with store.use(some.name):
        monkeypatch.setattr("fheconv.serving.keystore.time.time", lambda: later)
        store.expire()
        assert names(store) == {some.name}
    store.expire()
    assert names(store) == {some.name}
    monkeypatch.setattr("fheconv.serving.keystore.time.time", lambda: later + 1001)
    with pytest.raises(UnknownKeys):
        store.size_of(some.name)
    assert names(store) == set()


def test_keys_in_use_are_not_removed(opened):
    some = keys(1)
    store = opened()
    send(store, some)
    with store.use(some.name), pytest.raises(KeysInUse):
        store.delete(some.name)
    store.delete(some.name)
    for step in (store.delete, store.size_of):
        with pytest.raises(UnknownKeys):
            step(some.name)


def test_many_at_once_stay_within_the_quota(opened):
    some = [keys(number) for number in range(8)]
    quota = 3 * size(some[0])
    store = opened(quota=quota)
    failures = []

    def work(number):
        one = some[number]
        for _ in range(20):
            try:
                send(store, one)
                with store.use(one.name) as stored:
                    assert stored.read() == one.payload
            except (UnknownKeys, StoreFull):
                pass
            except BaseException as error:
                failures.append(error)
                raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    files = list(store.folder.glob("*.keys"))
    assert files
    assert sum(path.stat().st_size for path in files) <= quota
    assert not list(store.folder.glob(".incoming-*"))


def test_a_store_is_of_one_process(opened, tmp_path):
    store = opened()
    with pytest.raises(fheconv.InvalidArgumentError, match="Another server"):
        KeyStore(tmp_path / "store", {CIRCUIT: KEYSET}, max_bytes=1, quota=1, expiry=1)
    KeyStore(tmp_path / "store", {CIRCUIT: "d" * 64}, max_bytes=1, quota=1, expiry=1).close()
    store.close()
    opened()


def test_limits_and_folders_that_are_none(tmp_path):
    limits = {"max_bytes": 1, "quota": 1, "expiry": 1.0}
    for wrong in ({"quota": 0}, {"expiry": 0}, {"expiry": float("nan")}):
        with pytest.raises(fheconv.InvalidArgumentError, match=next(iter(wrong))):
            KeyStore(tmp_path, {CIRCUIT: KEYSET}, **{**limits, **wrong})
    (tmp_path / "file").touch()
    with pytest.raises(fheconv.InvalidArgumentError, match="another folder"):
        KeyStore(tmp_path / "file", {CIRCUIT: KEYSET}, **limits)


def test_a_full_disk_is_said(opened, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    store = opened()
    monkeypatch.setattr("fheconv.serving.keystore.os.fsync", full)
    with pytest.raises(StoreFull, match="No space left"):
        send(store, keys(1))
    assert names(store) == set()
