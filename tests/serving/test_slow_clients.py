"""Clients that send half of something, or byte by byte, or do not read: others are served all the same."""

import contextlib
import select
import socket
import threading
import time

import httpx
import pytest

import fheconv
from fheconv.serving import admission, connections
from tests.support import serving

HALF = b"GET /health HTTP/1.1\r\nHost: me\r\nX-Never-"
GET = b"GET %s HTTP/1.1\r\nHost: me\r\n\r\n"
LONG = 60


@pytest.fixture(scope="module")
def keys(client):
    return client.evaluation_keys


@pytest.fixture
def start(server, tmp_path, monkeypatch, unstarted):
    """A function that starts a server without workers, with a patience, and returns its address."""
    with contextlib.ExitStack() as stack:

        def started(patience=LONG):
            monkeypatch.setattr(connections, "PATIENCE", patience)
            url = httpx.URL(stack.enter_context(serving.serving(server, tmp_path)))
            health(url)  # it is there
            return url

        yield started


def health(url):
    return httpx.get(url.join("/health"), timeout=20).json()["status"]


def connected(url, data=b"", source="127.0.0.1"):
    made = socket.create_connection((url.host, url.port), timeout=20, source_address=(source, 0))
    made.sendall(data)
    return made


def readable(connection, seconds):
    poll = select.poll()  # `select` knows only the first 1024 file descriptors
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def is_closed(connection):
    """Whether the server has closed it, by now."""
    if not readable(connection, 0):
        return False
    try:
        return connection.recv(2**16, socket.MSG_PEEK) == b""
    except ConnectionError:
        return True


def until_closed(connection, trickle=b""):
    """Return all that comes until the server closes the connection, while bytes are sent now and then."""
    answer, end = b"", time.monotonic() + 20
    while time.monotonic() < end:
        try:
            if trickle:
                connection.send(trickle)
            if readable(connection, 0.05):
                piece = connection.recv(2**16)
                if not piece:
                    return answer
                answer += piece
        except ConnectionError:
            return answer
    raise AssertionError("the connection is still open")


def test_hundreds_of_half_headers_lock_nobody_out(start):
    url = start()
    flood = [connected(url, HALF) for _ in range(260)]
    try:
        for _ in range(3):
            assert health(url) == "ok"
        flood += [connected(url, HALF) for _ in range(300)]
        assert health(url) == "ok"
        assert sum(not is_closed(one) for one in flood) <= connections.CONNECTIONS
    finally:
        for one in flood:
            one.close()


@pytest.mark.sampled(5)
@pytest.mark.parametrize("head", [b"", b"G", HALF])
@pytest.mark.parametrize("trickle", [b"", b"a"])
def test_a_request_that_does_not_come_or_comes_byte_by_byte_is_given_up(start, head, trickle):
    url = start(patience=0.5)
    with connected(url, head) as slow:
        assert until_closed(slow, trickle if head else b"") == b""
    assert health(url) == "ok"


def test_a_second_request_has_no_more_time_than_the_first(start):
    with connected(start(patience=0.5), GET % b"/health" + HALF) as slow:
        assert until_closed(slow, b"a").startswith(b"HTTP/1.1 200")


def test_a_body_that_nobody_reads_does_not_keep_the_connection(start):
    head = b"GET /health HTTP/1.1\r\nHost: me\r\nContent-Length: 1000000\r\n\r\n"
    with connected(start(patience=0.5), head) as slow:
        assert until_closed(slow, b"a").startswith(b"HTTP/1.1 200")


@pytest.mark.slow
def test_a_body_that_comes_byte_by_byte_is_408(start, keys, monkeypatch):
    monkeypatch.setattr(admission, "PATIENCE", 0.5)
    url = start()
    head = f"PUT /keys/{keys.name} HTTP/1.1\r\nHost: me\r\nContent-Length: 1000\r\n\r\n".encode()
    with connected(url, head + keys.to_bytes()[:10]) as slow:
        answer, end = b"", time.monotonic() + 20
        while not answer and time.monotonic() < end:
            slow.send(keys.to_bytes()[10:11])
            if readable(slow, 0.05):
                answer = slow.recv(2**16)
    assert answer.startswith(b"HTTP/1.1 408")


