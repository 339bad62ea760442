"""Servers over loopback, of a circuit so small that it takes a fraction of a second."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

import fheconv
from fheconv.basics.arrays import Array
from fheconv.circuits.server import Server
from fheconv.quantized import QuantizedNetwork
from fheconv.serving.app import application, configured
from tests.support.nets import integer_images, quantized


@cache
def network() -> QuantizedNetwork:
    return quantized(3, depth=1, size=(1, 4, 4), accumulator_bits=4)


def save(folder: Path) -> None:
    """Write client.zip and server.zip of the network."""
    fheconv.compile(network(), fheconv.CompileConfig(p_error=1e-4)).save(folder)


def keyed_client(folder: Path) -> fheconv.Client:
    client = fheconv.load_client(folder / "client.zip")
    client.keygen()
    return client


def images(count: int, seed: int = 0) -> Array:
    q = integer_images(network(), seed, count)[2:]
    return (q - network().input.zero_point) * network().input.scale


def check(results: Array, x: Array) -> None:
    np.testing.assert_array_equal(results, network()(x))


@contextlib.contextmanager
def serving(
    server: Server | list[Server], folder: Path, *, tls: fheconv.Tls | None = None, **options: Any
) -> Iterator[str]:
    """Serve in a thread, and yield the URL. The first request waits until the workers are there."""
    app = application(server, folder=folder, **options)
    uvicorn_server = uvicorn.Server(configured(app, **({} if tls is None else tls.of_server())))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http{'' if tls is None else 's'}://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield url
        finally:
            uvicorn_server.should_exit = True
            thread.join()


Start = Callable[..., tuple[subprocess.Popen[str], str]]
# Whoever starts pytest in the background has it ignore interruptions, and so do its children.
STARTED = "import signal; signal.signal(signal.SIGINT, signal.{}); from fheconv.cli.entry import main; main()"


@contextlib.contextmanager
def commands(file: Path, keys: Path) -> Iterator[Start]:
    """Yield a function that starts `fheconv serve`, and returns the process and the URL."""
    processes = []

    def start(
        *options: str, port: int = 0, on_interruption: str = "default_int_handler"
    ) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-c", STARTED.format(on_interruption), "serve", str(file)]
        command += ["--port", str(port), "--folder", str(keys), *options]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        processes.append(process)
        return process, json.loads(process.stderr.readline())["message"].rpartition(" ")[2]

    try:
        yield start
    finally:
        for process in processes:
            kill(process)
            process.stderr.close()


def kill(process: subprocess.Popen[str]) -> None:
    """End a server at once, with all that is in its process group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
