"""Serves circuits over HTTP (the extra `serve`).

A client sends evaluation keys once. They stay on the disk under a name that is the digest of their content.
Ciphertexts are run with the keys of a name. Everything that arrives is checked before the native library sees
a byte of it. The library runs in worker processes, so if it dies, only one request fails.

Circuits of one key set run under the same keys. A ciphertext says which circuit is to run.

Everybody who may talk to the server may run the circuits, store keys, and remove keys whose name they know.
TLS must protect the token and the ciphertexts on their way, if other machines reach the server: see `Tls`.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

from fheconv.basics.checks import check_integer, check_token
from fheconv.basics.errors import InvalidArgumentError, MissingExtraError, RemoteError
from fheconv.circuits.native.worker import Worker
from fheconv.circuits.server import KEYS_IN_MEMORY, Server
from fheconv.serving.keystore import EXPIRY, QUOTA, KeyStore
from fheconv.serving.tls import Tls

try:
    import uvicorn
    from fastapi import Depends, FastAPI
    from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

    from fheconv.serving import routes
    from fheconv.serving.admission import Limits, Pool, Refused, Service
    from fheconv.serving.connections import CONNECTIONS, Connection
    from fheconv.serving.metrics import Counting, Metrics
    from fheconv.serving.problems import HANDLERS
    from fheconv.serving.request_log import LOGGER, RequestLog, logged_as_json
    from fheconv.serving.works import Circuits
except ImportError as error:
    raise MissingExtraError(
        f'fheconv.serve needs FastAPI and uvicorn ({error}); install them with: pip install "fheconv[serve]".'
    ) from error

SWEEP_SECONDS = 3600


def application(
    server: Server | Sequence[Server],
    *,
    folder: str | Path,
    token: str | None = None,
    workers: int = 1,
    queue: int = 8,
    quota: int = QUOTA,
    expiry: float = EXPIRY,
    keys_in_memory: int = KEYS_IN_MEMORY,
    metrics: bool = False,
) -> FastAPI:
    """Return the ASGI application that serves a circuit, or several.

    Evaluation keys are stored in `folder`, at most `quota` bytes of them, and for `expiry` seconds after
    their last use. `workers` processes run ciphertexts. Each holds all circuits, and up to `keys_in_memory`
    sets of keys. `queue` requests may wait for them. Further requests are answered 429. With a `token` (one
    word of printable ASCII), every request must bear it, except those for /health and the description of the
    API. With `metrics`, /metrics tells numbers and seconds of requests, the queue and the stored keys in the
    text format of Prometheus.

    Raises `InvalidArgumentError` for invalid numbers, for a folder that cannot be used, and unless there are
    circuits that all differ.
    """
    check_integer("workers", workers, 1)
    check_integer("queue", queue, 0)
    check_integer("keys_in_memory", keys_in_memory, 1)
    if token is not None:
        check_token(token)
    circuits = _by_name(server)
    keysets = {name: one.keyset for name, one in circuits.items()}
    most = max(Limits.of(one).key_bytes for one in circuits.values())
    store = KeyStore(folder, keysets, max_bytes=most, quota=quota, expiry=expiry)
    pool = Pool(workers, queue)
    service = Service(circuits, store, pool)

    app = FastAPI(
        title="fheconv",
        description="Circuits that run on encrypted images.",
        redoc_url=None,
        lifespan=_lifespan(circuits, pool, store, keys_in_memory),
    )
    app.add_middleware(RequestLog)
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    if metrics:
        counted = Metrics()
        app.add_middleware(Counting, metrics=counted)
    guarded: Any = {"dependencies": [Depends(_guard(token))]}
    routes.describe(app, service, guarded)
    routes.store_keys(app, service, guarded)
    routes.run_circuits(app, service, guarded)
    if metrics:
        routes.tell_metrics(app, service, counted, guarded)
    return app


def _by_name(server: Server | Sequence[Server]) -> dict[str, Server]:
    """Return the circuits by their fingerprints."""
    servers = [server] if isinstance(server, Server) else list(server)
    circuits = {one.fingerprint: one for one in servers}
    if not circuits or len(circuits) < len(servers):
        raise InvalidArgumentError(
            f"There are {len(servers)} circuits to serve, and {len(circuits)} different ones; give at least "
            "one, and each once."
        )
    return circuits


def _lifespan(
    circuits: Circuits, pool: Pool, store: KeyStore, keys_in_memory: int
) -> Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]]:
    """Return a context that starts the workers before the first request and stops them after the last."""

    def copies(session: Worker) -> Circuits:
        return {name: one.beside(session, keys_in_memory) for name, one in circuits.items()}

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sessions = [Worker() for _ in range(pool.workers)]
        sweep = asyncio.ensure_future(_sweep(store))
        try:
            opened = (asyncio.to_thread(copies, session) for session in sessions)
            for held in await asyncio.gather(*opened):
                pool.add(held)
            yield
        finally:
            sweep.cancel()
            for session in sessions:
                session.stop()
            pool.close()
            store.close()

    return lifespan


def serve(
    server: Server | Sequence[Server],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    allow_remote: bool = False,
    tls: Tls | None = None,
    **options: Any,
) -> None:
    """Serve circuits until the process is told to stop. Other `options` are those of `application`.

    With `tls` the server talks https. If it has an authority, clients need a certificate of it.

    Port 0 takes any free port, and the log says which. The log is on standard error. Each of its lines is a
    JSON object, which holds no token and nothing of the bodies.

    Raises `InvalidArgumentError` like `application`, for an address that cannot be used, and, unless
    `allow_remote`, for an address that other machines can reach without a token or a certificate.
    """
    known = token is not None or (tls is not None and tls.authority is not None)
    if not known and not allow_remote and not _is_loopback(host):
        raise InvalidArgumentError(
            f"host={host!r}: whoever reaches the server could use it. Give a token, or allow it with "
            "--allow-remote (allow_remote=True)."
        )
    encrypted = {} if tls is None else tls.of_server()
    with logged_as_json():
        app = application(server, token=token, **options)
        with _listener(host, port) as listener:
            port = listener.getsockname()[1]
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            scheme = "https" if encrypted else "http"
            LOGGER.info("Serving circuit %s on %s://%s", ", ".join(_by_name(server)), scheme, address)
            _Heedful(configured(app, **encrypted)).run(sockets=[listener])


class _Heedful(uvicorn.Server):
    """Stops on signals that the process heeds. uvicorn would also take an interruption that is ignored."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        both = (signal.SIGINT, signal.SIGTERM)
        self._ignored = [one for one in both if signal.getsignal(one) is signal.SIG_IGN]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop. A shell lets processes in the background ignore Ctrl-C, and that is kept."""
        if sig not in self._ignored:
            super().handle_exit(sig, frame)


def configured(app: FastAPI, **encrypted: Any) -> uvicorn.Config:
    """Return uvicorn's configuration for an application. `encrypted` are its options for TLS."""
    return uvicorn.Config(
        app,
        **encrypted,
        log_config=None,
        access_log=False,
        server_header=False,
        http=Connection,
        ws="none",
        limit_concurrency=CONNECTIONS + 1,  # reached only when so many requests run; then it answers 503
        timeout_graceful_shutdown=routes.GRACE_SECONDS,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name; only "localhost" is known to be this machine
        return host == "localhost"


def _listener(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises `InvalidArgumentError` if the address cannot be used."""
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


async def _sweep(store: KeyStore) -> None:
    """Remove expired keys regularly, also when no requests come."""
    while True:
        await asyncio.to_thread(store.expire)
        await asyncio.sleep(SWEEP_SECONDS)