@pytest.fixture
def large(monkeypatch):
    """A client.zip that fits into no buffer of the system."""
    monkeypatch.setattr("fheconv.serving.routes.client_file", lambda data: bytes(2**24))
    monkeypatch.setattr(connections, "SLOWEST", 2**26)


@pytest.mark.parametrize("requests", [1, 3])
@pytest.mark.sampled(4)
def test_an_answer_that_is_not_read_is_given_up(start, large, requests):
    url = start(patience=0.5)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
        slow.connect((url.host, url.port))
        slow.sendall(GET % b"/client" * requests)
        time.sleep(2)  # four times as long as the patience is
        slow.settimeout(20)
        received = 0
        with contextlib.suppress(ConnectionError):
            while piece := slow.recv(2**20):
                received += len(piece)
    assert received < 2**24


def test_an_answer_that_is_read_slowly_arrives(start, large, monkeypatch):
    monkeypatch.setattr(connections, "SLOWEST", 2**20)
    url = start(patience=0.5)
    with connected(url, GET % b"/client") as slow:
        received = 0
        while received < 2**24:
            time.sleep(0.02)
            received += len(slow.recv(2**18))


@pytest.mark.slow
def test_a_request_that_runs_for_long_is_left_alone(start, client, keys, monkeypatch):
    def run_value(self, value, stored):
        time.sleep(2)
        return b"a result"

    monkeypatch.setattr(fheconv.Server, "run_value", run_value)
    url = start(patience=0.5)
    with httpx.Client(base_url=url, timeout=60) as http:
        assert http.put(f"/keys/{keys.name}", content=keys.to_bytes()).status_code == 200
        answer = http.post(f"/run/{keys.name}", content=client.encrypt(serving.images(1)).to_bytes())
    assert answer.status_code == 200


def test_a_flood_from_one_address_pushes_out_its_own_connections(start, monkeypatch):
    monkeypatch.setattr(connections, "CONNECTIONS", 20)
    url = start()
    with contextlib.ExitStack() as stack:
        mine = [stack.enter_context(connected(url, HALF, "127.0.0.2")) for _ in range(3)]
        theirs = [stack.enter_context(connected(url, HALF, "127.0.0.3")) for _ in range(100)]
        assert health(url) == "ok"
        assert not any(map(is_closed, mine))
        assert sum(map(is_closed, theirs)) > 80
        # The half of a header that one of mine has sent is still good.
        mine[0].sendall(b"Again: 1\r\n\r\n")
        assert mine[0].recv(12) == b"HTTP/1.1 200"


def test_more_requests_than_may_run_are_503_and_nobody_who_runs_is_pushed_out(
    start, client, keys, blocked, monkeypatch
):
    begun, go = blocked
    monkeypatch.setattr(connections, "CONNECTIONS", 2)
    monkeypatch.setattr("fheconv.serving.app.CONNECTIONS", 2)
    url = start()
    body = client.encrypt(serving.images(1)).to_bytes()
    assert httpx.put(url.join(f"/keys/{keys.name}"), content=keys.to_bytes()).status_code == 200
    head = f"POST /run/{keys.name} HTTP/1.1\r\nHost: me\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with connected(url, head + body) as first, connected(url, head + body) as second:
        begun.acquire()
        while httpx.get(url.join("/health")).status_code != 503:
            time.sleep(0.01)  # the second is not read yet
        go.set()
        for one in (first, second):
            assert one.recv(12) == b"HTTP/1.1 200"


@pytest.mark.slow
def test_a_circuit_runs_while_others_flood(server, client, tmp_path):
    stop = threading.Event()
    with serving.serving(server, tmp_path) as url, contextlib.ExitStack() as stack:
        address = httpx.URL(url)
        health(address)

        def flood():
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    stack.callback(connected(address, HALF).close)
                    time.sleep(0.005)

        attacker = threading.Thread(target=flood)
        attacker.start()
        try:
            remote = fheconv.RemoteCircuit(url, client)
            x = serving.images(2)
            serving.check(remote.predict(x), x)
        finally:
            stop.set()
            attacker.join()
