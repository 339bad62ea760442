"""A server of one circuit over HTTP (the extra `serve`).

Evaluation keys come once and stay on the disk, by the name that their content has; ciphertexts are run with
the keys of a name. Whatever arrives is checked before the native library sees a byte of it, and the library
lives in worker processes: what makes it die costs one request.

Whoever may talk to the server may run the circuit, store keys, and remove those whose name they know. What
guards the token, and the ciphertexts on their way, is TLS: put a proxy that speaks it before a server that
other machines reach.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fheconv.basics.checks import check_integer, check_token
from fheconv.basics.errors import InvalidArgumentError, MissingExtraError, RemoteError
from fheconv.circuits.files.archive import client_file
from fheconv.circuits.native.worker import Worker
from fheconv.circuits.server import KEYS_IN_MEMORY, Server
from fheconv.serving.keystore import EXPIRY, NAME, QUOTA, KeyStore

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Request, Response
    from fastapi import Path as PathParameter
    from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
    from pydantic import BaseModel

    from fheconv.serving.admission import Limits, Pool, Refused, Service
    from fheconv.serving.problems import HANDLERS, Problem
    from fheconv.serving.request_log import LOGGER, RequestLog, log_as_json
except ImportError as error:
    raise MissingExtraError(
        f'fheconv.serve needs FastAPI and uvicorn ({error}); install them with: pip install "fheconv[serve]".'
    ) from error

# How long requests that have begun may take when the server is told to stop.
GRACE_SECONDS = 10
# More connections at once are answered 503 before anything of them is read.
CONNECTIONS = 256
SWEEP_SECONDS = 3600
T = TypeVar("T")

Name = Annotated[str, PathParameter(pattern=f"^{NAME.pattern}$", description="The keys' SHA-256.")]


class Health(BaseModel):
    """Whether the server works, how many requests run and how many wait."""

    status: str
    running: int
    waiting: int


class Stored(BaseModel):
    """Keys that are here."""

    name: str
    bytes: int


def _answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem} for status in (401, *statuses)}


def _binary(media_type: str) -> dict[str, Any]:
    return {"content": {media_type: {"schema": {"type": "string", "format": "binary"}}}}


_BODY = {"requestBody": {**_binary("application/octet-stream"), "required": True}}


def application(
    server: Server,
    *,
    folder: str | Path,
    token: str | None = None,
    workers: int = 1,
    queue: int = 8,
    quota: int = QUOTA,
    expiry: float = EXPIRY,
    keys_in_memory: int = KEYS_IN_MEMORY,
) -> FastAPI:
    """Return the ASGI application that serves a circuit.

    Evaluation keys are stored in `folder`, together at most `quota` bytes, and for `expiry` seconds after
    they were last used. `workers` processes run ciphertexts, each with up to `keys_in_memory` sets of keys;
    `queue` requests may wait for them, further ones are answered 429. With a `token`, every request but
    those for /health and the description of the API must bear it: one word of printable ASCII.

    Raises `InvalidArgumentError` for numbers without a meaning, and a folder that cannot be used.
    """
    check_integer("workers", workers, 1)
    check_integer("queue", queue, 0)
    check_integer("keys_in_memory", keys_in_memory, 1)
    if token is not None:
        check_token(token)
    limits = Limits.of(server)
    store = KeyStore(folder, server.fingerprint, max_bytes=limits.key_bytes, quota=quota, expiry=expiry)
    pool = Pool(workers, queue)
    service = Service(server.fingerprint, store, limits, pool)

    app = FastAPI(
        title="fheconv",
        description="A circuit that runs on encrypted images.",
        redoc_url=None,
        lifespan=_lifespan(server, pool, store, keys_in_memory),
    )
    app.add_middleware(RequestLog)
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    guarded: Any = {"dependencies": [Depends(_guard(token))]}
    _describe(app, server, service, guarded)
    _store_keys(app, service, guarded)
    _run(app, service, guarded)
    return app


def _lifespan(
    server: Server, pool: Pool, store: KeyStore, keys_in_memory: int
) -> Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]]:
    """Return what starts the workers before the first request, and stops them after the last."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sessions = [Worker() for _ in range(pool.workers)]
        sweep = asyncio.ensure_future(_sweep(store))
        try:
            opened = (asyncio.to_thread(server.beside, session, keys_in_memory) for session in sessions)
            for copy in await asyncio.gather(*opened):
                pool.add(copy)
            yield
        finally:
            sweep.cancel()
            for session in sessions:
                session.stop()
            pool.close()
            store.close()

    return lifespan


