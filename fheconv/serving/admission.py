"""Admits, reads and runs the requests of `fheconv.serving.app`.

A request must have a place before its ciphertexts are read into memory. There are as many places as workers
and queue places together. Keys are written to the disk while they arrive.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request

from fheconv.basics.errors import ArtifactError, ExecutionError, FheConvError, RemoteError
from fheconv.circuits.ciphertext import Ciphertext
from fheconv.circuits.server import MARGIN, Server
from fheconv.serving.disk import ForeignKeys, KeysInUse, StoreFull, UnknownKeys
from fheconv.serving.keystore import KeyStore
from fheconv.serving.works import Circuits, Work, works_of

# A request's ciphertexts hold at most this many images, and fewer if they are large or take more than about a
# minute together (two cores do 10^10 of Concrete's units in a second). One image is always allowed.
MOST_IMAGES = 16
MOST_BYTES = 2**25
MOST_COMPLEXITY = 6e11
# A body may take this many seconds, and one second more for each group of this many bytes that came.
PATIENCE = 30.0
SLOWEST = 10_000
PIECE = 2**20


class Refused(Exception):
    """An error answer: its status, the class of error that a client raises, and its headers."""

    def __init__(self, status: int, error: type[FheConvError], message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.error, self.headers = status, error, headers


STATUS: dict[type[FheConvError], int] = {
    ArtifactError: 400,
    UnknownKeys: 404,
    ForeignKeys: 409,
    KeysInUse: 409,
    ExecutionError: 500,
    StoreFull: 507,
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a request: `images` in one ciphertext, the bytes of its body, and of a set of keys.

    Images that share a value of the ciphertext count as one.
    """

    images: int
    ciphertext_bytes: int
    key_bytes: int

    @classmethod
    def of(cls, server: Server) -> "Limits":
        """Return the limits that fit a circuit."""
        cost = server.cost
        fit = MOST_BYTES // (max(cost.input_bytes, cost.output_bytes) + MARGIN)
        images = max(1, min(MOST_IMAGES, fit, int(MOST_COMPLEXITY / max(cost.complexity, 1))))
        return cls(
            images=images,
            ciphertext_bytes=images * (cost.input_bytes + MARGIN) + MARGIN,
            key_bytes=cost.key_bytes + MARGIN,
        )


