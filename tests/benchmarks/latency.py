"""How long one image takes on N cores: what `cluster.py` prints below its table of batches.

Measured here, encrypted and on one core: the seconds of each stage of TinyCNN and of LeNet-5, and of a block
of VGG-11's first layer, whose other lookups are taken to be as fast. The rest is arithmetic. Of a stage, the
worker with the most lookups is the last to finish. Before that it has received what it reads, but for its own
share of it, over a line of its own. Dask's own time for each task, some milliseconds, is not counted.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
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
from fheconv.lowering.stages import parts
from fheconv.networks.floats import Maximum, Network
from train_tinycnn_digits import shipped

# The bytes of an encrypted value between two blocks: polynomials of 2^11 numbers, one more, 8 bytes each.
VALUE_BYTES = 8 * (2**11 + 1)
CONFIG = fheconv.CompileConfig(p_error=0.01)


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


def block_of(whole: nn.Sequential) -> nn.Module:
    """A block of VGG-11's first layer, four pixels wide and high: the first layer of a network of its own."""
    first = nn.Conv2d(3, 64, 3)
    first.load_state_dict(whole[0].state_dict())
    return nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


def measured(circuit: fheconv.StagedCircuit) -> list[float]:
    """The seconds of each stage of an image on one core."""
    os.environ["OMP_NUM_THREADS"] = "1"
    session = Worker()
    with tempfile.TemporaryDirectory() as folder:
        client_file, server_file = circuit.save(folder)
        client = fheconv.load_client(client_file)
        server = fheconv.load_server(server_file, session=session)
    client.keygen()
    keys = client.evaluation_keys
    (image,) = client.encrypt(np.zeros((1, *client.manifest.input_shape))).values
    seconds, values = [0.0] * (1 + server.blocks[-1].stage), [image]
    server.run_block(keys, server.blocks[0], [image])  # which gets the keys into memory
    for block in server.blocks:
        start = perf_counter()
        values.append(server.run_block(keys, block, [values[number] for number in block.reads]))
        seconds[block.stage] += perf_counter() - start
    session.stop()
    del os.environ["OMP_NUM_THREADS"]
    return seconds


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
    for name, module, shape in (("TinyCNN", shipped(), (1, 8, 8)), ("LeNet-5", lenet(), (1, 28, 28))):
        images = torch.rand(64, *shape) if name == "LeNet-5" else digits.digits().train_images
        network = fheconv.quantize(module.eval(), images)
        seconds = measured(fheconv.compile(network, CONFIG, stages="layers"))
        yield table_of(name, network.source, seconds, cores, bits_a_second)
    yield vgg_table(cores, bits_a_second)


def vgg_table(cores: Sequence[int], bits_a_second: float, runs: int = 3) -> Table:
    """What is to be printed of VGG-11, from the median seconds of one block."""
    whole = vgg().eval()
    block = fheconv.quantize(block_of(whole), torch.rand(64, 3, 4, 4))
    circuit = fheconv.compile(block, CONFIG, stages="layers")
    each = median(measured(circuit)[0] for _ in range(runs)) / circuit.cost.lookups
    network = capture(whole, (3, 32, 32))
    counts = [int(np.prod(layer.shape)) for layer in network.layers[:-1]]
    seconds = [each * count for count in counts] + [0.0]
    title = f"VGG-11 ({sum(counts):,} lookups; measured: {circuit.cost.lookups})"
    return table_of(title, network, seconds, cores, bits_a_second)