def _describe(app: FastAPI, server: Server, service: Service, guarded: Any) -> None:
    """Add the routes that say what the circuit is."""
    client_zip = client_file(server.file)

    @app.get("/health")
    async def health() -> Health:
        """Say that the server works, and how busy it is."""
        return Health(
            status="ok", running=service.pool.running, waiting=service.pool.taken - service.pool.running
        )

    @app.get("/circuit", responses=_answers(), **guarded)
    async def circuit() -> dict[str, Any]:
        """Return what the circuit is, and what a request may be."""
        return {"manifest": server.manifest.to_dict(), "limits": asdict(service.limits)}

    @app.get(
        "/client",
        response_class=Response,
        responses={200: _binary("application/zip"), **_answers()},
        **guarded,
    )
    async def client() -> Response:
        """Return client.zip, with which keys are made, images encrypted and results decrypted."""
        return Response(client_zip, media_type="application/zip")


def _store_keys(app: FastAPI, service: Service, guarded: Any) -> None:
    """Add the routes that store evaluation keys."""

    @app.get("/keys/{name}", responses=_answers(404, 422), **guarded)
    async def known(name: Name) -> Stored:
        """Say whether evaluation keys are here."""
        return Stored(name=name, bytes=service.store.size_of(name))

    @app.put(
        "/keys/{name}",
        responses=_answers(400, 408, 409, 413, 422, 429, 503, 507),
        openapi_extra=_BODY,
        **guarded,
    )
    async def send(name: Name, request: Request) -> Stored:
        """Store evaluation keys, as EvaluationKeys.to_bytes() writes them, by the digest they end with."""
        return Stored(name=name, bytes=await _until_stopped(service.receive_keys(request, name)))

    @app.delete("/keys/{name}", status_code=204, responses=_answers(404, 409, 422), **guarded)
    async def forget(name: Name) -> None:
        """Remove evaluation keys that nothing runs with."""
        service.store.delete(name)


def _run(app: FastAPI, service: Service, guarded: Any) -> None:
    """Add the route that runs ciphertexts."""

    @app.post(
        "/run/{name}",
        response_class=Response,
        responses={
            200: _binary("application/octet-stream"),
            **_answers(400, 404, 408, 409, 413, 422, 429, 500, 503),
        },
        openapi_extra=_BODY,
        **guarded,
    )
    async def run(name: Name, request: Request) -> Response:
        """Run a ciphertext, as Ciphertext.to_bytes() writes it, with the evaluation keys of that name."""
        results = await _until_stopped(service.run(request, name))
        return Response(results, media_type="application/octet-stream")


def serve(
    server: Server,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    allow_remote: bool = False,
    **options: Any,
) -> None:
    """Serve a circuit until the process is told to stop. Other `options` are those of `application`.

    Port 0 takes any that is free; the log says which. Each line of the log, on standard error, is a JSON
    object; it holds nothing of bodies and no token.

    Raises `InvalidArgumentError` like `application`, for an address that cannot be had, and, unless
    `allow_remote`, for one that other machines reach without a token.
    """
    if token is None and not allow_remote and not _is_loopback(host):
        raise InvalidArgumentError(
            f"host={host!r}: whoever reaches the server could use it. Give a token, or allow it with "
            "--allow-remote (allow_remote=True)."
        )
    app = application(server, token=token, **options)
    log_as_json()
    with _listener(host, port) as listener:
        port = listener.getsockname()[1]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        LOGGER.info("Serving circuit %s on http://%s", server.fingerprint, address)
        uvicorn.Server(configured(app)).run(sockets=[listener])


def configured(app: FastAPI) -> uvicorn.Config:
    """Return how uvicorn serves an application."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, of which one alone is known to be this machine's
        return host == "localhost"


def _listener(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises `InvalidArgumentError` if there is none to be had."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family)
    except (OSError, OverflowError) as error:
        raise InvalidArgumentError(f"The server cannot listen on {host}, port {port}: {error}.") from error


def _guard(token: str | None) -> Callable[..., Awaitable[None]]:
    """Return a dependency that refuses requests without the token."""
    scheme = HTTPBearer(auto_error=False)

    async def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(scheme)]) -> None:
        if token is None:
            return
        if given is None or not hmac.compare_digest(given.credentials.encode(), token.encode()):
            wants = {"WWW-Authenticate": "Bearer"}
            raise Refused(401, RemoteError, "The server asks for a token, and this is not it.", **wants)

    return check


async def _until_stopped(work: Awaitable[T]) -> T:
    """Wait for an answer; tell the client to ask again if the server is stopped before there is one."""
    try:
        return await work
    except asyncio.CancelledError:
        again = {"Retry-After": str(GRACE_SECONDS)}
        raise Refused(503, RemoteError, "The server is being stopped.", **again) from None


async def _sweep(store: KeyStore) -> None:
    """Remove expired keys where no request does."""
    while True:
        await asyncio.to_thread(store.expire)
        await asyncio.sleep(SWEEP_SECONDS)
