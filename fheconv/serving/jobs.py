"""Holds what a Dask worker needs for its images: a circuit that it has opened, with the keys.

Dask brings it as bytes, and in each call anew. What is open already is used again.
"""

import hashlib
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from distributed import get_worker

from fheconv.basics.errors import ArtifactError
from fheconv.circuits.ciphertext import Ciphertext
from fheconv.circuits.keys import EvaluationKeys
from fheconv.circuits.native.worker import Worker
from fheconv.circuits.server import Server, load_server
from fheconv.lowering.blocks import Block

# The topic of Dask's events under which each worker tells that it opened a circuit.
TOPIC = "fheconv"
# The seconds that a worker keeps its last job open after the last image.
KEPT_SECONDS = 300


class Job:
    """The circuit and the keys, which every worker needs. They travel as bytes, and a worker opens them."""

    def __init__(self, *parts: Any) -> None:
        self._parts = parts
        self._lock = threading.Lock()
        self._opened: tuple[Server, EvaluationKeys] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return named_job, self._parts

    def unlock(self) -> None:
        """Forget who holds the lock."""
        self._lock = threading.Lock()

    def run(self, ciphertext: bytes) -> bytes:
        """Evaluate the circuit on a ciphertext's bytes. Raises like `Server.run`."""
        server, keys = self._ready()
        return server.run(Ciphertext.from_bytes(ciphertext), keys).to_bytes()

    def run_block(self, block: Block, values: Sequence[bytes]) -> bytes:
        """Evaluate a block of a circuit in stages on the values that it reads. Raises like `Server.run`."""
        server, keys = self._ready()
        return server.run_block(keys, block, values)

    def _ready(self) -> tuple[Server, EvaluationKeys]:
        with self._lock:
            if self._opened is None:
                self._opened = self._open(*self._parts)
        keep(self)
        return self._opened

    def _open(
        self, name: str, file: bytes, limits: dict[str, Any], keys: dict[str, Any], digest: str
    ) -> tuple[Server, EvaluationKeys]:
        evaluation_keys = EvaluationKeys(**keys)
        if evaluation_keys.name != digest:
            raise ArtifactError("The evaluation keys were damaged on their way; run it again.")
        session = Worker()
        weakref.finalize(self, session.stop)
        server = load_server(file, session=session, **limits)
        get_worker().log_event(TOPIC, {"opened": server.fingerprint, "job": name})
        return server, evaluation_keys


# The jobs of this process, by name; and the one that ran last, with the timer that will let it go.
_jobs: weakref.WeakValueDictionary[str, Job] = weakref.WeakValueDictionary()
_kept: dict[Job, threading.Timer] = {}
_jobs_lock = threading.Lock()


def job_name(file: bytes, limits: dict[str, Any], keys: str) -> str:
    """Return the name of the job of a saved circuit, with the keys of that name: what differs has another."""
    return hashlib.sha256(file + repr((sorted(limits.items()), keys)).encode()).hexdigest()


def named_job(name: str, *parts: Any) -> Job:
    """Return the job of that name. If it comes again, from Dask or in another call, return the open one."""
    with _jobs_lock:
        return _jobs.setdefault(name, Job(name, *parts))


def keep(job: Job) -> None:
    """Keep a job open for `KEPT_SECONDS` from now on, and let others go."""
    timer = threading.Timer(KEPT_SECONDS, let_go, [job])
    timer.daemon = True
    let_go()
    with _jobs_lock:
        _kept[job] = timer
    timer.start()


def let_go(job: Job | None = None) -> None:
    """Keep a job, or any if it is None, open no longer than a call needs it."""
    with _jobs_lock:
        timers = [_kept.pop(one) for one in [*_kept] if job is None or one is job]
    for timer in timers:
        timer.cancel()  # it, too, holds the job


def _unlock_all() -> None:
    """Give every job a new lock: in a forked child, the thread that held the old one does not exist."""
    global _jobs_lock
    _jobs_lock = threading.Lock()
    _kept.clear()
    for job in list(_jobs.values()):
        job.unlock()


os.register_at_fork(after_in_child=_unlock_all)
