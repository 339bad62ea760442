"""Encrypted images spread over the workers of a Dask cluster (the extra `distributed`).

The circuit and the keys are one piece of Dask's data, which it copies from worker to worker, once to each, also
to those that join later or replace a dead one, and forgets at the end of the call. A worker opens it when its
first image comes: it compiles the circuit in a process of the native library of its own, and gives it the
keys. Images travel with their tasks, so that another worker can take up what a dead one left.

The members of a Dask cluster trust one another: whoever reaches its scheduler can run code there. They see
ciphertexts and evaluation keys, with which nothing can be decrypted. fheconv, of the same version, must be
installed on the scheduler and the workers.
"""

import contextlib
import secrets
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, overload

from fheconv.artifacts import load_server, read_server
from fheconv.ciphertext import Ciphertext
from fheconv.errors import ArtifactError, ExecutionError, FheConvError, InvalidArgumentError, MissingExtraError
from fheconv.keys import EvaluationKeys, StoredKeys
from fheconv.manifest import Manifest
from fheconv.server import Server, check_input, check_keys
from fheconv.worker import Worker

try:
    import dask
    from distributed import Client, Future, KilledWorker, as_completed, get_worker, wait
except ImportError as error:
    raise MissingExtraError(
        f'fheconv.distributed needs Dask ({error}); install it with: pip install "fheconv[distributed]".'
    ) from error

# Under this topic of Dask's events each worker tells that it opened a circuit.
TOPIC = "fheconv"
# So many images are under way for each thread of the cluster, and so many at least: workers find the next one
# there, and the scheduler does not hold a whole batch.
AHEAD, LEAST_AHEAD = 3, 16
# What failed is tried again, elsewhere if need be: the system may have ended the native library.
RETRIES = 2


@overload
def run(
    server: Server | str | Path,
    keys: EvaluationKeys | StoredKeys,
    ciphertexts: Ciphertext,
    *,
    client: Client,
) -> Ciphertext: ...


@overload
def run(
    server: Server | str | Path,
    keys: EvaluationKeys | StoredKeys,
    ciphertexts: Iterable[Ciphertext],
    *,
    client: Client,
) -> list[Ciphertext]: ...


def run(
    server: Server | str | Path,
    keys: EvaluationKeys | StoredKeys,
    ciphertexts: Ciphertext | Iterable[Ciphertext],
    *,
    client: Client,
) -> Ciphertext | list[Ciphertext]:
    """Evaluate a saved circuit on encrypted images, on the workers of a Dask cluster.

    The arguments are those of `stream`. The result for a ciphertext is a ciphertext, as of `Server.run`; for
    several it is a list of theirs, in their order. Raises like `stream`.
    """
    results = dict(stream(server, keys, ciphertexts, client=client))
    ordered = [results[index] for index in range(len(results))]
    if not isinstance(ciphertexts, Ciphertext):
        return ordered
    values = tuple(value for result in ordered for value in result.values)
    return replace(ciphertexts, kind="output", values=values)


def stream(
    server: Server | str | Path,
    keys: EvaluationKeys | StoredKeys,
    ciphertexts: Ciphertext | Iterable[Ciphertext],
    *,
    client: Client,
) -> Iterator[tuple[int, Ciphertext]]:
    """Yield (index, result) as they finish on the workers of a Dask cluster, each index once.

    server: a `server.zip`, or what `load_server` made of it, with whose limits the workers run.
    ciphertexts: encrypted images, which are spread one by one and whose results are yielded so; or several
    ciphertexts, each of which goes to one worker. If they are an iterator, it is read no further than the
    workers need, so that they need not all be in memory.
    client: Dask's client; a cluster without workers is waited for.

    Where it is left early, or interrupted, what has not begun is cancelled. Raises `ArtifactError`, before
    anything is sent, for files, keys and ciphertexts that do not belong together, `ExecutionError` if a
    circuit fails on a worker, or too many workers die of it.
    """
    if not isinstance(client, Client) or client.asynchronous:
        raise InvalidArgumentError(
            f"client={client!r:.80}; it must be a dask.distributed.Client that is not asynchronous."
        )
    if isinstance(server, Server):
        manifest, file, config = server.manifest, server.server_file, server.config
        limits = {"time_limit": config.time_limit, "memory_limit": config.memory_limit}
    else:
        (manifest, file), limits = read_server(server), {}
    check_keys(keys, manifest.fingerprint)
    if isinstance(ciphertexts, Ciphertext):
        check_input(ciphertexts, manifest, keys.key_id)
        one = replace(ciphertexts, images=1, values=ciphertexts.values[:1])
        ciphertexts = [replace(one, values=(value,)) for value in ciphertexts.values]
    elif isinstance(ciphertexts, Sequence):
        for ciphertext in ciphertexts:
            check_input(ciphertext, manifest, keys.key_id)
    payload = keys.payload if isinstance(keys, EvaluationKeys) else keys.read()
    job = file, limits, keys.fingerprint, keys.key_id, payload, keys.name
    return _stream(client, job, manifest, ciphertexts)


