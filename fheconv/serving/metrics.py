"""Counts requests, and tells the state of the server in the text format of Prometheus."""

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fheconv.serving.admission import Service

MEDIA_TYPE = "text/plain; version=0.0.4"
# Names that are counted for themselves. A stranger may ask for any others, which all are "other".
ROUTES = frozenset({"circuit", "circuits", "client", "health", "keys", "metrics", "run"})
METHODS = frozenset({"DELETE", "GET", "POST", "PUT"})


class Metrics:
    """The number of requests and their seconds, by method, route and status.

    The route is the first word of the path. So no name of keys is among the metrics.

    Example:
        >>> metrics = Metrics()
        >>> metrics.count("POST", "/run/abc", 200, 1.5)
        >>> metrics.requests
        Counter({('POST', 'run', 200): 1})
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, int]] = Counter()
        self.seconds: defaultdict[tuple[str, str, int], float] = defaultdict(float)

    def count(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        route = path.strip("/").partition("/")[0]
        kind = (method if method in METHODS else "other", route if route in ROUTES else "other", status)
        self.requests[kind] += 1
        self.seconds[kind] += seconds

    def text(self, service: Service) -> str:
        """Return all metrics, with the present state of the service."""
        pool, (keys, key_bytes) = service.pool, service.store.held()
        lines: list[str] = []
        counters: tuple[tuple[str, str, Mapping[tuple[str, str, int], float]], ...] = (
            ("requests_total", "Requests that were answered.", self.requests),
            ("request_seconds_total", "Seconds that requests took.", self.seconds),
        )
        for name, what, values in counters:
            lines += _heading(name, what, "counter")
            for (method, route, status), value in sorted(values.items()):
                labels = f'method="{method}",route="{route}",status="{status}"'
                lines.append(f"fheconv_{name}{{{labels}}} {value}")
        for name, what, number in (
            ("running", "Requests whose images run.", pool.running),
            ("waiting", "Requests that wait for a worker.", pool.taken - pool.running),
            ("places", "Requests that may run or wait at once.", pool.places),
            ("keys", "Sets of evaluation keys that are stored.", keys),
            ("key_bytes", "Bytes of stored evaluation keys.", key_bytes),
        ):
            lines += [*_heading(name, what, "gauge"), f"fheconv_{name} {number}"]
        return "\n".join(lines) + "\n"


def _heading(name: str, what: str, kind: str) -> list[str]:
    return [f"# HELP fheconv_{name} {what}", f"# TYPE fheconv_{name} {kind}"]


class Counting:
    """Counts each request of an application."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and count it when it is answered or has failed."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, seen = time.monotonic(), dict[str, Any](status=500)

        async def sending(message: Message) -> None:
            seen["status"] = message.get("status", seen["status"])
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            self._metrics.count(scope["method"], scope["path"], seen["status"], time.monotonic() - started)
