"""A real server over loopback: what it answers, to whom, and what it survives."""

import contextlib
import io
import json
import logging
import signal
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks
from typer.testing import CliRunner

import fheconv
from fheconv.circuits.ciphertext import Ciphertext
from fheconv.circuits.files.manifest import Manifest
from fheconv.circuits.keys import EvaluationKeys
from fheconv.circuits.native.worker import Worker
from fheconv.cli.main import app
from fheconv.serving import app as serve
from fheconv.serving import request_log
from fheconv.serving.admission import Limits
from tests.support import serving

TOKEN = "the-token-of-the-tests"


@pytest.fixture(scope="module")
def keys(client):
    return client.evaluation_keys


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, timeout=60) as made:
        yield made


@pytest.fixture
def stored(http, keys):
    """The name of keys that are at the server."""
    assert http.put(f"/keys/{keys.name}", content=keys.to_bytes()).status_code == 200
    return keys.name


def problem(response, status, error, words):
    assert response.status_code == status, response.text
    assert response.json()["error"] == error
    assert words in response.json()["message"]


def works(http, client, name):
    """The circuit runs, whatever was before."""
    x = serving.images(1)
    response = http.post(f"/run/{name}", content=client.encrypt(x).to_bytes())
    assert response.status_code == 200, response.text
    serving.check(client.decrypt(Ciphertext.from_bytes(response.content)), x)


def test_what_it_says_of_itself(http, server, folder, keys):
    assert http.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    circuit = http.get("/circuit").json()
    assert Manifest.from_dict(circuit["manifest"]) == server.manifest
    assert circuit["limits"]["images"] == 16
    assert http.get("/client").content == (folder / "client.zip").read_bytes()
    assert http.get("/docs").status_code == 200
    paths = http.get("/openapi.json").json()["paths"]
    circuits = {"/circuits", "/circuit", "/client"}
    assert set(paths) == circuits | {"/health", "/keys", "/keys/{name}", "/run/{name}"}


def test_errors_that_are_not_of_a_route_are_json_too(http, monkeypatch):
    problem(http.get("/nothing"), 404, "RemoteError", "Not Found")
    refused = http.post("/health")
    problem(refused, 405, "RemoteError", "Not Allowed")
    assert refused.headers["Allow"] == "GET"

    def bug(self, name):
        raise RuntimeError("a secret of the server's")

    monkeypatch.setattr("fheconv.serving.keystore.KeyStore.size_of", bug)
    unforeseen = http.get(f"/keys/{'0' * 64}")
    problem(unforeseen, 500, "RemoteError", "its log says why")
    assert "secret" not in unforeseen.text


@pytest.mark.parametrize(
    ("complexity", "image_bytes", "images"),
    [(0.0, 100, 16), (4e10, 100, 15), (7e11, 100, 1), (0.0, 10**7, 3), (0.0, 10**9, 1)],
)
def test_a_request_has_as_many_images_as_memory_and_time_allow(server, complexity, image_bytes, images):
    cost = replace(server.cost, complexity=complexity, output_bytes=image_bytes)
    limits = Limits.of(SimpleNamespace(cost=cost))
    assert limits.images == images
    assert limits.key_bytes > cost.key_bytes
    assert limits.ciphertext_bytes > images * cost.input_bytes


def test_keys_come_once_and_serve_until_they_are_removed(http, client, keys):
    path = f"/keys/{keys.name}"
    problem(http.get(path), 404, "ArtifactError", "no evaluation keys")
    problem(http.post(f"/run/{keys.name}", content=b""), 404, "ArtifactError", "no evaluation keys")
    for _ in range(2):
        answer = {"name": keys.name, "bytes": len(keys.to_bytes())}
        assert http.put(path, content=keys.to_bytes()).json() == answer
    assert http.get(path).json() == answer
    works(http, client, keys.name)
    assert http.delete(path).status_code == 204
    problem(http.get(path), 404, "ArtifactError", "no evaluation keys")


