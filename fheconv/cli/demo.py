"""Runs the demo for newcomers: edge filters on an encrypted photograph."""

import time
from pathlib import Path

import numpy as np
from rich.console import Console

from fheconv.basics.arrays import Array
from fheconv.basics.config import QuantConfig
from fheconv.basics.errors import MissingExtraError
from fheconv.circuits.compiling import compile as compile_circuit
from fheconv.quantized import quantize

SOBEL_X = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
CONFIG = QuantConfig(weight_bits=3, input_bits=4, input_range=(0, 255))


def run_demo(output: Path, size: int, console: Console) -> bool:
    """Filter an encrypted crop of size × size pixels, write a picture, and return True if it is right.

    Raises `MissingExtraError` without scikit-learn, pillow and matplotlib.
    """
    import torch

    module = torch.nn.Conv2d(1, 2, 3, bias=False)
    module.weight.data = torch.tensor(np.stack([SOBEL_X, SOBEL_X.T])[:, None], dtype=torch.float32)
    image = _photograph(size)

    console.rule("A torch.nn.Conv2d with the two Sobel filters, and its bit-width budget")
    network = quantize(module, image, CONFIG)
    console.print(network.budget(accumulator_bits=8))

    console.rule("The circuit")
    circuit = compile_circuit(network)
    console.print(circuit.cost)

    console.rule("Encrypted")
    seconds = {}

    def timed(step: str, started: float) -> None:
        seconds[step] = time.perf_counter() - started
        console.print(f"{step:<22}{seconds[step]:7.2f} s")

    started = time.perf_counter()
    circuit.keygen()
    timed("key generation", started)
    started = time.perf_counter()
    encrypted = circuit.encrypt(image)
    timed(f"encrypt {size}×{size} pixels", started)
    console.print(
        f"What the server sees: {encrypted.nbytes:,} bytes, such as {encrypted.values[0][-12:].hex()}"
    )
    started = time.perf_counter()
    result = circuit.run(encrypted)
    timed("run", started)
    started = time.perf_counter()
    edges = circuit.decrypt(result)
    timed("decrypt", started)

    exact = bool((edges == network(image)).all())
    expected = module(torch.tensor(image, dtype=torch.float32)[None]).detach().numpy()[0]
    error = np.abs(edges - expected).max() / np.abs(expected).max()
    console.print(f"Equal to the exact integers in clear: {'yes' if exact else 'NO'}, {edges.size:,} values.")
    console.print(
        f"Largest difference from torch's floats: {error:.1%} of their range, all of it from quantizing to "
        f"{CONFIG.input_bits}-bit pixels."
    )
    _write(output, image, expected, edges)
    console.print(f"Wrote {output}.")
    return exact


def _photograph(size: int) -> Array:
    """Return a grey crop (1, size, size), values 0..255."""
    try:
        from PIL import Image
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise MissingExtraError(f'The demo needs {error.name}: pip install "fheconv[demo]".') from error
    pixels = np.asarray(Image.fromarray(load_sample_image("china.jpg")).convert("L"))
    top, left = 28, 158  # the roof of a pagoda: edges in every direction
    return pixels[None, top : top + size, left : left + size].astype(np.float64)


def _write(output: Path, image: Array, expected: Array, edges: Array) -> None:
    from fheconv.analysis import plots

    strength = [np.hypot(*channels) for channels in (expected, edges)]
    figure = plots.images(
        {
            "photograph": image[0],
            "edges, torch": strength[0],
            "edges, decrypted": strength[1],
            "difference": strength[1] - strength[0],
        }
    )
    figure.savefig(output, dpi=150)
