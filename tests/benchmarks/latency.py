"""How long one image takes on N cores: what `cluster.py` prints below its table of batches.

Measured here, encrypted and on one core: the seconds of each stage of TinyCNN and of LeNet-5, and of a block
of VGG-11's first layer, whose other lookups are taken to be as fast. The rest is arithmetic. Of a stage, the
worker with the most lookups is the last to finish. Before that it has received what it reads, but for its own
share of it, over a line of its own. Dask's own time for each task, some milliseconds, is not counted.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from rich.filesize import decimal
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))

import digits
import fheconv
from fheconv.capture.model import capture
from fheconv.circuits.native.worker import Worker
from fheconv.circuits.stepping import Evaluate
from fheconv.lowering.blocks import Block
from fheconv.lowering.stages import parts
from fheconv.networks.floats import Maximum, Network
from train_tinycnn_digits import shipped

# The bytes of an encrypted value between two blocks: polynomials of 2^11 numbers, one more, 8 bytes each.
VALUE_BYTES = 8 * (2**11 + 1)
# The blocks of VGG-11's first layer, of which one is measured.
BLOCKS = 256


def lenet() -> nn.Module:
    """LeNet-5 for images of 28x28."""
    head = nn.Flatten(), nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)
    first = nn.Conv2d(1, 6, 5), nn.ReLU(), nn.AvgPool2d(2)
    return nn.Sequential(*first, nn.Conv2d(6, 16, 5), nn.ReLU(), nn.AvgPool2d(2), *head)


def vgg() -> nn.Module:
    """VGG-11 for images of 32x32, with average pooling: some 152,000 lookups."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()] if width else [nn.AvgPool2d(2)]
        channels = width or channels
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def first_layer_of(whole: nn.Sequential) -> nn.Module:
    """The first layer of VGG-11, as the first one of a network that is not dear to compile."""
    return nn.Sequential(*whole[:2], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


@contextlib.contextmanager
def on_one_core(circuit: fheconv.StagedCircuit) -> Iterator[tuple[Evaluate, tuple[Block, ...], bytes]]:
    """What evaluates the blocks of a circuit with keys on one core, the blocks, and an encrypted image."""
    with tempfile.TemporaryDirectory() as folder:
        client_file, server_file = circuit.save(folder)
        client = fheconv.load_client(client_file)
        client.keygen()
        os.environ["OMP_NUM_THREADS"] = "1"
        session = Worker()
        server = fheconv.load_server(server_file).beside(session)
    (image,) = client.encrypt(np.zeros((1, *client.manifest.input_shape))).values
    evaluate = partial(server.run_block, client.evaluation_keys)
    evaluate(server.blocks[0], [image])  # which gets the keys into memory
    try:
        yield evaluate, server.blocks, image
    finally:
        session.stop()
        del os.environ["OMP_NUM_THREADS"]


def measured(circuit: fheconv.StagedCircuit) -> list[float]:
    """The seconds of each stage of an image on one core."""
    with on_one_core(circuit) as (evaluate, blocks, image):
        seconds, values = [0.0] * (1 + blocks[-1].stage), [image]
        for block in blocks:
            start = perf_counter()
            values.append(evaluate(block, [values[number] for number in block.reads]))
            seconds[block.stage] += perf_counter() - start
    return seconds


def lookup_of(circuit: fheconv.StagedCircuit, blocks: int, runs: int = 3) -> float:
    """The seconds of a lookup in the first of so many blocks of a circuit's first layer."""
    with on_one_core(circuit) as (evaluate, found, image):
        seconds = []
        for _ in range(runs):
            start = perf_counter()
            evaluate(found[0], [image])
            seconds.append(perf_counter() - start)
    return median(seconds) * blocks / circuit.cost.lookups


def on_paper(
    network: Network, seconds: Sequence[float], cores: int, bits_a_second: float
) -> tuple[float, int]:
    """The seconds of an image on so many cores, and the bytes that workers receive of one another.

    `seconds` are those of each stage on one core.
    """
    total, received = 0.0, 0
    for number, layer in enumerate(network.layers):
        last = number == len(network.layers) - 1
        wanted = np.ones(layer.shape, bool)
        shares = parts(wanted, wanted, 1 if last else cores)
        slowest = shares[len(shares) // 2]  # in the middle of the image, where no padding is read
        read = 0
        if isinstance(layer, Maximum):
            read = len(np.unique(layer.index[:, slowest])) if layer.source else 0
        else:
            for term in layer.terms:
                read += int(term.read(slowest, network.shapes[term.source]).sum()) if term.source else 0
        bytes_each = int(read * VALUE_BYTES * (1 - 1 / cores))
        received += bytes_each * len(shares)
        total += seconds[number] * max(int(share.sum()) for share in shares) / wanted.sum()
        total += 8 * bytes_each / bits_a_second
    return total, received


def table_of(
    name: str, network: Network, seconds: Sequence[float], cores: Sequence[int], bits: float
) -> Table:
    """What is to be printed of a network."""
    table = Table(title=f"One image of {name} on paper; {sum(seconds):.1f} s on 1 core", title_justify="left")
    for heading in ("cores", "latency", "times faster", "received by all workers"):
        table.add_column(heading, justify="right")
    for count in cores:
        latency, received = on_paper(network, seconds, count, bits)
        table.add_row(f"{count:,}", f"{latency:.2f} s", f"{sum(seconds) / latency:.1f}", decimal(received))
    return table


def tables(cores: Sequence[int], bits_a_second: float) -> Iterator[Table]:
    """Yield the tables of TinyCNN, LeNet-5 and VGG-11."""
    torch.manual_seed(0)
    config = fheconv.CompileConfig(p_error=0.01)
    for name, module, shape in (("TinyCNN", shipped(), (1, 8, 8)), ("LeNet-5", lenet(), (1, 28, 28))):
        images = torch.rand(64, *shape) if name == "LeNet-5" else digits.digits().train_images
        network = fheconv.quantize(module.eval(), images)
        seconds = measured(fheconv.compile(network, config, stages="layers"))
        yield table_of(name, network.source, seconds, cores, bits_a_second)
    whole = vgg().eval()
    first = fheconv.quantize(first_layer_of(whole).eval(), torch.rand(16, 3, 32, 32))
    each = lookup_of(fheconv.compile(first, config, stages="layers", blocks=BLOCKS), BLOCKS)
    network = capture(whole, (3, 32, 32))
    counts = [int(np.prod(layer.shape)) for layer in network.layers[:-1]]
    seconds = [each * count for count in counts] + [0.0]
    yield table_of(f"VGG-11 ({sum(counts):,} lookups)", network, seconds, cores, bits_a_second)
