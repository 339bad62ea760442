"""The whole way from a model to a class, as a type checker sees it: mypy reads this file, and a test runs it.

What a public call returns must have a type of its own. `assert_type` fails in mypy where it is `Any`.
"""

from pathlib import Path
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt
import torch

import fheconv


def images(count: int) -> npt.NDArray[np.float64]:
    return np.random.default_rng(0).random((count, 1, 4, 4))


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    hidden, scores = torch.nn.Conv2d(1, 2, 3, stride=2), torch.nn.Linear(2, 3)
    return torch.nn.Sequential(hidden, torch.nn.ReLU(), torch.nn.Flatten(), scores)


def both_sides(folder: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the encrypted results of an image, from a circuit and from its two files."""
    network = fheconv.quantize(model(), images(20), fheconv.QuantConfig(accumulator_bits=5))
    assert_type(network, fheconv.QuantizedNetwork)
    report = network.budget(5)
    assert_type(report, fheconv.BudgetReport)
    assert_type(report.fits, bool)
    assert_type(report.layers, tuple[fheconv.LayerBudget, ...])

    circuit = fheconv.compile(network, fheconv.CompileConfig(p_error=1e-4))
    assert_type(circuit, fheconv.FheCircuit)
    assert_type(circuit.cost, fheconv.Cost)
    assert_type(circuit.cost.complexity, float)
    assert_type(circuit.keygen(), None)
    encrypted = circuit.encrypt(images(1))
    assert_type(encrypted, fheconv.Ciphertext)
    result = circuit.run(encrypted)
    assert_type(result, fheconv.Ciphertext)
    assert_type(circuit.decrypt(result), npt.NDArray[Any])
    assert_type(circuit.predict(torch.zeros(1, 1, 4, 4), fhe="simulate"), npt.NDArray[Any])
    assert_type(circuit.verify(images(1)), fheconv.VerifyReport)

    client_file, server_file = circuit.save(folder)
    assert_type(client_file, Path)
    client = fheconv.load_client(client_file)
    assert_type(client, fheconv.Client)
    server = fheconv.load_server(server_file)
    assert_type(server, fheconv.Server)
    assert_type(client.keygen(), None)
    assert_type(client.evaluation_keys, fheconv.EvaluationKeys)
    sent = fheconv.Ciphertext.from_bytes(client.encrypt(images(1)).to_bytes())
    assert_type(sent, fheconv.Ciphertext)
    returned = server.run(sent, client.evaluation_keys)
    assert_type(returned, fheconv.Ciphertext)
    return circuit.decrypt(result), client.decrypt(returned)


def cheapest() -> fheconv.TunePoint:
    """Return the cheapest circuit that a search finds, trained on for a moment."""
    data = images(40)
    with torch.no_grad():
        classes = model()(torch.tensor(data, dtype=torch.float32)).argmax(1).numpy()
    result = fheconv.tune(
        model(), data, evaluation=(data, classes), widths=[(5, None)], p_errors=[0.01], max_drop=0.99
    )
    assert_type(result, fheconv.TuneResult)
    assert_type(result.front, tuple[fheconv.TunePoint, ...])
    point = result.best(max_drop=0.99)
    assert_type(point, fheconv.TunePoint)
    assert_type(point.network, fheconv.QuantizedNetwork)
    assert_type(point.accuracy, float)
    assert_type(point.compile(), fheconv.FheCircuit)
    trained = fheconv.finetune(point.network, (data, classes), epochs=1)
    assert_type(trained, fheconv.QuantizedNetwork)
    assert_type(trained.to_torch(), "fheconv.TrainableNetwork[fheconv.QuantizedNetwork]")
    assert_type(trained.to_torch().quantized(data), fheconv.QuantizedNetwork)
    return point


def arithmetic() -> fheconv.AccumulatorBounds:
    weight = [[1, 0], [0, -1]]
    assert_type(fheconv.conv([[[[1, 2], [3, 4]]]], [[weight]]), npt.NDArray[Any])
    assert_type(fheconv.conv_transpose([[[[1, 2], [3, 4]]]], [[weight]]), npt.NDArray[Any])
    bounds = fheconv.accumulator_bounds([[weight]], fheconv.ConvGeometry.of((2, 2)), (2, 2), (0, 15))
    assert_type(bounds, fheconv.AccumulatorBounds)
    assert_type(fheconv.Conv.of(weight), fheconv.Conv)
    tiled = fheconv.compile_tiled(fheconv.quantize(weight, [[[0, 1], [2, 3]]]), 2)
    assert_type(tiled, fheconv.TiledCircuit)
    assert_type(tiled.predict(torch.zeros(1, 4, 4)), npt.NDArray[Any])
    return bounds
