"""Makes the files in this folder. Run it with the version of fheconv whose files should stay readable.

The files here were made by the last version with file format 1, before fheconv/ was sorted into rooms.
Secret keys are among them: they protect nothing. The evaluation keys of a network with lookups are left out,
because they take megabytes.
"""

from pathlib import Path

import numpy as np

import fheconv

FOLDER = Path(__file__).parent
WEIGHT = np.array([[[[1, 0, -1], [2, 0, -2], [1, 0, -1]]]])
BIAS = np.array([3])
IMAGE = np.random.default_rng(7).integers(0, 16, (1, 5, 5))


def make_filter() -> None:
    """Write the files of one filter: of the circuit, the keys, an encrypted image and its result."""
    config = fheconv.QuantConfig(weight_bits=3, input_bits=4)
    network = fheconv.quantize(fheconv.Conv.of(WEIGHT, BIAS), IMAGE, config)
    circuit = fheconv.compile(network, fheconv.CompileConfig(compress_input=True))
    circuit.keygen()
    folder = FOLDER / "filter"
    circuit.save(folder)
    circuit.save_keys(folder / "keys.secret")
    (folder / "evaluation.keys").write_bytes(circuit.evaluation_keys.to_bytes())
    encrypted = circuit.encrypt(IMAGE)
    (folder / "image.ct").write_bytes(encrypted.to_bytes())
    (folder / "result.ct").write_bytes(circuit.run(encrypted).to_bytes())


def make_network() -> None:
    """Write the files of a circuit with lookups: the sum of max(0, results of the filter's signs)."""
    import torch
    from torch import nn

    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(9, 1, bias=False))
    with torch.no_grad():
        model[0].weight[:] = torch.tensor(np.sign(WEIGHT))
        model[0].bias[:] = torch.tensor(BIAS)
        model[3].weight[:] = 1
    images = np.random.default_rng(8).integers(0, 4, (20, 1, 5, 5))
    config = fheconv.QuantConfig(weight_bits=3, input_bits=2, activation_bits=5, method="minmax")
    fheconv.compile(fheconv.quantize(model, images, config)).save(FOLDER / "network")


if __name__ == "__main__":
    make_filter()
    make_network()