class _Job:
    """What every worker needs: the circuit and the keys, as bytes where it travels, opened where it is used."""

    def __init__(
        self, file: bytes, limits: dict[str, Any], fingerprint: str, key_id: str, payload: bytes, name: str
    ) -> None:
        self._parts = file, limits, fingerprint, key_id, payload, name
        self._lock = threading.Lock()
        self._opened: tuple[Server, EvaluationKeys] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Job, self._parts

    def run(self, ciphertext: bytes) -> bytes:
        """Evaluate the circuit on a ciphertext's bytes. Raises like `Server.run`."""
        with self._lock:
            if self._opened is None:
                self._opened = self._open()
        server, keys = self._opened
        return server.run(Ciphertext.from_bytes(ciphertext), keys).to_bytes()

    def _open(self) -> tuple[Server, EvaluationKeys]:
        file, limits, fingerprint, key_id, payload, name = self._parts
        keys = EvaluationKeys(fingerprint=fingerprint, key_id=key_id, payload=payload)
        if keys.name != name:
            raise ArtifactError("The evaluation keys were damaged on their way; run it again.")
        session = Worker()
        weakref.finalize(self, session.stop)
        server = load_server(file, session=session, **limits)
        get_worker().log_event(TOPIC, {"opened": fingerprint})
        return server, keys


def _run(job: _Job, ciphertext: bytes) -> bytes:
    return job.run(ciphertext)


def _stream(
    client: Client, job_parts: tuple[Any, ...], manifest: Manifest, ciphertexts: Iterable[Ciphertext]
) -> Iterator[tuple[int, Ciphertext]]:
    name = f"fheconv-{secrets.token_hex(8)}"
    key_id = job_parts[3]
    job = _submit(client, _Job, *job_parts, key=f"{name}-circuit")
    sent: dict[Future, tuple[int, Ciphertext]] = {}
    completed = as_completed(loop=client.loop)
    waiting = enumerate(ciphertexts)

    def send() -> None:
        """Send what is to be under way beyond what is."""
        ahead = max(LEAST_AHEAD, AHEAD * sum(client.nthreads().values()))
        for index, ciphertext in islice(waiting, ahead - len(sent)):
            check_input(ciphertext, manifest, key_id)
            future = _submit(client, _run, job, ciphertext.to_bytes(), key=(name, index))
            sent[future] = index, ciphertext
            completed.add(future)

    try:
        wait([job])
        # Else all images would go to the worker that has it. If one dies meanwhile, its successor will get
        # it with its first image.
        with contextlib.suppress(Exception):
            client.replicate([job])
        send()
        while sent:
            future = next(completed)
            index, ciphertext = sent.pop(future)
            result = _result(future, index, ciphertext)
            send()
            yield index, result
    finally:
        client.cancel([job, *sent])


def _submit(client: Client, function: Any, *arguments: Any, key: Any) -> Future:
    # Dask warns of megabytes in a task. Ciphertexts are, and there they survive the worker.
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TiB"}):
        return client.submit(function, *arguments, key=key, retries=RETRIES)


def _result(future: Future, index: int, ciphertext: Ciphertext) -> Ciphertext:
    try:
        result = Ciphertext.from_bytes(future.result())
    except FheConvError:
        raise
    except KilledWorker as error:
        raise ExecutionError(
            f"{error.allowed_failures + 1} workers died, one after another, while they had ciphertext {index}. "
            "Their logs may say why: mostly memory, of which each needs room for the evaluation keys twice."
        ) from error
    except Exception as error:  # whatever Dask or a worker's Python raises; the user gets one tree of errors
        raise ExecutionError(
            f"Dask could not run ciphertext {index}: {error!r:.500}. The cluster must be alive, and its "
            "scheduler and workers need the same versions of fheconv and of what it depends on."
        ) from error
    if replace(ciphertext, kind="output", values=result.values) != result:
        raise ArtifactError(f"A worker returned for ciphertext {index} what belongs to another.")
    return result
