"""Limits the time and the number of connections on which no request has come yet.

uvicorn has a time limit only between requests, while nothing at all comes. A client that sends half a
request, or a byte now and then, or that does not read its answer, would keep its connection for ever.
"""

import asyncio
from collections import Counter
from collections.abc import Collection

from uvicorn.protocols.http.h11_impl import H11Protocol

from fheconv.serving.admission import SLOWEST
from fheconv.serving.request_log import LOGGER

# The most connections at once. When there are more, one that waits for its client is closed.
CONNECTIONS = 256
# The seconds for the first line and the headers of a request, and for an answer to be read. An answer has one
# second more for each group of `SLOWEST` bytes.
PATIENCE = 10.0


class Connection(H11Protocol):
    """A connection that is closed when its client lets it wait for too long.

    It waits for its client until all headers of a request are there, and while its answer is not read. While
    a request runs it does not wait, and the time that a body may take is up to `fheconv.serving.admission`.
    """

    _timer: asyncio.TimerHandle | None = None
    _since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._update()
        _make_room(self, [one for one in self.connections if isinstance(one, Connection)])

    def data_received(self, data: bytes) -> None:
        """Take bytes. Stop waiting if they complete the headers of a request."""
        super().data_received(data)
        self._update()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        super().on_response_complete()
        self._update(anew=True)

    def pause_writing(self) -> None:
        """Begin to wait for the client to read."""
        super().pause_writing()
        self._update()

    def resume_writing(self) -> None:
        """Stop waiting for the client to read."""
        super().resume_writing()
        self._update()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting for good."""
        super().connection_lost(exc)
        self._stop()

    @property
    def waits(self) -> bool:
        """True if it is the client's turn."""
        return self._timer is not None

    @property
    def address(self) -> str:
        """The client's address, without the port."""
        return self.client[0] if self.client else ""

    def give_up(self, why: str) -> None:
        """Close the connection at once, whatever has not been sent."""
        LOGGER.info("A connection of %s is closed: %s.", self.address, why)
        self._stop()
        self.connections.discard(self)
        self.transport.abort()

    def _update(self, *, anew: bool = False) -> None:
        runs = self.cycle is not None and not self.cycle.response_complete
        waits = not runs or self.flow.write_paused
        if anew or not waits:
            self._stop()
        if waits and self._timer is None:
            seconds = PATIENCE + self.transport.get_write_buffer_size() / SLOWEST
            self._since = self.loop.time()
            self._timer = self.loop.call_later(seconds, self.give_up, "its client was too slow")

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _make_room(new: Connection, connections: Collection[Connection]) -> None:
    """If there are too many connections, close another one that waits.

    It is one of the client that has most of them, so that no client can push out the others. Of these it is
    the one that has waited longest, so that those who flood push out their own connections.
    """
    waiting = [one for one in connections if one.waits and one is not new]
    if len(connections) > CONNECTIONS and waiting:
        held = Counter(one.address for one in waiting)
        min(waiting, key=lambda one: (-held[one.address], one._since)).give_up("there are too many")
