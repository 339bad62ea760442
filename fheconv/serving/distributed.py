"""Runs encrypted images on the workers of a Dask cluster (the extra `distributed`).

The circuit and the keys are one piece of Dask's data, the job. Dask copies it from worker to worker, once to
each, also to workers that join later or replace a dead one. Dask forgets it at the end of the call. A worker
opens the job when its first image comes: it compiles the circuit in its own process of the native library,
and gives it the keys. It keeps its last job open for five minutes, for the next call. Images travel with
their tasks, so another worker can run those of a dead one. Of a circuit in stages, one image is spread over
the workers (`fheconv.serving.spreading`).

The members of a Dask cluster must trust one another: everybody who reaches its scheduler can run code there.
They see ciphertexts and evaluation keys, which cannot decrypt anything. The scheduler and the workers need
the same version of fheconv.
"""

import contextlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, overload

from fheconv.basics.errors import (
    ArtifactError,
    ExecutionError,
    FheConvError,
    InvalidArgumentError,
    MissingExtraError,
)
from fheconv.basics.progress import Counter, counting
from fheconv.circuits.ciphertext import Ciphertext
from fheconv.circuits.files.archive import read_server
from fheconv.circuits.files.identity import keyset_of
from fheconv.circuits.keys import EvaluationKeys, StoredKeys
from fheconv.circuits.server import Server, check_input, check_keys
from fheconv.lowering.blocks import Block, blocks_of
from fheconv.serving.spreading import spread

try:
    import dask
    from distributed import Client, Future, KilledWorker, as_completed, wait

    from fheconv.serving.jobs import Job, job_name, named_job
except ImportError as error:
    raise MissingExtraError(
        f'fheconv.distributed needs Dask ({error}); install it with: pip install "fheconv[distributed]".'
    ) from error

# The number of images under way for each thread of the cluster, and the least number in all. So the next
# image is ready for a worker, and the scheduler does not hold a whole batch.
AHEAD, LEAST_AHEAD = 3, 16
# The same for images that are spread over all workers: the second fills the gaps that the first leaves.
SPREAD_AHEAD = 2
# The number of times that a failed task is tried again, perhaps on another worker: the system may have ended
# the native library.
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

    The arguments are those of `stream`. For one ciphertext, the result is a ciphertext, as from `Server.run`.
    For several, it is a list of results in the same order. A bar shows how many images have finished, or how
    many blocks of a circuit in stages. Raises like `stream`.
    """
    with counting("Running on the cluster…") as counter:
        results = dict(_started(server, keys, ciphertexts, client, counter))
    ordered = [results[index] for index in range(len(results))]
    if not isinstance(ciphertexts, Ciphertext):
        return ordered
    return ciphertexts.with_results(value for result in ordered for value in result.values)


def stream(
    server: Server | str | Path,
    keys: EvaluationKeys | StoredKeys,
    ciphertexts: Ciphertext | Iterable[Ciphertext],
    *,
    client: Client,
) -> Iterator[tuple[int, Ciphertext]]:
    """Yield (index, result) when each image finishes on the workers of a Dask cluster, each index once.

    server: a `server.zip`, or the server that `load_server` made of it. The workers use its limits.
    ciphertexts: one ciphertext, whose images are sent and yielded one by one (or, if they share values, value
        by value); or several ciphertexts, each of
        which goes to one worker. An iterator is read only as far as the workers need, so the ciphertexts need
        not all be in memory.
    client: Dask's client. If the cluster has no workers yet, the call waits for them.

    If the iteration is left early or interrupted, tasks that have not begun are cancelled. Raises
    `ArtifactError`, before anything is sent, for files, keys and ciphertexts that do not belong together,
    `ExecutionError` if a circuit fails on a worker, or if too many workers die of it.
    """
    return _started(server, keys, ciphertexts, client, Counter())


def _started(
    server: Server | str | Path,
    keys: EvaluationKeys | StoredKeys,
    ciphertexts: Ciphertext | Iterable[Ciphertext],
    client: Client,
    counter: Counter,
) -> Iterator[tuple[int, Ciphertext]]:
    """Check the arguments of `stream`, and return its results to come. Tasks are counted."""
    if not isinstance(client, Client) or client.asynchronous:
        raise InvalidArgumentError(
            f"client={client!r:.80}; it must be a dask.distributed.Client that is not asynchronous."
        )
    if isinstance(server, Server):
        manifest, file, config = server.manifest, server.file, server.config
        keyset, blocks = server.keyset, server.blocks
        limits = {"time_limit": config.time_limit, "memory_limit": config.memory_limit}
    else:
        parts = read_server(server)
        manifest, file, limits = parts.manifest, parts.file, {}
        keyset, blocks = keyset_of(parts.specs), blocks_of(parts.mlir)
    check_keys(keys, manifest.fingerprint, keyset)
    if isinstance(ciphertexts, Ciphertext) or not isinstance(ciphertexts, Iterable):
        check_input(ciphertexts, manifest, keys.key_id)
        whole, lanes = ciphertexts, manifest.lanes
        ciphertexts = [whole.part(place, place + 1, lanes) for place in range(len(whole.values))]
    elif isinstance(ciphertexts, Sequence):
        for ciphertext in ciphertexts:
            check_input(ciphertext, manifest, keys.key_id)
    payload = keys.payload if isinstance(keys, EvaluationKeys) else keys.read()
    fields = {**keys.names(), "payload": payload}
    accepted = partial(check_input, manifest=manifest, key_id=keys.key_id)
    job = job_name(file, limits, keys.name), file, limits, fields, keys.name
    return _stream(client, job, blocks, accepted, ciphertexts, counter)


def _hold(job: Job) -> Job:
    return job


def run_job(job: Job, ciphertext: bytes) -> bytes:
    """Run a job on a ciphertext's bytes. Workers look it up by its name, so that it can be replaced."""
    return job.run(ciphertext)


