"""A process forks while one of its threads holds a lock: the child does not wait for it."""

import os
import threading

import pytest

import fheconv
from fheconv.circuits.keys import EvaluationKeys, StoredKeys
from fheconv.circuits.owner import KeyedHandle
from fheconv.serving.keystore import KeyStore
from tests.support.forking import forked_amid


@pytest.fixture
def events():
    return threading.Event(), threading.Event()


def waiting(events, function):
    """The function, held up until it may go on."""

    def wait(*arguments, **options):
        amid, go_on = events
        amid.set()
        assert go_on.wait(30)
        return function(*arguments, **options)

    return wait


@pytest.mark.slow
def test_a_client_of_a_server_can_be_used_after_a_fork(url, client, events, monkeypatch):
    remote = fheconv.RemoteCircuit(url, client)
    monkeypatch.setattr(KeyedHandle, "keygen", waiting(events, lambda *_: None))
    assert forked_amid(remote.keygen, *events) == 0


def store_at(folder):
    return KeyStore(folder, {"c" * 64: "e" * 64}, max_bytes=10**6, quota=10**6, expiry=1000.0)


def test_stored_keys_can_be_used_after_a_fork_and_the_child_lets_go_of_the_folder(
    tmp_path, events, monkeypatch
):
    some = EvaluationKeys(fingerprint="c" * 64, key_id="one", payload=b"keys")
    store = store_at(tmp_path)
    with store.receive() as upload:
        for chunk in some.chunks():
            upload.feed(chunk)
        upload.keep(some.name)
    store.close()
    store = store_at(tmp_path)  # it has to read the keys anew
    monkeypatch.setattr(StoredKeys, "of", waiting(events, StoredKeys.of))

    def work():
        with store.use(some.name) as keys:
            assert keys.name == some.name

    assert forked_amid(work, *events) == 0
    asks, answers = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(answers)
        os.read(asks, 1)  # until the parent has opened the store again
        os._exit(0)
    store.close()
    again = store_at(tmp_path)
    again.close()
    os.close(answers)
    os.close(asks)
    assert os.waitpid(child, 0)[1] == 0


def test_a_job_of_a_cluster_can_be_used_after_a_fork(events, monkeypatch):
    jobs = pytest.importorskip("fheconv.serving.jobs")
    keys = {"fingerprint": "c" * 64, "key_id": "one", "payload": b"keys"}

    def unreadable(*_, **__):
        raise fheconv.ArtifactError("It is no server.zip.")

    monkeypatch.setattr(jobs, "load_server", waiting(events, unreadable))
    job = jobs.named_job("one", b"", {}, keys, EvaluationKeys(**keys).name)

    def work():
        with pytest.raises(fheconv.ArtifactError):
            job.run(b"")

    assert forked_amid(work, *events) == 0
