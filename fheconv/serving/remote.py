"""Runs a circuit behind a URL. This is the client side; the server side is `fheconv.serving.app`."""

import logging
import random
import time
import weakref
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from fheconv.basics.arrays import Shape
from fheconv.basics.checks import check_integer, check_number, check_token
from fheconv.basics.errors import (
    ArtifactError,
    ExecutionError,
    FheConvError,
    InvalidArgumentError,
    MissingExtraError,
    RemoteError,
)
from fheconv.basics.progress import track, track_bytes
from fheconv.circuits.ciphertext import OTHER_KEYS, Ciphertext
from fheconv.circuits.client import Client, Evaluator, load_client
from fheconv.circuits.files.archive import MOST_BYTES
from fheconv.circuits.files.manifest import Manifest
from fheconv.circuits.files.plain import read_json
from fheconv.circuits.server import MARGIN
from fheconv.serving.tls import Tls, failure

try:
    import httpx
except ImportError as error:
    raise MissingExtraError(
        f'fheconv.RemoteCircuit needs httpx ({error}); install it with: pip install "fheconv[serve]".'
    ) from error

LOGGER = logging.getLogger(__name__)
RETRIES = 8
# The retries if a server that has never answered cannot be reached: then the URL is probably wrong.
FIRST_RETRIES = 2
# Seconds to wait without a sign of life from the server. An image of a large network takes minutes.
TIMEOUT = 600.0
# Seconds to wait for a connection, and for the answer to a question that needs no work.
CONNECT_TIMEOUT, ANSWER_TIMEOUT = 5.0, 20.0
# A server that wants a certificate hangs up on those who have none.
TRUST = (
    "RemoteCircuit(…, tls=fheconv.Tls(…)) takes the authority that signed the server's certificate, and a "
    "certificate of your own if the server wants one."
)
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0
_MOST_JSON = 2**24


