"""Makes a quantized network a torch module whose integer weights can be trained within their budgets.

The forward pass computes with the same integers as the circuit. In the backward pass, roundings pass
gradients through (straight-through estimator, Bengio et al. 2013), and a lookup has the slope of its
activation. Weights are trained as latent real numbers, in units of one integer step. The integers they are
rounded to always keep to the budgets of the accumulators, so the proof holds after each training step. The
latent weights stay near the L1 ball of the budget (A2Q, Colbert et al. 2023), where rounding changes little.
"""

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fheconv.basics.arrays import Array, along_channels
from fheconv.networks.floats import Layer, Maximum
from fheconv.networks.integers import IntegerNetwork, QuantizedLayer
from fheconv.quantizer.building import Building
from fheconv.quantizer.gains import without_gains
from fheconv.quantizer.rows import IntegerTerms, Rows, read_taps
from fheconv.training.modules import MaximumModule, Steps, check_finite, image_steps
from fheconv.training.straight_through import looked_up

# The latent weights of a filter must lie in a ball this many times as large as that of its budget. In the
# budget's own ball, many small weights would keep each other too small to be rounded to 1.
BALL = 1.5
# The standard deviation of the noise that stands for approximate rounding in training, in rounding steps.
ROUNDING_NOISE = 0.25
# What `quantized` returns is of the type of the network that training began with.
AnyNetwork = TypeVar("AnyNetwork", bound=IntegerNetwork)


class TrainableNetwork(nn.Module, Generic[AnyNetwork]):
    """A trainable integer network. It maps images (N, C, *S) to the last layer's sums (N, K, *Out).

    `QuantizedNetwork.to_torch` makes it. Each layer has three parameters: the latent weights, the logarithm
    of the growth of each filter's accumulator step (its size as a real number), and a shift of each channel's
    bias, in such steps. Call `draw_in` after each step of an optimizer. `quantized` returns the integer
    network that training has reached.

    In training mode, noise stands for the approximate rounding before lookups. In evaluation mode, this
    rounding is left out.

    Example:
        >>> import fheconv
        >>> image = np.arange(16).reshape(1, 4, 4)
        >>> module = fheconv.quantize([[1, -2, 1]], image).to_torch().eval()
        >>> module(torch.tensor(image[None])).shape
        torch.Size([1, 1, 4, 2])
    """

    def __init__(self, network: AnyNetwork) -> None:
        super().__init__()
        self.network = network
        building = self._building(np.zeros((0, *network.input_shape)))
        layers: list[nn.Module] = []
        for layer, source in zip(network.layers, network.source.layers, strict=True):
            if isinstance(layer, Maximum):
                layers.append(MaximumModule(layer))
            elif isinstance(source, Layer):
                layers.append(_Layer(layer, source, network, building))
        self.layers: Any = nn.ModuleList(layers)

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.parameters())
        shapes = f"{self.network.input_shape} → {self.network.accumulator_shape}"
        return f"TrainableNetwork: {shapes}, {len(self.layers)} layers, {count:,} parameters"

    def forward(self, images: Tensor) -> Tensor:
        """Return the real numbers that the last accumulators stand for. Images are clipped to the range."""
        tensors = [image_steps(images, self.network.input)]
        for layer in self.layers:
            tensors.append(layer(tensors))
        return tensors[-1]

    def weight_parameters(self) -> list[nn.Parameter]:
        """Return the latent weights."""
        return [weight for layer in self.layers if isinstance(layer, _Layer) for weight in layer.weights]

    def other_parameters(self) -> list[nn.Parameter]:
        """Return the growths of accumulator steps and the shifts of biases."""
        layers = [layer for layer in self.layers if isinstance(layer, _Layer)]
        return [parameter for layer in layers for parameter in (layer.growth, layer.shift)]

    @torch.no_grad()
    def draw_in(self) -> None:
        """Draw the latent weights into the balls of their budgets. Call it after each step of training."""
        for layer in self.layers:
            layer.draw_in()

    @torch.no_grad()
    def quantized(self, calibration: Array) -> AnyNetwork:
        """Return the integer network, with the ranges that it observes on calibration images (N, C, *S).

        Raises `CalibrationError` if training has diverged: parameters are not finite, or accumulator steps
        are too small or too large to count in.
        """
        check_finite(self)
        building = self._building(calibration)
        for layer, source in zip(self.layers, self.network.source.layers, strict=True):
            if isinstance(source, Maximum):
                building.add_maximum(source)
            else:
                building.add(building.draft(source, *layer.rounded()))
        network = type(self.network).of(building.network())
        for layer, quantized in zip(self.layers, network.layers, strict=True):
            if isinstance(quantized, QuantizedLayer):
                layer.fold(quantized, quantized.zero(network.shapes))
        return network

    def _building(self, images: Array) -> Building:
        network = self.network
        quantizations = [*network.quantizations, None]
        return Building(network.source, network.config, quantizations, network.calibrated, images)