def test_keys_that_are_not_what_they_should_be(http, url, keys, server):
    data, path = keys.to_bytes(), f"/keys/{keys.name}"
    problem(http.put(path, content=data[:-1]), 400, "ArtifactError", "truncated")
    problem(http.put(path, content=data[:-1] + b"x"), 400, "ArtifactError", "SHA-256")
    problem(http.put(path, content=b"no keys"), 400, "ArtifactError", "begin otherwise")
    problem(http.put(path), 400, "ArtifactError", "no evaluation key file")
    problem(http.put(f"/keys/{'0' * 64}", content=data), 409, "ArtifactError", "digest is")
    problem(http.put("/keys/some", content=data), 422, "ArtifactError", "64 hexadecimal")
    other = EvaluationKeys(fingerprint="f" * 64, key_id="me", payload=keys.payload)
    problem(
        http.put(f"/keys/{other.name}", content=other.to_bytes()), 409, "ArtifactError", "another circuit"
    )
    most = Limits.of(server).key_bytes
    with raw_request(url, "PUT", path, b"", length=most + 1) as large:
        assert large.recv(12) == b"HTTP/1.1 413"


def test_ciphertexts_that_are_not_what_they_should_be(http, client, keys, stored, folder):
    path = f"/run/{stored}"
    encrypted = client.encrypt(serving.images(1))
    data = encrypted.to_bytes()
    problem(http.post(path, content=data[:-1]), 400, "ArtifactError", "truncated")
    problem(http.post(path, content=data[:-1] + b"x"), 400, "ArtifactError", "SHA-256")

    def changed(**fields):
        return Ciphertext(**{**vars(encrypted), **fields}).to_bytes()

    problem(http.post(path, content=changed(fingerprint="f" * 64)), 409, "ArtifactError", "another circuit")
    problem(http.post(path, content=changed(key_id="other")), 409, "ArtifactError", "other keys")
    problem(http.post(path, content=changed(kind="output")), 400, "ArtifactError", "encrypt()")
    problem(http.post(path, content=changed(images=2)), 400, "ArtifactError", "2 images")
    many = client.encrypt(serving.images(17)).to_bytes()
    problem(http.post(path, content=many), 413, "ArtifactError", "at most 16")
    problem(http.post(path, content=changed(values=(b"0" * 10**5,))), 400, "ArtifactError", "100,000 bytes")
    problem(http.post(path, content=bytes(2 * 10**6)), 413, "ArtifactError", "more bytes")
    problem(http.post(path, content=iter([bytes(10**6)] * 3)), 413, "ArtifactError", "more bytes")
    # The library is asked, and refuses.
    problem(http.post(path, content=changed(values=(b"no ciphertext",))), 500, "ExecutionError", "Concrete")
    empty = http.post(path, content=client.encrypt(serving.images(1)[:0]).to_bytes())
    assert Ciphertext.from_bytes(empty.content).values == ()
    works(http, client, stored)


@pytest.mark.slow
def test_keys_on_which_the_library_dies_cost_one_request(http, client, stored):
    """Keys of another circuit, with all the names of this one."""
    wrong = fheconv.compile(fheconv.quantize([[1, -1]], [[[0, 3]]]))
    wrong.keygen()
    encrypted = client.encrypt(serving.images(1))
    payload = wrong.evaluation_keys.payload
    forged = EvaluationKeys(fingerprint=client.fingerprint, key_id=encrypted.key_id, payload=payload)
    assert http.put(f"/keys/{forged.name}", content=forged.to_bytes()).status_code == 200
    response = http.post(f"/run/{forged.name}", content=encrypted.to_bytes())
    problem(response, 500, "ExecutionError", "killed by SIG")
    works(http, client, stored)


@pytest.mark.slow
def test_two_clients_with_different_keys_at_once(server, client, folder, tmp_path):
    clients = [client, serving.keyed_client(folder)]
    with (
        serving.serving(server, tmp_path, workers=2) as url,
        httpx.Client(base_url=url, timeout=60) as http,
        ThreadPoolExecutor(4) as pool,
    ):

        def ask(number):
            one, x = clients[number % 2], serving.images(1, seed=number)
            some, encrypted = one.evaluation_keys, one.encrypt(x).to_bytes()
            assert http.put(f"/keys/{some.name}", content=some.to_bytes()).status_code == 200
            response = http.post(f"/run/{some.name}", content=encrypted)
            serving.check(one.decrypt(Ciphertext.from_bytes(response.content)), x)

        list(pool.map(ask, range(4)))


def waiting(http, running, count):
    """Return once the server says so; it may hear of a client that left only later."""
    for _ in range(2000):
        seen = http.get("/health").json()
        if (seen["running"], seen["waiting"]) == (running, count):
            return
    raise AssertionError(f"the server still says {seen}")