@contextlib.contextmanager
def _asking_dask() -> Iterator[None]:
    """Turn errors of Dask, or of a worker's Python, into errors of fheconv."""
    try:
        yield
    except FheConvError:
        raise
    except KilledWorker as error:
        raise ExecutionError(
            f"{error.allowed_failures + 1} workers died, one after another, with the task {error.task}; "
            "their logs may say why. Often it is memory: each needs room for the evaluation keys twice."
        ) from error
    except Exception as error:
        raise ExecutionError(
            f"Dask failed: {error!r:.500}. The cluster must be alive, and its scheduler and workers need the "
            "same versions of fheconv and of what it depends on."
        ) from error


def _stream(
    client: Client,
    parts: tuple[Any, ...],
    blocks: Sequence[Block],
    accepted: Callable[[Ciphertext], None],
    given: Iterable[Ciphertext],
    counter: Counter,
) -> Iterator[tuple[int, Ciphertext]]:
    name = f"fheconv-{secrets.token_hex(8)}"
    job = _submit(client, named_job, *parts, key=name)
    holds: dict[str, Future] = {}
    sent: dict[Future, tuple[int, Ciphertext, list[Future]]] = {}
    completed = as_completed(loop=client.loop)
    waiting = enumerate(given)

    @_asking_dask()
    def reach() -> dict[str, int]:
        """Make every worker hold the job, and return how many threads each worker has.

        Dask removes copies of data from workers that do not use them for seconds. But workers keep their own
        results, so each worker holds the job through a result of its own.
        """
        threads: dict[str, int] = client.nthreads()
        for address in threads.keys() - holds.keys():
            where = {"workers": [address], "allow_other_workers": True}
            holds[address] = _submit(client, _hold, job, key=(f"{name}-hold", len(holds)), **where)
        return threads

    def send() -> None:
        """Send images until enough of them are under way."""
        threads = reach()
        ahead = SPREAD_AHEAD if blocks else max(LEAST_AHEAD, AHEAD * sum(threads.values()))
        for index, ciphertext in islice(waiting, ahead - len(sent)):
            accepted(ciphertext)
            key = f"{name}-run", index
            values: list[Future] = []
            if blocks:
                submit = partial(_submit, client)
                future, values = spread(submit, job, blocks, ciphertext, [*threads], key)
            else:
                future = _submit(client, run_job, job, ciphertext.to_bytes(), key=key)
            sent[future] = index, ciphertext, values
            counter.expect(len(tasks := values or [future]))
            for task in tasks:
                task.add_done_callback(counter.finish)
            completed.add(future)

    try:
        with _asking_dask():
            wait([job])
            reach()
            wait([*holds.values()])  # otherwise the first images would all go to the worker with the job
        send()
        while sent:
            with _asking_dask():
                future = next(completed)
                data = future.result()
            index, ciphertext, _ = sent.pop(future)
            result = _checked(data, index, ciphertext)
            send()
            yield index, result
    finally:
        with contextlib.suppress(Exception):  # if the cluster is gone, there is nothing to cancel
            values = [value for _, _, values in sent.values() for value in values]
            client.cancel([job, *holds.values(), *sent, *values])


@_asking_dask()
def _submit(client: Client, function: Any, *arguments: Any, **options: Any) -> Future:
    # Dask warns of megabytes in a task. Ciphertexts are that large, and in a task they survive the worker.
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TiB"}):
        return client.submit(function, *arguments, retries=RETRIES, **options)


def _checked(data: Any, index: int, ciphertext: Ciphertext) -> Ciphertext:
    """Return the result for a ciphertext from its bytes.

    Raises `ArtifactError` for the result of another ciphertext.
    """
    result = Ciphertext.from_bytes(data)
    if not result.answers(ciphertext):
        raise ArtifactError(f"A worker returned for ciphertext {index} what belongs to another.")
    return result
