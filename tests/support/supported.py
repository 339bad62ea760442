"""Makes notebook 2's table of what is supported by trying every cell on a tiny layer.

`python -m tests.support.supported` prints it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import fheconv
from fheconv.networks.bounds import layer_bounds, worst_case_inputs

FORWARD = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)
BACKWARD = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)

# Each row is one option, with what else it needs; groups=4 of 4 channels is depthwise.
DIRECT: dict[str, dict[str, Any]] = {
    "none": {},
    "bias": {"bias": True},
    "stride": {"stride": 2},
    "padding, a number": {"padding": 1},
    'padding="same"': {"padding": "same"},
    'padding="valid"': {"padding": "valid"},
    "padding, (before, after)": {"padding": (2, 1)},
    'padding_mode="reflect"': {"padding": 1, "padding_mode": "reflect"},
    'padding_mode="replicate"': {"padding": 1, "padding_mode": "replicate"},
    'padding_mode="circular"': {"padding": 1, "padding_mode": "circular"},
    "dilation": {"dilation": 2},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4},
}
TRANSPOSED: dict[str, dict[str, Any]] = {
    "none": {},
    "bias": {"bias": True},
    "stride": {"stride": 2},
    "padding, a number": {"padding": 1},
    'padding="same"': {"padding": "same"},
    "padding, (before, after)": {"padding": (0, 1)},
    "output_padding": {"stride": 2, "output_padding": 1},
    "dilation": {"dilation": 2},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4},
}


class Trial:
    """A tiny integer layer with one option, and what torch makes of it."""

    def __init__(self, axes: int, transposed: bool, option: dict[str, Any]) -> None:
        rng = np.random.default_rng(axes)
        self.options = dict(option)
        pair = self.options.get("padding")
        if isinstance(pair, tuple):
            self.options["padding"] = [pair] * axes
        self.transposed = transposed
        groups = self.options.get("groups", 1)
        channels = 4 if groups > 1 else 2
        shape = (channels, channels // groups, *[2] * axes)
        self.weight = rng.integers(-3, 4, shape)
        self.bias = rng.integers(-9, 9, channels) if self.options.pop("bias", False) else None
        self.x = rng.integers(0, 4, (1, channels, *[3] * axes))

    def torchs(self) -> np.ndarray:
        """torch's result. It pads unequally, or otherwise than with zeros, outside its convolutions."""
        options, axes = dict(self.options), self.x.ndim - 2
        x, weight = torch.tensor(self.x), torch.tensor(self.weight)
        bias = None if self.bias is None else torch.tensor(self.bias)
        pairs = options["padding"] if isinstance(options.get("padding"), list) else None
        if self.transposed:
            if pairs:
                options["padding"] = 0
            y = BACKWARD[axes - 1](x, weight, bias, **options)
            if pairs:
                y = y[(..., *(slice(a, n - b) for (a, b), n in zip(pairs, y.shape[2:], strict=True)))]
            return y.numpy()
        mode = options.pop("padding_mode", "constant")
        if pairs or mode != "constant":
            around = pairs or [(options["padding"],) * 2] * axes
            options["padding"] = 0
            flat = [n for pair in reversed(around) for n in pair]  # torch.pad takes the last axis first
            x = torch.nn.functional.pad(x.double(), flat, mode).long()
        return FORWARD[axes - 1](x, weight, bias, **options).numpy()

    def network(self) -> fheconv.QuantizedNetwork:
        source = fheconv.Conv.of(self.weight, self.bias, transposed=self.transposed, **self.options)
        return fheconv.quantize(source, self.x, fheconv.QuantConfig(weight_bits=3, input_bits=2))

    def clear(self) -> np.ndarray:
        function = fheconv.conv_transpose if self.transposed else fheconv.conv
        return function(self.x, self.weight, self.bias, **self.options)

    def matrix(self) -> np.ndarray:
        matrix = fheconv.filter_matrix(
            self.weight, self.x.shape[1:], transposed=self.transposed, **self.options
        )
        y = (self.x.reshape(1, -1) @ matrix).reshape(self.network().output_shape)
        return y[None] + (0 if self.bias is None else self.bias.reshape(-1, *[1] * (self.x.ndim - 2)))

    def bounds(self) -> np.ndarray:
        """The results, after checking that the images which the proof names attain its bounds."""
        network = self.network()
        layer = network.last
        bounds = layer_bounds(layer, network.shapes)
        results = layer.accumulate([worst_case_inputs(layer, network.input_shape, bounds)])
        assert (results <= bounds.maximum).all()
        assert (results >= bounds.minimum).all()
        for channel in range(results.shape[1]):
            assert results[2 * channel, channel].min() == bounds.minimum[channel].min()
            assert results[2 * channel + 1, channel].max() == bounds.maximum[channel].max()
        return layer.accumulate([self.x])

    def encrypted(self) -> np.ndarray:
        circuit = fheconv.compile(self.network())
        circuit.keygen()
        return circuit.predict(self.x, fhe="execute")


COLUMNS: dict[str, Callable[[Trial], np.ndarray]] = {
    "in clear": Trial.clear,
    "filter matrix": Trial.matrix,
    "proved bounds": Trial.bounds,
    "encrypted": Trial.encrypted,
}


def works(trial: Trial, column: str) -> bool:
    """Whether it is torch's result; what is refused does not work, and a wrong result is a bug."""
    try:
        y = COLUMNS[column](trial)
    except fheconv.FheConvError:
        return False
    np.testing.assert_array_equal(y, trial.torchs())
    return True


def table() -> str:
    """Return the table."""
    lines = [f"| | option | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for transposed, rows in ((False, DIRECT), (True, TRANSPOSED)):
        for name, option in rows.items():
            trials = {axes: Trial(axes, transposed, option) for axes in (1, 2, 3)}
            cells = (
                " ".join(f"{axes}-d" for axes, trial in trials.items() if works(trial, column)) or "no"
                for column in COLUMNS
            )
            kind = "transposed" if transposed else "direct"
            lines.append(f"| {kind} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