@contextlib.contextmanager
def holding(keys, server, folder, **options):
    """Serve a circuit that has some keys already. Yield the URL, and a client for it."""
    with serving.serving(server, folder, **options) as url, httpx.Client(base_url=url, timeout=60) as http:
        assert http.put(f"/keys/{keys.name}", content=keys.to_bytes()).status_code == 200
        yield url, http


def raw_request(url, method, path, body, length=None):
    """A request on a socket of its own, which its sender may close before all of it is sent."""
    host, port = httpx.URL(url).host, httpx.URL(url).port
    made = socket.create_connection((host, port), timeout=60)
    size = len(body) if length is None else length
    made.sendall(
        f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {size}\r\n\r\n".encode() + body
    )
    return made


def test_a_full_queue_is_429_and_those_who_leave_free_their_places(server, client, keys, tmp_path, blocked):
    begun, go = blocked
    body, path = client.encrypt(serving.images(1)).to_bytes(), f"/run/{keys.name}"
    with holding(keys, server, tmp_path, queue=2) as (url, http):
        first = raw_request(url, "POST", path, body)
        begun.acquire()
        # One waits with its body, one has not even sent it: its place is taken all the same.
        second, third = (
            raw_request(url, "POST", path, body),
            raw_request(url, "POST", path, b"", length=len(body)),
        )
        waiting(http, 1, 2)
        full = http.post(path, content=body)
        problem(full, 429, "RemoteError", "busy")
        assert 1 <= int(full.headers["Retry-After"]) <= 60
        for one in (second, third):
            one.close()
        waiting(http, 1, 0)
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(http.post, path, content=body) for _ in range(2)]
            waiting(http, 1, 2)
            go.set()
            for answer in answers:
                assert Ciphertext.from_bytes(answer.result().content).values == (b"a result",)
        assert first.recv(12) == b"HTTP/1.1 200"
        first.close()
        waiting(http, 0, 0)


def test_a_client_that_leaves_in_mid_run_costs_the_image_that_runs(server, client, keys, tmp_path, blocked):
    begun, go = blocked
    body, path = client.encrypt(serving.images(3)).to_bytes(), f"/run/{keys.name}"
    with holding(keys, server, tmp_path) as (url, http):
        leaver = raw_request(url, "POST", path, body)
        begun.acquire()
        problem(http.delete(f"/keys/{keys.name}"), 409, "RemoteError", "runs with these keys")
        leaver.close()
        with raw_request(url, "POST", path, body):
            waiting(http, 1, 1)
        waiting(http, 1, 0)  # now the server has heard of both
        go.set()
        waiting(http, 0, 0)
        assert not begun.acquire(blocking=False)  # its other two images did not run
        assert http.delete(f"/keys/{keys.name}").status_code == 204


def test_a_batch_runs_on_all_workers_beside_other_requests(server, client, keys, tmp_path, blocked):
    begun, go = blocked
    body, path = client.encrypt(serving.images(4)).to_bytes(), f"/run/{keys.name}"
    with holding(keys, server, tmp_path, workers=2) as (_, http), ThreadPoolExecutor(2) as pool:
        batch = pool.submit(http.post, path, content=body)
        for _ in range(2):
            assert begun.acquire(timeout=60)  # two of its images run at once
        single = pool.submit(http.post, path, content=client.encrypt(serving.images(1)).to_bytes())
        waiting(http, 1, 1)
        go.set()
        for answer, count in ((batch, 4), (single, 1)):
            assert Ciphertext.from_bytes(answer.result().content).values == (b"a result",) * count
        waiting(http, 0, 0)


def test_those_whom_the_stop_of_the_server_interrupts_are_told_to_ask_again(
    server, client, keys, tmp_path, blocked, monkeypatch
):
    begun, go = blocked
    # Its worker is what a run waits for.
    monkeypatch.setattr(serve, "Worker", lambda: SimpleNamespace(stop=go.set))
    monkeypatch.setattr("fheconv.serving.routes.GRACE_SECONDS", 1)
    body, url_path = client.encrypt(serving.images(1)).to_bytes(), f"/run/{keys.name}"
    with ThreadPoolExecutor(2) as pool, httpx.Client(timeout=60) as http:
        with serving.serving(server, tmp_path) as url:
            http.put(f"{url}/keys/{keys.name}", content=keys.to_bytes()).raise_for_status()
            answers = [pool.submit(http.post, url + url_path, content=body) for _ in range(2)]
            begun.acquire()
            http.base_url = url
            waiting(http, 1, 1)
        for answer in answers:
            problem(answer.result(), 503, "RemoteError", "stopped")
            assert answer.result().headers["Retry-After"] == "1"