class Pool:
    """Workers, each with copies of the circuits, and places for the requests that use or wait for one."""

    def __init__(self, workers: int, queue: int) -> None:
        self.places = workers + queue
        self.taken = self.running = 0
        self.workers, self._seconds = workers, 0.0
        # Last in, first out: the worker that was used last probably has the keys in memory.
        self._idle: asyncio.Queue[Circuits] = asyncio.LifoQueue()
        self._threads = ThreadPoolExecutor(workers, "fheconv run")

    def add(self, circuits: Circuits) -> None:
        """Let requests use these copies, which are in one worker."""
        self._idle.put_nowait(circuits)

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Take a place while the block runs. Call it before anything is read into memory."""
        if self.taken >= self.places:
            # The time that the requests for one worker will take, if each is like the last value.
            wait = math.ceil(self._seconds * self.places / self.workers)
            raise Refused(
                429,
                RemoteError,
                f"The server is busy: all its {self.places} places are taken. Try again.",
                **{"Retry-After": str(min(max(wait, 1), 60))},
            )
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

    async def run(self, request: Request, works: Sequence[Work]) -> list[bytes]:
        """Do each work in a thread, with the circuits of a worker. All free workers take part.

        The results are those that no other work reads.

        Requests wait for one worker at a time, so those that come later get their turn between two works.
        Raises `ClientDisconnect` if the client leaves. Then the works that run are the last ones.
        """
        leaving = asyncio.ensure_future(request.receive())  # after the body only a disconnect can come
        begun: list[asyncio.Task[bytes]] = []
        last_read = {place: at for at, work in enumerate(works) for place in work.reads}
        held: dict[int, asyncio.Task[bytes]] = {}
        try:
            for at, work in enumerate(works):
                read = await asyncio.gather(*(held[place] for place in work.reads))
                circuits = await self._turn(leaving)
                self.running += not begun
                held[at] = asyncio.ensure_future(self._evaluated(circuits, work, read))
                begun = [one for one in begun if not one.done() or one.exception() is not None]
                begun.append(held[at])
                if any(one.done() and one.exception() is not None for one in begun):
                    break
                for place in work.reads:
                    if last_read[place] == at:
                        del held[place]
            return await asyncio.gather(*held.values())
        except asyncio.CancelledError:
            for one in begun:
                one.cancel()
            raise
        finally:
            leaving.cancel()
            if begun:
                await asyncio.gather(*begun, return_exceptions=True)
                self.running -= 1

    async def _evaluated(self, circuits: Circuits, work: Work, read: list[bytes]) -> bytes:
        started = time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, work.evaluate, circuits, read)
        finally:
            self._seconds = time.monotonic() - started
            self._idle.put_nowait(circuits)

    async def _turn(self, leaving: "asyncio.Future[Any]") -> Circuits:
        turn = asyncio.ensure_future(self._idle.get())
        try:
            await asyncio.wait({turn, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                raise ClientDisconnect
            return turn.result()
        except BaseException:
            if turn.done() and not turn.cancelled():
                self._idle.put_nowait(turn.result())
            turn.cancel()
            raise

    def close(self) -> None:
        """Wait for the threads, whose workers have been stopped."""
        self._threads.shutdown()


async def _pieces(request: Request, most: int) -> AsyncIterator[bytes]:
    """Yield a body of at most `most` bytes while it arrives. Refuse it if it comes too slowly."""
    too_large = Refused(413, ArtifactError, f"The body has more bytes than the {most:,} that fit here.")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and (len(declared) > len(str(most)) or int(declared) > most):
        raise too_large
    received, start = 0, time.monotonic()
    stream = request.stream()
    while True:
        deadline = start + PATIENCE + received / SLOWEST
        try:
            piece = await asyncio.wait_for(anext(stream), deadline - time.monotonic())
        except TimeoutError:
            raise Refused(
                408, RemoteError, f"The body came too slowly: {received:,} bytes. Send it again."
            ) from None
        if not piece:
            return
        received += len(piece)
        if received > most:
            raise too_large
        yield piece


class Service:
    """Does the work of the routes."""

    def __init__(self, circuits: Circuits, store: KeyStore, pool: Pool) -> None:
        self.circuits, self.store, self.pool = circuits, store, pool
        self.limits = {name: Limits.of(server) for name, server in circuits.items()}
        self._most_bytes = max(limits.ciphertext_bytes for limits in self.limits.values())
        self._uploads = 0

    def circuit(self, fingerprint: str | None) -> Server:
        """Return the circuit of a fingerprint, by default the first. Refuse what is not served."""
        if fingerprint is None:
            return next(iter(self.circuits.values()))
        if fingerprint not in self.circuits:
            served = ", ".join(f"{name:.12}" for name in self.circuits)
            raise Refused(
                404, ArtifactError, f"Here is no circuit {fingerprint:.64}; the server serves {served}."
            )
        return self.circuits[fingerprint]

    async def receive_keys(self, request: Request, name: str) -> int:
        """Store the keys of a body under their name, and return how many bytes they take."""
        if self._uploads >= self.pool.places:
            raise Refused(
                429, RemoteError, "The server is busy with other uploads. Try again.", **{"Retry-After": "5"}
            )
        self._uploads += 1
        try:
            with self.store.receive() as upload:
                async for piece in _gathered(_pieces(request, self.store.max_bytes)):
                    await asyncio.to_thread(upload.feed, piece)
                await asyncio.to_thread(upload.keep, name)
        finally:
            self._uploads -= 1
        return self.store.size_of(name)

    async def run(self, request: Request, name: str) -> bytes:
        """Run the ciphertext of a body with the keys of that name."""
        with self.pool.place(), contextlib.ExitStack() as used:
            keys = await asyncio.to_thread(used.enter_context, self.store.use(name))
            body = b"".join([piece async for piece in _pieces(request, self._most_bytes)])
            ciphertext = await asyncio.to_thread(self._read, body)
            del body

            if keys.key_id != ciphertext.key_id:
                raise Refused(
                    409, ArtifactError, "The ciphertext was made with other keys than it comes for."
                )

            server = self.circuits[ciphertext.fingerprint]
            server.check(ciphertext, keys)
            values = await self.pool.run(request, works_of(server, ciphertext, keys))
            return await asyncio.to_thread(ciphertext.with_results(values).to_bytes)

    def _read(self, body: bytes) -> Ciphertext:
        ciphertext = Ciphertext.from_bytes(body, max_bytes=self._most_bytes)
        if ciphertext.fingerprint not in self.circuits:
            raise Refused(409, ArtifactError, "The ciphertext belongs to another circuit than the server's.")
        limits, images = self.limits[ciphertext.fingerprint], len(ciphertext.values)
        if images > limits.images or len(body) > limits.ciphertext_bytes:
            raise Refused(
                413,
                ArtifactError,
                f"The ciphertext has {images} images in {len(body):,} bytes; send at most {limits.images} "
                f"images in {limits.ciphertext_bytes:,} bytes to this circuit.",
            )
        return ciphertext


async def _gathered(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the same bytes in larger pieces."""
    gathered = bytearray()
    async for piece in pieces:
        gathered += piece
        if len(gathered) >= PIECE:
            yield bytes(gathered)
            gathered.clear()
    yield bytes(gathered)
