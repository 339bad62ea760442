"""A circuit that runs at a server: the interface, what is sent when, and what it takes to give up."""

import contextlib
import os
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest

import fheconv
from fheconv.serving import admission
from tests.support import serving

SECONDS = 120


@pytest.fixture
def asked(monkeypatch):
    """How often each kind of request is made."""
    counted = Counter()
    stream = httpx.Client.stream

    def counting(self, method, path, **options):
        counted[method, path.split("/")[1].partition("?")[0]] += 1
        return stream(self, method, path, **options)

    monkeypatch.setattr(httpx.Client, "stream", counting)
    return counted


def test_a_circuit_from_nothing_but_its_url(url, server, tmp_path):
    remote = fheconv.RemoteCircuit(url)
    assert remote.fingerprint == server.fingerprint
    assert remote.manifest == server.manifest
    assert remote.cost == server.cost
    with pytest.raises(fheconv.NotCompiledError, match="keygen"):
        remote.predict(serving.images(1))
    remote.keygen()
    remote.save_keys(tmp_path / "keys")
    x = serving.images(2)
    serving.check(remote.predict(x), x)
    encrypted = remote.encrypt(x[0])
    again = fheconv.RemoteCircuit(url)
    again.load_keys(tmp_path / "keys")
    serving.check(again.decrypt(again.run(encrypted)), x[0])


@pytest.mark.slow
def test_keys_are_sent_once_and_again_when_the_server_lost_them(url, client, folder, asked):
    remote = fheconv.RemoteCircuit(url, client)
    x = serving.images(1)
    for _ in range(2):
        serving.check(remote.predict(x, fhe="execute"), x)
    assert asked == {("GET", "circuit"): 1, ("GET", "keys"): 1, ("PUT", "keys"): 1, ("POST", "run"): 2}
    assert httpx.delete(f"{url}/keys/{client.evaluation_keys.name}").status_code == 204
    serving.check(remote.predict(x), x)
    assert asked["PUT", "keys"] == 2
    # Another one with these keys finds them there.
    same = fheconv.RemoteCircuit(url, client)
    serving.check(same.predict(x), x)
    assert asked["PUT", "keys"] == 2
    assert same.evaluation_keys == client.evaluation_keys


@pytest.mark.slow
def test_large_batches_go_in_slices_and_empty_ones_not_at_all(server, client, tmp_path, monkeypatch, asked):
    monkeypatch.setattr(admission, "MOST_IMAGES", 2)
    with serving.serving(server, tmp_path) as url:
        remote = fheconv.RemoteCircuit(url, client)
        x = serving.images(3)
        serving.check(remote.predict(x), x)
        assert asked["POST", "run"] == 2
        assert remote.predict(x[:0]).shape == serving.network()(x[:0]).shape
        assert asked["POST", "run"] == 2


def test_what_is_wrong_before_anything_is_sent(url, client, folder, tmp_path, asked):
    remote = fheconv.RemoteCircuit(url, folder / "client.zip")
    remote.load_keys(keys_of(client, tmp_path))
    asked.clear()
    x = serving.images(1)
    for fhe in ("disable", "simulate"):
        with pytest.raises(fheconv.InvalidArgumentError, match="not here"):
            remote.predict(x, fhe=fhe)
    encrypted = remote.encrypt(x)
    with pytest.raises(fheconv.InputRangeError):
        remote.predict(x * np.nan)
    with pytest.raises(fheconv.ArtifactError, match="other keys"):
        remote.run(fheconv.Ciphertext(**{**vars(encrypted), "key_id": "other"}))
    with pytest.raises(fheconv.ArtifactError, match="another circuit"):
        remote.run(fheconv.Ciphertext(**{**vars(encrypted), "fingerprint": "f" * 64}))
    with pytest.raises(fheconv.ArtifactError, match="not bytes"):
        remote.run(encrypted.to_bytes())
    assert not asked


def keys_of(client, tmp_path):
    client.save_keys(tmp_path / "keys")
    return tmp_path / "keys"


