"""Times both sides of a saved circuit on this machine, and counts the bytes they exchange."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
from rich.console import RenderableType
from rich.filesize import decimal
from rich.table import Table

from fheconv.basics.checks import check_integer
from fheconv.basics.report import Report
from fheconv.circuits.client import load_client
from fheconv.circuits.server import load_server

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, repr=False)
class Measurement(Report):
    """The measurement of one encrypted image: medians of `runs` runs, in seconds, and sizes in bytes.

    Keys are made once. The first run is not counted, because in it the worker gets the evaluation keys.
    """

    fingerprint: str
    runs: int
    keygen_seconds: float
    encrypt_seconds: float
    run_seconds: float
    decrypt_seconds: float
    client_bytes: int
    server_bytes: int
    evaluation_key_bytes: int
    input_bytes: int
    output_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, ready for JSON."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        table = Table(title=f"One encrypted image, median of {self.runs}", title_justify="left")
        table.add_column("step")
        table.add_column("time", justify="right")
        table.add_column("written", justify="right")
        rows = (
            ("client.zip", None, self.client_bytes),
            ("server.zip", None, self.server_bytes),
            ("make keys, evaluation keys", self.keygen_seconds, self.evaluation_key_bytes),
            ("encrypt", self.encrypt_seconds, self.input_bytes),
            ("run", self.run_seconds, self.output_bytes),
            ("decrypt", self.decrypt_seconds, None),
        )
        for name, seconds, size in rows:
            table.add_row(
                name,
                "" if seconds is None else f"{seconds:.3g} s",
                "" if size is None else decimal(size),
            )
        return table


def measure(server_file: Path, client_file: Path, runs: int) -> Measurement:
    """Make keys, and encrypt, run and decrypt an image `runs` times.

    Raises the errors of `load_client`, `load_server` and the steps, `InvalidArgumentError` for less than one
    run.
    """
    check_integer("runs", runs, 1)
    client, server = load_client(client_file), load_server(server_file)
    image = np.full(client.manifest.input_shape, client.input_range[0])
    _, keygen_seconds = _timed(client.keygen)
    keys = client.evaluation_keys
    server.run(client.encrypt(image), keys)
    seconds: list[tuple[float, float, float]] = []
    for _ in range(runs):
        encrypted, encrypting = _timed(client.encrypt, image)
        results, running = _timed(server.run, encrypted, keys)
        _, decrypting = _timed(client.decrypt, results)
        seconds.append((encrypting, running, decrypting))
    encrypt_seconds, run_seconds, decrypt_seconds = map(median, zip(*seconds, strict=True))
    return Measurement(
        fingerprint=server.fingerprint,
        runs=runs,
        keygen_seconds=keygen_seconds,
        encrypt_seconds=encrypt_seconds,
        run_seconds=run_seconds,
        decrypt_seconds=decrypt_seconds,
        client_bytes=client_file.stat().st_size,
        server_bytes=server_file.stat().st_size,
        evaluation_key_bytes=sum(map(len, keys.chunks())),
        input_bytes=len(encrypted.to_bytes()),
        output_bytes=len(results.to_bytes()),
    )


def _timed(step: Callable[..., T], *arguments: Any) -> tuple[T, float]:
    start = time.perf_counter()
    result = step(*arguments)
    return result, time.perf_counter() - start
