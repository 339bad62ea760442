"""Turns errors into answers: a status, the class of fheconv's error that a client raises, and a message."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fheconv.basics.errors import FheConvError
from fheconv.serving.admission import STATUS, Refused


class Problem(BaseModel):
    """An error answer: the class of fheconv's error that a client raises, and its message."""

    error: str
    message: str


def _problem(status: int, error: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    content = Problem(error=error, message=message).model_dump()
    return JSONResponse(content, status, headers=None if headers is None else dict(headers))


async def _refused(_: Request, error: Any) -> Response:
    return _problem(error.status, error.error.__name__, str(error), error.headers)


async def _ours(_: Request, error: Exception) -> Response:
    kinds = type(error).__mro__
    status = next((STATUS[kind] for kind in kinds if kind in STATUS), 500)
    public = next(kind for kind in kinds if kind.__module__ == FheConvError.__module__)
    return _problem(status, public.__name__, str(error))


async def _bad_name(_: Request, error: Any) -> Response:
    return _problem(
        422, "ArtifactError", "A name of keys, or a fingerprint, is 64 hexadecimal digits, in small letters."
    )


async def _http(_: Request, error: Any) -> Response:
    return _problem(error.status_code, "RemoteError", str(error.detail), error.headers)


async def _gone(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # the client has left; only the log reads it


async def _unforeseen(_: Request, error: Exception) -> Response:
    return _problem(500, "RemoteError", "The server failed; its log says why.")


HANDLERS: dict[type[Exception], Callable[[Request, Any], Awaitable[Response]]] = {
    Refused: _refused,
    FheConvError: _ours,
    RequestValidationError: _bad_name,
    HTTPException: _http,
    ClientDisconnect: _gone,
    Exception: _unforeseen,
}