def test_a_body_that_does_not_come_is_408(server, keys, tmp_path, monkeypatch, unstarted):
    monkeypatch.setattr("fheconv.serving.admission.PATIENCE", 0.2)
    with (
        holding(keys, server, tmp_path) as (url, _),
        raw_request(url, "POST", f"/run/{keys.name}", b"", length=100) as slow,
    ):
        assert slow.recv(12) == b"HTTP/1.1 408"


def test_keys_that_do_not_fit_are_507(server, keys, tmp_path, unstarted):
    with serving.serving(server, tmp_path, quota=10**6) as url:
        response = httpx.put(f"{url}/keys/{keys.name}", content=keys.to_bytes(), timeout=60)
        problem(response, 507, "RemoteError", "1,000,000 bytes")


def test_the_token_is_asked_for(server, keys, tmp_path, unstarted):
    with (
        serving.serving(server, tmp_path, token=TOKEN) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        requests = [
            ("GET", "/circuit"),
            ("GET", "/client"),
            ("GET", f"/keys/{keys.name}"),
            ("PUT", f"/keys/{keys.name}"),
            ("DELETE", f"/keys/{keys.name}"),
            ("POST", f"/run/{keys.name}"),
        ]
        wrong = (
            {},
            {"Authorization": "Bearer other"},
            {"Authorization": f"Basic {TOKEN}"},
            {"x-token": TOKEN},
        )
        for method, path in requests:
            for headers in (*wrong, {"Authorization": b"Bearer \xff"}):
                refused = http.request(method, path, headers=headers)
                problem(refused, 401, "RemoteError", "token")
                assert refused.headers["WWW-Authenticate"] == "Bearer"
        assert http.get("/circuit", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
        assert http.get("/health").status_code == 200


def test_a_line_of_the_log_for_each_request_and_nothing_of_bodies_or_tokens(
    server, keys, tmp_path, unstarted
):
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(request_log.JsonLines())
    request_log.LOGGER.addHandler(handler)
    request_log.LOGGER.setLevel(logging.INFO)
    try:
        with serving.serving(server, tmp_path, token=TOKEN) as url:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            httpx.put(f"{url}/keys/{keys.name}?secret", content=b"the body", headers=headers)
            httpx.get(f"{url}/nothing/%0A{'x' * 500}")
    finally:
        request_log.LOGGER.removeHandler(handler)
    put, get = map(json.loads, written.getvalue().splitlines())
    assert (put["method"], put["path"]) == ("PUT", f"/keys/{keys.name}")
    assert (put["status"], put["received"], put["keys"]) == (400, 8, keys.name)
    assert put["seconds"] >= 0
    assert put["time"].endswith("+00:00")
    assert get["status"] == 404
    assert len(get["path"]) == 200
    assert TOKEN not in written.getvalue()
    assert "body" not in written.getvalue()
    assert "secret" not in written.getvalue()


def test_what_makes_no_sense_is_refused_before_anything_is_bound(server, tmp_path):
    for wrong in ({"workers": 0}, {"queue": -1}, {"keys_in_memory": 0}, {"quota": 0}, {"expiry": -1}):
        with pytest.raises(fheconv.InvalidArgumentError, match=next(iter(wrong))):
            serve.application(server, folder=tmp_path, **wrong)
    for token in ("", "two words", "tökén", "line\n", " x"):
        with pytest.raises(fheconv.InvalidArgumentError, match="one word"):
            serve.application(server, folder=tmp_path, token=token)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org", ""):
        with pytest.raises(fheconv.InvalidArgumentError, match="token"):
            serve.serve(server, host=host, folder=tmp_path)
    with mock.patch.object(uvicorn.Server, "run") as run:
        for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1"):
            serve.serve(server, host=host, port=0, folder=tmp_path / host)
            run.assert_called_once()
            run.reset_mock()


def test_log_lines_go_to_standard_error_only_while_it_serves(server, tmp_path, capsys):
    """Whoever goes on may close that stream, or have its own."""
    before = list(request_log.LOGGER.parent.handlers)
    with mock.patch.object(uvicorn.Server, "run"):
        serve.serve(server, port=0, folder=tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"].startswith("Serving circuit")
    assert request_log.LOGGER.parent.handlers == before


# Bodies of strangers.


@pytest.mark.slow
def test_malformed_requests_get_the_answers_that_the_description_promises(url, http, stored):
    asked = Counter()

    def ask(operation, mode, name):
        """Make requests such as the description tells, or in the mode NEGATIVE such as it excludes."""

        @given(case=operation.as_strategy(mode))
        @settings(max_examples=10, suppress_health_check=list(HealthCheck))
        def one(case):
            case.path_parameters.update({} if name is None else {"name": name})
            response = case.call(timeout=60)
            asked[case.method, response.status_code] += 1
            case.validate_response(
                response,
                checks=[
                    schemathesis.checks.not_a_server_error,
                    checks.status_code_conformance,
                    checks.content_type_conformance,
                    checks.response_schema_conformance,
                ],
            )

        one()

    for result in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = result.ok()
        ask(operation, GenerationMode.POSITIVE, None)
        if "{name}" in operation.path:
            ask(operation, GenerationMode.NEGATIVE, None)
            ask(operation, GenerationMode.POSITIVE, "0" * 64 if operation.method == "delete" else stored)
    for seen in (("GET", 200), ("GET", 404), ("PUT", 400), ("POST", 400), ("POST", 404), ("DELETE", 404)):
        assert asked[seen], asked
    assert http.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}


@given(data=st.data())
@settings(max_examples=20)
@pytest.mark.slow
def test_whatever_happens_to_a_ciphertext_is_400(data, url, client, keys):
    good = client.encrypt(serving.images(1)).to_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    cut = good[:at]
    longer = cut + data.draw(st.binary(min_size=1, max_size=9)) + good[at:]
    flipped = cut + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    with httpx.Client(base_url=url, timeout=60) as http:
        if http.get(f"/keys/{keys.name}").status_code == 404:
            assert http.put(f"/keys/{keys.name}", content=keys.to_bytes()).status_code == 200
        for bad in (cut, longer, flipped):
            assert http.post(f"/run/{keys.name}", content=bad).status_code == 400


# The server as a process.


@pytest.fixture
def command(folder, tmp_path):
    with serving.commands(folder / "server.zip", tmp_path / "keys") as start:
        yield start


def memory(process):
    with open(f"/proc/{process.pid}/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@pytest.mark.slow
def test_a_flood_is_bounded_in_memory(command, client, keys, server):
    """Of 100 who send a megabyte each, only those with a place are read."""
    process, url = command("--queue", "3")
    most = Limits.of(server).ciphertext_bytes
    with httpx.Client(base_url=url, timeout=60) as http:
        before = memory(process)
        data = keys.to_bytes()
        assert http.put(f"/keys/{keys.name}", content=data).status_code == 200
        uploaded = memory(process) - before
        assert uploaded < len(data) / 2
        works(http, client, keys.name)
        before = memory(process)
        flood = [
            raw_request(url, "POST", f"/run/{keys.name}", bytes(most - 10), length=most) for _ in range(100)
        ]
        waiting(http, 0, 4)
        during = memory(process)
        problem(http.post(f"/run/{keys.name}", content=bytes(100)), 429, "RemoteError", "busy")
        for one in flood:
            one.close()
        waiting(http, 0, 0)
        works(http, client, keys.name)
    # 100 bodies would be 100 times as much; connections have buffers of a few hundred kilobytes.
    assert during - before < 100 * most / 3
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


@pytest.mark.slow
def test_a_server_in_the_background_ignores_interruptions_but_not_the_end(command):
    process, url = command(on_interruption="SIG_IGN")
    process.send_signal(signal.SIGINT)
    assert httpx.get(f"{url}/health", timeout=60).status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        (["--host", "0.0.0.0"], {}, "allow-remote"),
        (["--token-file", "missing"], {}, "cannot be read"),
        ([], {"FHECONV_TOKEN": "two words"}, "one word"),
        (["--host", "192.0.2.1", "--allow-remote"], {}, "cannot listen"),
    ],
)
def test_the_command_says_what_is_wrong(server, folder, tmp_path, monkeypatch, options, environment, words):
    monkeypatch.setattr("fheconv.circuits.server.load_server", lambda path: server)
    monkeypatch.setattr("fheconv.circuits.native.worker.worker", Worker)
    arguments = ["serve", str(folder / "server.zip"), "--port", "0", "--folder", str(tmp_path), *options]
    done = CliRunner().invoke(app, arguments, env=environment)
    assert isinstance(done.exception, fheconv.InvalidArgumentError)
    assert words in str(done.exception)