def test_errors_of_the_server_are_the_errors_they_are_here(url, client):
    remote = fheconv.RemoteCircuit(url, client)
    encrypted = client.encrypt(serving.images(1))
    bad = fheconv.Ciphertext(**{**vars(encrypted), "values": (b"no ciphertext",)})
    with pytest.raises(fheconv.ExecutionError, match="The server says: Concrete failed"):
        remote.run(bad)
    large = fheconv.Ciphertext(**{**vars(encrypted), "values": (bytes(100_000),)})
    with pytest.raises(fheconv.ArtifactError, match="The server says: The ciphertext has a value of"):
        remote.run(large)


def test_the_token(server, client, tmp_path, monkeypatch):
    monkeypatch.setattr(fheconv.Server, "beside", lambda self, *_: self)
    with serving.serving(server, tmp_path, token="right") as url:
        for token in (None, "wrong"):
            with pytest.raises(fheconv.RemoteError, match="asks for a token"):
                fheconv.RemoteCircuit(url, client, token=token)
        x = serving.images(1)
        serving.check(fheconv.RemoteCircuit(url, token="right", client=client).predict(x), x)


def test_another_circuit_is_refused(url, tmp_path):
    fheconv.compile(fheconv.quantize([[1, -1]], [[[0, 3]]])).save(tmp_path)
    with pytest.raises(fheconv.ArtifactError, match="serves the circuit"):
        fheconv.RemoteCircuit(url, tmp_path / "client.zip")


@pytest.mark.parametrize(
    ("url", "token", "words"),
    [
        ("", None, "http://host:port"),
        ("127.0.0.1:80", None, "http://host:port"),
        ("ftp://127.0.0.1", None, "http://host:port"),
        ("http:///circuit", None, "http://host:port"),
        ("http://host:port", None, "port"),
        (7, None, "url=7"),
        ("http://127.0.0.1:1", "line\nline", "token"),
        ("http://127.0.0.1:1", "tökén", "token"),
    ],
)
def test_urls_and_tokens_that_are_none(url, token, words):
    with pytest.raises(fheconv.InvalidArgumentError, match=words):
        fheconv.RemoteCircuit(url, token=token)


@pytest.mark.parametrize("wrong", [{"retries": -1}, {"timeout": 0}, {"timeout": float("nan")}], ids=str)
def test_numbers_that_are_none(wrong):
    with pytest.raises(fheconv.InvalidArgumentError, match=next(iter(wrong))):
        fheconv.RemoteCircuit("http://127.0.0.1:1", **wrong)


# Servers that are not what they should be.


@contextlib.contextmanager
def answering(*answers):
    """The URL of a server that gives these answers, the last one for ever, and the paths it is asked for."""
    left, requests = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            size = int(self.headers.get("Content-Length", 0))
            self.rfile.read(size)
            requests.append(self.path)
            status, headers, body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{made.server_address[1]}", requests
        finally:
            made.shutdown()
            thread.join()


@pytest.fixture
def waits(monkeypatch):
    """The seconds it would have waited."""
    seen = []
    monkeypatch.setattr("fheconv.serving.remote.time.sleep", seen.append)
    return seen


def circuit_answer(url):
    return 200, {}, httpx.get(f"{url}/circuit").content


def test_a_busy_server_is_asked_again_when_it_says(url, client, waits):
    busy = 429, {"Retry-After": "7"}, b'{"error": "RemoteError", "message": "busy"}'
    later = 503, {"Retry-After": "9999"}, b"no JSON"
    sometime = 503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, b"no JSON"
    with answering(busy, later, sometime, sometime, circuit_answer(url)) as (some, requests):
        fheconv.RemoteCircuit(some, client)
    assert requests == [f"/circuit?fingerprint={client.fingerprint}"] * 5
    assert waits[:2] == [7, 60]
    assert 1 <= waits[2] <= 2 <= waits[3] <= 4
    with (
        answering(busy) as (some, requests),
        pytest.raises(fheconv.RemoteError, match="busy Given up after 3"),
    ):
        fheconv.RemoteCircuit(some, client, retries=2)
    assert len(requests) == 3


