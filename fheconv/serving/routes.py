"""Adds the routes of `fheconv.serving.app`, and describes what they take and answer."""

import asyncio
from collections.abc import Awaitable
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from fheconv.basics.errors import RemoteError
from fheconv.circuits.files.archive import client_file
from fheconv.circuits.server import Server
from fheconv.serving.admission import Refused, Service
from fheconv.serving.keystore import NAME
from fheconv.serving.metrics import MEDIA_TYPE, Metrics
from fheconv.serving.problems import Problem

T = TypeVar("T")
# The time that running requests still have when the server is told to stop.
GRACE_SECONDS = 10

Name = Annotated[str, PathParameter(pattern=f"^{NAME.pattern}$", description="The keys' SHA-256.")]
Fingerprint = Annotated[
    str | None, Query(pattern=f"^{NAME.pattern}$", description="The circuit's. Default: the first circuit.")
]
KeyId = Annotated[str, Query(max_length=200, description="The id of all keys that were made together.")]


class Health(BaseModel):
    """The state of the server: its status, and the numbers of requests that run and wait."""

    status: str
    running: int
    waiting: int


class Stored(BaseModel):
    """Evaluation keys that the server has."""

    name: str
    bytes: int


class Served(BaseModel):
    """A circuit: its manifest, its key set, and the limits of a request."""

    manifest: dict[str, Any]
    keyset: str
    limits: dict[str, int]


def _answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem} for status in (401, *statuses)}


def _binary(media_type: str) -> dict[str, Any]:
    return {"content": {media_type: {"schema": {"type": "string", "format": "binary"}}}}


_BODY = {"requestBody": {**_binary("application/octet-stream"), "required": True}}


def describe(app: FastAPI, service: Service, guarded: Any) -> None:
    """Add the routes that describe the circuits."""
    client_zips = {name: client_file(one.file) for name, one in service.circuits.items()}

    def described(server: Server) -> Served:
        limits = asdict(service.limits[server.fingerprint])
        return Served(manifest=server.manifest.to_dict(), keyset=server.keyset, limits=limits)

    @app.get("/health")
    async def health() -> Health:
        """Tell that the server works, and how busy it is."""
        return Health(
            status="ok", running=service.pool.running, waiting=service.pool.taken - service.pool.running
        )

    @app.get("/circuits", responses=_answers(), **guarded)
    async def circuits() -> list[Served]:
        """Return the descriptions of all circuits. Those with the same key set run under the same keys."""
        return [described(server) for server in service.circuits.values()]

    @app.get("/circuit", responses=_answers(404, 422), **guarded)
    async def circuit(fingerprint: Fingerprint = None) -> Served:
        """Return the description of a circuit, and the limits of a request."""
        return described(service.circuit(fingerprint))

    @app.get(
        "/client",
        response_class=Response,
        responses={200: _binary("application/zip"), **_answers(404, 422)},
        **guarded,
    )
    async def client(fingerprint: Fingerprint = None) -> Response:
        """Return client.zip, which is needed to make keys, encrypt images and decrypt results."""
        served = service.circuit(fingerprint).fingerprint
        return Response(client_zips[served], media_type="application/zip")


def store_keys(app: FastAPI, service: Service, guarded: Any) -> None:
    """Add the routes that store evaluation keys."""

    @app.get("/keys", responses=_answers(422), **guarded)
    async def mine(key_id: KeyId) -> list[Stored]:
        """Return the evaluation keys here that were made together. Their owner knows the id."""
        found = await asyncio.to_thread(service.store.of_owner, key_id)
        return [Stored(name=name, bytes=size) for name, size in found.items()]

    @app.get("/keys/{name}", responses=_answers(404, 422), **guarded)
    async def known(name: Name) -> Stored:
        """Tell if the server has these evaluation keys."""
        return Stored(name=name, bytes=service.store.size_of(name))

    @app.put(
        "/keys/{name}",
        responses=_answers(400, 408, 409, 413, 422, 429, 503, 507),
        openapi_extra=_BODY,
        **guarded,
    )
    async def send(name: Name, request: Request) -> Stored:
        """Store evaluation keys, as EvaluationKeys.to_bytes() writes them, under the digest at their end."""
        return Stored(name=name, bytes=await _until_stopped(service.receive_keys(request, name)))

    @app.delete("/keys/{name}", status_code=204, responses=_answers(404, 409, 422), **guarded)
    async def forget(name: Name) -> None:
        """Remove evaluation keys, unless a request is using them."""
        service.store.delete(name)


def run_circuits(app: FastAPI, service: Service, guarded: Any) -> None:
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


def tell_metrics(app: FastAPI, service: Service, metrics: Metrics, guarded: Any) -> None:
    """Add the route that tells how busy the server is and was."""

    @app.get("/metrics", response_class=PlainTextResponse, responses=_answers(), **guarded)
    async def told() -> Response:
        """Return the metrics in the text format of Prometheus."""
        return PlainTextResponse(metrics.text(service), media_type=MEDIA_TYPE)


async def _until_stopped(work: Awaitable[T]) -> T:
    """Wait for an answer. If the server is stopped first, tell the client to ask again."""
    try:
        return await work
    except asyncio.CancelledError:
        again = {"Retry-After": str(GRACE_SECONDS)}
        raise Refused(503, RemoteError, "The server is being stopped.", **again) from None