class _Layer(nn.Module):
    """A trainable layer: Σ terms with integer weights, times the steps, plus the bias, then the activation.

    The activation gives integers. Filters that share a scale and a budget are one row. `index` (rows, n) are
    the places of a row's weights among all weights of the layer, flattened. `prices` (rows, n) say how much
    one unit of each weight adds to the accumulator's span. `alive` (rows, n) is 0 for taps that no filter of
    the group reads, so that pruned weights stay pruned.
    """

    index: Tensor
    alive: Tensor
    prices: Tensor
    of_value: Tensor
    scale: Tensor
    bias: Tensor
    period: Tensor
    start: Tensor
    step_of_rounding: Tensor
    centers: Tensor
    unit: Tensor

    def __init__(
        self, layer: QuantizedLayer, source: Layer, network: IntegerNetwork, building: Building
    ) -> None:
        super().__init__()
        self.layer, self.activation = layer, source.activation
        self.dropped = _dropped(layer, network)
        rows = Rows(source, layer.inputs, network.shapes)
        terms = without_gains(rows, layer)
        kernels = [term.weighted()[1] for term in terms]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.tensor(kernel.weight, dtype=torch.float32)) for kernel in kernels
        )
        index, prices = _packed(rows)
        self._buffer("index", index)
        self._buffer("prices", prices)
        # Weights of one bit cannot be zero, so they read values that no trained filter reads.
        read = [
            read_taps(part.kernel) | read_taps(kernel)
            for part, kernel in zip(rows.parts, kernels, strict=True)
        ]
        alive = np.concatenate([*map(np.ravel, read), [False]])
        self._buffer("alive", alive[index].astype(np.float32))
        own = (self._by_row().detach().abs().long() * self.prices).sum(dim=1)
        limit = building.budget(source)
        # If no width has to be proved, no filter may have a larger span than the widest filter has.
        self.budget = limit.steps if limit is not None and limit.proved else int(own.max())
        self._buffer("of_value", rows.of_value)
        self._buffer("scale", np.broadcast_to(layer.scale, layer.shape).astype(np.float32))
        self.growth = nn.Parameter(torch.zeros(len(rows.rows)))
        self._buffer("bias", np.broadcast_to(layer.real_bias, layer.shape).astype(np.float32))
        unit = self.scale.abs().reshape(len(self.scale), -1)[:, 0].reshape(-1, *[1] * (len(layer.shape) - 1))
        self.register_buffer("unit", unit, persistent=False)
        self.shift = nn.Parameter(torch.zeros(unit.shape))
        self.terms: Any = nn.ModuleList(Steps(term, network.shapes[term.source]) for term in terms)
        self.fold(layer, layer.zero(network.shapes))

    def fold(self, layer: QuantizedLayer, zero: Array) -> None:
        """Take over the window of a layer's lookup, whose accumulators are `zero` for real inputs of zero.

        `period` (C, *1) is the size of the window, and `start` (C, *S) its lower end, in accumulator steps
        without gain, counted from `zero`. A period of infinity says that the window is proved.
        """
        gain, period, start = layer.gain, np.inf, np.zeros(layer.gain.shape)
        if (table := layer.lookup) is not None and not table.proved:
            period = 2.0**table.bits
            start = along_channels(table.minimum, len(layer.shape)) - zero - 0.5 * (1 << table.dropped_bits)
        self._buffer("period", np.broadcast_to(period / gain, gain.shape).astype(np.float32))
        self._buffer("start", (start / gain).astype(np.float32))
        centers = np.zeros(gain.shape, np.int64) if table is None else table.centers[table.which]
        self._buffer("centers", centers.astype(np.float32))
        self._buffer("step_of_rounding", (2.0**self.dropped / gain).astype(np.float32))

    def _buffer(self, name: str, values: Array) -> None:
        self.register_buffer(name, torch.tensor(values), persistent=False)

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        sums: Tensor | float = 0.0
        for steps, source, latent, integers in zip(
            self.terms, self.layer.sources, self.weights, self.integers(), strict=True
        ):
            # The values are exactly the integers; the gradient is that of the latent weights.
            sums = sums + steps(tensors[source], integers + (latent - latent.detach()))
        if self.training and self.dropped and isinstance(sums, Tensor):
            noise = torch.rand_like(sums) - 0.5 + ROUNDING_NOISE * torch.randn_like(sums)
            sums = sums + noise * self.step_of_rounding
        turns = torch.zeros(())
        if bool(self.period.isfinite().all()) and isinstance(sums, Tensor):
            turns = ((sums.detach() - self.start) / self.period).floor()
            sums = sums - turns * self.period
        step = self.scale * self.growth.exp()[self.of_value]
        real = step * sums + self.bias + self.unit * self.shift
        if self.activation is None or self.layer.lookup is None:
            return real
        output = self.layer.lookup.output
        inside = looked_up(real, step, self.activation, output)
        # Outside the window activations are mirrored. Here they are counted from the zero-point.
        mirrored = 2 * (self.centers - output.zero_point) - inside
        return torch.where(turns % 2 == 1, mirrored, inside)

    @torch.no_grad()
    def integers(self) -> list[Tensor]:
        """Return the latent weights rounded to integers of their data type, within the budget.

        A latent weight of size v rounds to at least k units if v is at least k − ½, and exceeds that by
        v − (k − ½). Of all units of all weights, those with the greatest excess for their price are taken
        while the budget lasts.
        """
        latent = self._by_row().nan_to_num().clamp(*self.layer.weight_range)
        sizes = latent.abs()
        units = sizes.round()
        if most := int(units.max()):
            exceeds = sizes[:, :, None] - (torch.arange(most) + 0.5)
            gain = (exceeds / self.prices[:, :, None]).flatten(1)
            gain, order = gain.sort(dim=1, descending=True, stable=True)
            price = self.prices.gather(1, order // most)
            taken = (gain >= 0) & (price.cumsum(1) <= self.budget)
            units = torch.zeros_like(gain).scatter(1, order, taken.to(gain)).reshape(exceeds.shape).sum(2)
        return self._unpacked(units * torch.sign(latent))

    def draw_in(self) -> None:
        """Move the latent weights of each row to the nearest point in the ball of its budget.

        This is the projection on a weighted L1 ball by sorting (Duchi et al. 2008).
        """
        least, greatest = self.layer.weight_range
        latent = self._by_row().clamp(least - 0.5, greatest + 0.5)
        sizes = latent.abs()
        order = (sizes / self.prices).argsort(dim=1, descending=True)
        price = self.prices.gather(1, order)
        excess = (price * sizes.gather(1, order)).cumsum(1) - BALL * self.budget
        pull = (excess / price.square().cumsum(1)).amax(1, keepdim=True).clamp(min=0)
        sizes = (sizes - pull * self.prices).clamp(min=0)
        for weight, drawn in zip(self.weights, self._unpacked(sizes * torch.sign(latent)), strict=True):
            weight.copy_(drawn)

    def rounded(self) -> tuple[IntegerTerms, Array]:
        """Return the terms with integer weights, and the bias (C, *S)."""
        terms = tuple(
            term.with_weight(weight.numpy().astype(np.int64))
            for term, weight in zip(self.layer.terms, self.integers(), strict=True)
        )
        # Start from the layer's own numbers, so that untrained ones stay the same to the last bit.
        step = self.layer.scale * self.growth.double().exp()[self.of_value].numpy()
        bias = self.layer.real_bias + (self.unit * self.shift).double().numpy()
        rounded = IntegerTerms(terms, step, self.layer.weight_range)
        return rounded, np.broadcast_to(bias, self.layer.shape)

    def _by_row(self) -> Tensor:
        """Return the latent weights (rows, n). Short rows are filled up with zeros."""
        flat = torch.cat([weight.flatten() for weight in self.weights])
        return functional.pad(flat, (0, 1))[self.index] * self.alive

    def _unpacked(self, by_row: Tensor) -> list[Tensor]:
        """Return weights that were packed by row, in their original shapes."""
        counts = [weight.numel() for weight in self.weights]
        flat = by_row.new_zeros(sum(counts) + 1)
        flat[self.index] = by_row
        parts = torch.split(flat[:-1], counts)
        return [part.reshape(weight.shape) for part, weight in zip(parts, self.weights, strict=True)]


def _dropped(layer: QuantizedLayer, network: IntegerNetwork) -> int:
    """Return the number of bits that are rounded away before the layer's lookups."""
    rounding = network.config.of_layer("rounding_bits", layer.name)
    if layer.lookup is None or rounding is None:
        return 0
    if not layer.lookup.proved:
        return layer.lookup.dropped_bits
    limit = network.config.accumulator_bits_of(layer.name, looks_up=True)
    return max((layer.lookup.bits if limit is None else limit) - rounding, 0)


def _packed(rows: Rows) -> tuple[Array, Array]:
    """Return `index` and `prices` of the rows. Short rows are filled up at the end, with a price of 1."""
    filters = [part.kernel.weight[0].size for part in rows.parts]
    counts = [part.kernel.weight.size for part in rows.parts]
    first = np.concatenate([[0], np.cumsum(counts)])
    own = [
        np.concatenate([first[p] + c * filters[p] + np.arange(filters[p]) for p, c in row])
        for row in rows.rows
    ]
    index = np.full((len(own), max(map(len, own))), first[-1])
    for row, places in zip(index, own, strict=True):
        row[: len(places)] = places
    prices = [part.range for part in rows.parts]
    return index, np.append(np.repeat(prices, counts), 1)[index]