class RemoteCircuit(Client):
    """A circuit that runs at `url`, where `fheconv serve` serves it. Its keys stay here.

    `client` is the circuit's `client.zip`, or a `fheconv.Client`, whose keys it then shares. If the server
    has several circuits, `fheconv.load_client(…, keys_of=)` gives the client of another one the same keys.
    Without `client`, the `client.zip` of the first circuit is fetched from the server. Then the server
    chooses the parameters of the encryption, and could choose some that protect nothing. Do this only if you
    trust the server. Otherwise get `client.zip` from the person who compiled it.

    `token` is the token that the server asks for. Send it to https only, unless the server is on this
    machine. `tls` holds the authority that signed the server's certificate, if it is one of your own, and
    your certificate, if the server asks for it. If a request finds no server, or a busy one, it is repeated
    up to `retries` times. The wait is as long as the server says, or gets longer each time. A server that
    has never answered is tried three times only, which takes seconds. A request fails after `timeout`
    seconds without a sign of life. Each retry is logged as a warning of the logger
    `fheconv.serving.remote`. Python prints it on standard error.

    Raises `RemoteError` if there is no such server, `ArtifactError` if it serves another circuit than that of
    `client`, `InvalidArgumentError` for an invalid URL, token or number.

    Example:
        >>> circuit = RemoteCircuit("http://localhost:8000", "client.zip")  # doctest: +SKIP
        >>> circuit.keygen()  # doctest: +SKIP
        >>> circuit.predict(image)  # doctest: +SKIP
    """

    def __init__(
        self,
        url: str,
        client: str | Path | Client | None = None,
        *,
        token: str | None = None,
        retries: int = RETRIES,
        timeout: float = TIMEOUT,
        tls: Tls | None = None,
    ) -> None:
        check_integer("retries", retries, 0)
        check_number("timeout", timeout, 0)
        self._retries = retries
        self._uploaded: tuple[str, str] | None = None  # a key set and its name at the server
        self._timeout, self._answered = timeout, False
        headers = {}
        if token is not None:
            check_token(token)
            headers["Authorization"] = f"Bearer {token}"
        try:
            address = httpx.URL(url)
        except (httpx.InvalidURL, TypeError) as error:
            raise InvalidArgumentError(f"url={url!r:.200} is none: {error}.") from error
        if address.scheme not in ("http", "https") or not address.host:
            raise InvalidArgumentError(f"url={url!r:.200} must be http://host:port, or https.")
        verify = True if tls is None else tls.context()
        self._http = httpx.Client(base_url=address, headers=headers, verify=verify)
        weakref.finalize(self, self._http.close)
        if client is not None and not isinstance(client, Client):
            client = load_client(client)
        manifest, self._images = self._circuit(None if client is None else client.fingerprint)
        if client is None:
            client = load_client(self._request("GET", "/client", most=MOST_BYTES))
        if client.manifest.format != manifest.format:
            raise ArtifactError(
                f"{url} serves a circuit of file format {manifest.format}, and the client is of format "
                f"{client.manifest.format}. Since format 2 the fingerprint covers how results are read, so "
                "keys and ciphertexts of the two do not go together. Get the client.zip that was saved with "
                "the server's server.zip."
            )
        if client.fingerprint != manifest.fingerprint:
            raise ArtifactError(
                f"{url} serves the circuit {manifest.fingerprint}, and the client is of "
                f"{client.fingerprint}; get the client.zip that was saved with the server's server.zip."
            )
        self.manifest = client.manifest
        self._share_circuit_of(client)

    def _described(self) -> tuple[Shape, Shape, list[tuple[str, str]]]:
        inputs, outputs, rows = super()._described()
        return inputs, outputs, [("url", str(self._http.base_url.copy_with(userinfo=b""))), *rows]

    def run(self, ciphertext: Ciphertext) -> Ciphertext:
        """Evaluate the circuit on encrypted images at the server. Send the evaluation keys if it lacks them.

        Raises `ArtifactError` for a ciphertext of another circuit or key set, found here or by the server,
        and for results that do not belong to these images. Raises `ExecutionError` if the evaluation fails,
        `RemoteError` if there is no answer after all retries.
        """
        with self._lock:
            self._one.check(ciphertext, "input", "run")
        values = ciphertext.values
        if values:
            self._name_at_server(ciphertext.key_id)  # before the images' progress bar, because it has its own
        starts = range(0, len(values), self._images)
        results: list[bytes] = []
        for start in track(starts, "Running on encrypted images…"):
            results += self._run(ciphertext.part(start, start + self._images, self.manifest.lanes))
        return ciphertext.with_results(results)

    def _run_at(self, server: Evaluator | None, ciphertext: Ciphertext) -> Ciphertext:
        if server is not None:
            raise InvalidArgumentError(f"server={server!r:.100}; images run at the URL, so leave it out.")
        return self.run(ciphertext)

    def _circuit(self, fingerprint: str | None) -> tuple[Manifest, int]:
        """Return the manifest of a circuit, and how many images the server takes at a time.

        Without that circuit, or without a `fingerprint`, it is the server's first.
        """
        try:
            answer = self._request("GET", "/circuit" + (f"?fingerprint={fingerprint}" if fingerprint else ""))
        except _Unknown:
            answer = self._request("GET", "/circuit")
        try:
            read = read_json(answer, "its answer", _MOST_JSON)
            described, images = read["manifest"], read["limits"]["images"]
            if type(images) is not int or images < 1:
                raise ValueError(f"it takes {images!r} images at a time")
        except (ArtifactError, ValueError, LookupError, TypeError) as error:
            raise RemoteError(
                f"{self._http.base_url} is no server of fheconv: {error!r:.200}. Check the URL."
            ) from error
        return Manifest.from_dict(described), images

    def _run(self, ciphertext: Ciphertext) -> tuple[bytes, ...]:
        """Return the results of as many images as the server takes at a time."""
        most = len(ciphertext.values) * (self.cost.output_bytes + MARGIN) + MARGIN
        body = ciphertext.to_bytes()
        for last in (False, True):
            name = self._name_at_server(ciphertext.key_id)
            try:
                answer = self._request("POST", f"/run/{name}", content=body, most=most)
                break
            except _Unknown:  # in the meantime they expired there, or were removed
                self._uploaded = None
                if last:
                    raise
        results = Ciphertext.from_bytes(answer, max_bytes=most)
        if not results.answers(ciphertext):
            raise ArtifactError(
                "The server's answer is not the results of the images that were sent: they have another "
                "circuit, key set or number. Do not decrypt what it returns."
            )
        return results.values

    def _name_at_server(self, key_id: str) -> str:
        """Return the server's name for the evaluation keys. Send them if the server does not have them."""
        uploaded = self._uploaded
        if uploaded is not None and uploaded[0] == key_id:
            return uploaded[1]
        keys = self.evaluation_keys
        if keys.key_id != key_id:
            raise ArtifactError(OTHER_KEYS)
        chunks = list(keys.chunks())
        name = chunks[-1].hex()
        try:
            self._request("GET", f"/keys/{name}")
        except _Unknown:
            self._request("PUT", f"/keys/{name}", content=chunks)
        self._uploaded = key_id, name
        return name

    def _request(
        self, method: str, path: str, *, content: bytes | Sequence[bytes] = b"", most: int = _MOST_JSON
    ) -> bytes:
        """Return the answer to a request, at most `most` bytes. Repeat the request if that may help.

        Raises the error that the server names, or `RemoteError`.
        """
        started = time.monotonic()
        for attempt in range(1, self._retries + 2):
            wait = min(_FIRST_WAIT * 2 ** (attempt - 1), _LONGEST_WAIT) * random.uniform(0.5, 1)  # noqa: S311
            attempts = self._retries + 1
            try:
                with self._stream(method, path, content) as response:
                    answer = self._read(response, most)
                self._answered = True
                if response.is_success:
                    return answer
                problem = _problem(response, answer)
                if response.status_code not in (408, 429, 503):
                    raise problem
                after = response.headers.get("Retry-After", "")
                if after.isascii() and after.isdigit():
                    wait = min(float(after), _LONGEST_WAIT)
            except httpx.RequestError as error:
                if (failed := failure(error)) is not None:
                    raise RemoteError(
                        f"{self._http.base_url} and this machine do not agree on TLS: {failed}. {TRUST}"
                    ) from error
                said = str(error) or type(error).__name__
                problem = RemoteError(f"{method} {path} at {self._http.base_url} has no answer: {said}.")
                problem.__cause__ = error
                if not self._answered:
                    attempts = min(attempts, FIRST_RETRIES + 1)
            if attempt >= attempts:
                break
            LOGGER.warning("%s Attempt %d of %d follows in %.1f s.", problem, attempt + 1, attempts, wait)
            time.sleep(wait)
        trust = f" {TRUST}" if self._http.base_url.scheme == "https" and not self._answered else ""
        tried = f"{attempt} attempt{'s' if attempt > 1 else ''} in {time.monotonic() - started:.0f} s"
        raise RemoteError(
            f"{problem} Given up after {tried}; check the URL and that the server runs.{trust}"
        ) from problem

    def _stream(
        self, method: str, path: str, content: bytes | Sequence[bytes]
    ) -> AbstractContextManager[httpx.Response]:
        """Send a request. Show a progress bar for chunks of `content`."""
        body: bytes | Iterable[bytes] = content
        headers = {}
        if not isinstance(content, bytes):
            body = track_bytes(content, "Sending evaluation keys…")
            headers = {"Content-Length": str(sum(map(len, content)))}
        seconds = min(self._timeout, ANSWER_TIMEOUT) if method == "GET" else self._timeout
        timeout = httpx.Timeout(seconds, connect=min(seconds, CONNECT_TIMEOUT))
        return self._http.stream(method, path, content=body, headers=headers, timeout=timeout)

    def _read(self, response: httpx.Response, most: int) -> bytes:
        answer = bytearray()
        for piece in response.iter_bytes():
            answer += piece
            if len(answer) > most:
                raise ArtifactError(
                    f"The server's answer has more than the {most:,} bytes that it could have; it is not one "
                    "of this circuit's."
                )
        return bytes(answer)


class _Unknown(ArtifactError):
    """The server has no keys of that name."""


def _problem(response: httpx.Response, answer: bytes) -> FheConvError:
    """Return the error that an error answer describes."""
    try:
        read = read_json(answer, "its answer", _MOST_JSON)
        name, message = str(read["error"]), str(read["message"])[:2000]
    except (ArtifactError, LookupError, TypeError):
        name, message = "", f"it answered {response.status_code} to {response.request.method}"
    message = f"The server says: {message}"
    if response.status_code == 404 and name == ArtifactError.__name__:
        return _Unknown(message)
    return {kind.__name__: kind for kind in (ArtifactError, ExecutionError)}.get(name, RemoteError)(message)