def test_no_server_is_an_error_after_all_retries(client, waits):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(fheconv.RemoteError, match=r"no answer: .*refused.*Given up after 3 attempts"):
        fheconv.RemoteCircuit(f"http://127.0.0.1:{port}", client, retries=2)
    assert len(waits) == 2


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "answer",
    [
        (200, {}, b"hello"),
        (200, {}, b"[]"),
        (200, {}, b'{"manifest": {}}'),
        (200, {}, b'{"manifest": {}, "limits": {"images": 0}}'),
        (200, {}, b"[" * 10**5),
        (404, {}, b"hello"),
        (301, {"Location": "http://127.0.0.1:1"}, b""),
        (500, {}, b'{"error": "NoSuchError", "message": "hello"}'),
        (400, {}, b'{"error": "SystemExit", "message": "hello"}'),
    ],
)
def test_what_is_no_server_of_ours_is_a_remote_error(answer, client):
    with answering(answer) as (some, _), pytest.raises(fheconv.RemoteError):
        fheconv.RemoteCircuit(some, client)


def test_an_endless_answer_is_not_taken_in(client):
    with (
        answering((200, {}, bytes(2**24 + 1))) as (some, _),
        pytest.raises(fheconv.ArtifactError, match="16,777,216"),
    ):
        fheconv.RemoteCircuit(some, client)


@pytest.mark.slow
def test_results_that_are_not_of_these_images_are_refused(url, server, client):
    x = serving.images(2)
    encrypted = client.encrypt(x)
    right = server.run(encrypted, client.evaluation_keys)
    wrong = [
        encrypted,
        fheconv.Ciphertext(**{**vars(right), "key_id": "other"}),
        fheconv.Ciphertext(**{**vars(right), "fingerprint": "f" * 64}),
        fheconv.Ciphertext(**{**vars(right), "images": 1, "values": right.values[:1]}),
        fheconv.Ciphertext(**{**vars(right), "values": right.values[:1]}),
    ]
    for one in wrong:
        known = 200, {}, b""
        with answering(circuit_answer(url), known, (200, {}, one.to_bytes())) as (some, _):
            remote = fheconv.RemoteCircuit(some, client)
            with pytest.raises(fheconv.ArtifactError, match="not the results of the images"):
                remote.run(encrypted)
    damaged = right.to_bytes()[:-1]
    with (
        answering(circuit_answer(url), (200, {}, b""), (200, {}, damaged)) as (some, _),
        pytest.raises(fheconv.ArtifactError, match="truncated"),
    ):
        fheconv.RemoteCircuit(some, client).run(encrypted)


# A server that dies.


@pytest.mark.slow
def test_a_server_that_is_killed_in_mid_run_costs_time_only(folder, client, tmp_path):
    """Its keys are there when it is back, no half-written file is, and the same call returns the results."""
    store = tmp_path / "keys" / client.keyset
    x = serving.images(4)
    (tmp_path / "token").write_text("secret\n")
    token = "--token-file", str(tmp_path / "token")
    with (
        serving.commands(folder / "server.zip", tmp_path / "keys") as start,
        ThreadPoolExecutor(1) as pool,
    ):
        process, url = start(*token)
        half = half_uploaded(url, client.evaluation_keys)
        end = time.monotonic() + SECONDS
        while not list(store.glob(".incoming-*")):
            assert time.monotonic() < end, "The server stores nothing."
        results = pool.submit(fheconv.RemoteCircuit(url, client, token="secret").predict, x)
        while not httpx.get(f"{url}/health").json()["running"]:
            assert not results.done()
        serving.kill(process)
        half.close()
        assert list(store.glob(".incoming-*"))
        assert not results.done()
        kept = {path.name: os.stat(path).st_ino for path in store.glob("*.keys")}
        assert kept.keys() == {f"{client.evaluation_keys.name}.keys"}
        start(*token, port=httpx.URL(url).port)
        serving.check(results.result(SECONDS), x)
        assert {path.name: os.stat(path).st_ino for path in store.iterdir() if path.suffix} == kept
        assert not list(store.glob(".incoming-*"))


def half_uploaded(url, keys):
    """A connection on which half of some keys were sent."""
    data = keys.to_bytes()
    made = socket.create_connection((httpx.URL(url).host, httpx.URL(url).port))
    head = f"PUT /keys/{'0' * 64} HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer secret\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    made.sendall(head.encode() + data[: len(data) // 2])
    return made
