"""Makes the float weights of a network trainable, for lookups whose windows are chosen again afterwards.

A window that needs no proof follows what the sums reach. So integer weights cannot be trained inside the
window of the start: its columns would be others afterwards. Here the float weights are trained. Sums are
rounded to columns over the range that each channel reaches in the batch, so that training feels what a wide
range costs. Then the trained floats are quantized from scratch.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fheconv.basics.arrays import Array, Shape, along_channels, frozen
from fheconv.networks.expression import Expression
from fheconv.networks.floats import Layer, Maximum
from fheconv.networks.integers import IntegerNetwork, Lookup, QuantizedLayer
from fheconv.networks.linear import Term
from fheconv.quantizer.layerwise import quantize_network
from fheconv.quantizer.rows import read_taps
from fheconv.training.modules import MaximumModule, Steps, check_finite, image_steps
from fheconv.training.straight_through import slopes, with_slopes

# The share of its range that is added to both ends of a channel, as the quantizer does at least.
MARGIN = 0.05
# The standard deviation of the noise that stands for approximate rounding, in columns.
ROUNDING_NOISE = 0.5
# One step of a parameter is what so many columns are of a whole table. Finer columns lose less, and so need
# smaller changes.
COLUMNS = 2
# A channel whose sums are all equal still has columns, of this size.
LEAST_SPAN = 1e-30
# A slope is taken over at least this share of a value.
NEAR = 1e-6
# What `quantized` returns is of the type of the network that training began with.
AnyNetwork = TypeVar("AnyNetwork", bound=IntegerNetwork)


class RequantizableNetwork(nn.Module, Generic[AnyNetwork]):
    """The float network of an integer network, to be trained. It maps images (N, C, *S) to the last sums.

    Parameters are the changes of weights, and one change of each channel's bias. They start at 0. Their units
    suit one learning rate: shares of the greatest weight of a filter, and of the standard deviation of the
    layer's sums on `calibration` (N, C, *S). The share is 2 in 2^K if lookups have K bits.

    Before each lookup the sums are rounded to as many columns as the lookup has, over the range of each
    channel in the batch. The gradient passes through the rounding, and includes that of the size of a column,
    which is the range's (as in LSQ, Esser et al. 2020). In training mode, noise is added before rounding.
    """

    def __init__(self, network: AnyNetwork, calibration: Array) -> None:
        super().__init__()
        self.network = network
        tensors = network.source.tensors(calibration)
        tables = [one.lookup for one in network.layers if isinstance(one, QuantizedLayer)]
        bits = min((table.column_bits for table in tables if table is not None), default=1)
        unit = COLUMNS / 2**bits
        layers: list[nn.Module] = []
        for layer, source in zip(network.layers, network.source.layers, strict=True):
            if isinstance(source, Maximum):
                layers.append(MaximumModule(source))
            elif isinstance(layer, QuantizedLayer):
                layers.append(_Layer(source, layer.lookup, tensors, unit))
        self.layers: Any = nn.ModuleList(layers)

    def forward(self, images: Tensor) -> Tensor:
        """Return the sums (N, K, *Out) of the last layer. Images are rounded as the network rounds them."""
        tensors = [image_steps(images, self.network.input) * self.network.input.scale]
        for layer in self.layers:
            tensors.append(layer(tensors))
        return tensors[-1]

    def weight_parameters(self) -> list[nn.Parameter]:
        """Return the changes of weights."""
        layers = [layer for layer in self.layers if isinstance(layer, _Layer)]
        return [term.change for layer in layers for term in layer.terms if term.change is not None]

    def other_parameters(self) -> list[nn.Parameter]:
        """Return the changes of biases."""
        return [layer.shift for layer in self.layers if isinstance(layer, _Layer)]

    def draw_in(self) -> None:
        """Do nothing: float weights need no limits."""

    @torch.no_grad()
    def quantized(self, calibration: Array) -> AnyNetwork:
        """Return what the trained floats become, quantized from scratch with calibration images (N, C, *S).

        Raises `CalibrationError` if training has diverged, and the errors of `quantize_network`.
        """
        check_finite(self)
        network = self.network
        layers = tuple(
            layer.trained() if isinstance(layer, _Layer) else source
            for layer, source in zip(self.layers, network.source.layers, strict=True)
        )
        source = replace(network.source, layers=layers)
        again = quantize_network(source, calibration, network.calibrated, network.config)
        return type(network).of(again)


class _Layer(nn.Module):
    """A trainable layer in floats: Σ terms plus the bias, rounded to columns, then the activation.

    The weights of a term that only moves values stay as they are. So do those that no filter reads, which
    were pruned.
    """

    bias: Tensor
    channel: Tensor

    def __init__(self, source: Layer, lookup: Lookup | None, tensors: Sequence[Array], unit: float) -> None:
        super().__init__()
        self.source = source
        self.columns = None if lookup is None else 2**lookup.column_bits
        self.levels = 0 if lookup is None else lookup.output.maximum - lookup.output.minimum
        self.terms: Any = nn.ModuleList(
            _Term(term, tensors[term.source].shape[1:], unit) for term in source.terms
        )
        sums = source.sums(tensors)
        deviation = float((sums - sums.mean(axis=(0, *range(2, sums.ndim)), keepdims=True)).std())
        self.unit_of_shift = unit * (deviation or 1.0)
        self.register_buffer("bias", torch.tensor(source.bias, dtype=torch.float32), persistent=False)
        channel = torch.arange(len(source.bias)).reshape(-1, *[1] * (source.bias.ndim - 1))
        self.register_buffer("channel", channel, persistent=False)
        self.shift = nn.Parameter(torch.zeros(len(source.bias), *[1] * (source.bias.ndim - 1)))

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        sums = self.bias + self.unit_of_shift * self.shift
        for term in self.terms:
            sums = sums + term(tensors)
        if self.source.activation is None or self.columns is None:
            return sums
        output = self._looked_up(sums, self.columns, self.source.activation)
        step = (output.amax() - output.amin()).clamp(min=LEAST_SPAN) / self.levels
        at = output / step
        return step * (at + (at.round() - at).detach())

    def _looked_up(self, sums: Tensor, columns: int, activation: Expression) -> Tensor:
        """Return the activations of the sums, rounded to the columns of their channel's range."""
        axes = [0, *range(2, sums.ndim)]
        least, greatest = sums.amin(axes, keepdim=True), sums.amax(axes, keepdim=True)
        margin = MARGIN * (greatest - least).clamp(min=LEAST_SPAN)
        start, column = least - margin, (greatest - least + 2 * margin) / columns
        at = (sums - start) / column
        with torch.no_grad():
            noisy = at + ROUNDING_NOISE * torch.randn_like(at) if self.training else at
            number = noisy.round().clamp(0, columns - 1)
        rounded = start + column * (at + (number - at).detach())
        values, steepness = _table(activation, start, column, columns)
        where = number.nan_to_num().long() * len(self.channel) + self.channel
        return with_slopes(rounded, values[where], steepness[where])

    def trained(self) -> Layer:
        """Return the float layer with what training has made of it."""
        shift = self.unit_of_shift * self.shift.double().numpy()
        terms = tuple(term.trained() for term in self.terms)
        return replace(self.source, terms=terms, bias=frozen(self.source.bias + shift))


class _Term(nn.Module):
    """One term of a layer."""

    weight: Tensor
    unit: Tensor

    def __init__(self, term: Term, shape: Shape, unit: float) -> None:
        super().__init__()
        self.term = term
        _, kernel = term.weighted()
        self.steps = Steps(term, shape)
        greatest = np.abs(kernel.weight).reshape(len(kernel.weight), -1).max(axis=1)
        self.exact_unit = unit * along_channels(greatest, kernel.weight.ndim) * read_taps(kernel)
        self.register_buffer("unit", torch.tensor(self.exact_unit, dtype=torch.float32), persistent=False)
        self.register_buffer("weight", torch.tensor(kernel.weight, dtype=torch.float32), persistent=False)
        self.change = None if term.is_plain() else nn.Parameter(torch.zeros(kernel.weight.shape))

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        weight = self.weight if self.change is None else self.weight + self.unit * self.change
        sums: Tensor = self.steps(tensors[self.term.source], weight)
        return self.term.factor * sums

    def trained(self) -> Term:
        """Return the float term with what training has made of it."""
        if self.change is None:
            return self.term
        _, kernel = self.term.weighted()
        return self.term.with_weight(kernel.weight + self.exact_unit * self.change.double().numpy())


@np.errstate(invalid="ignore", over="ignore")  # if training has diverged, `quantized` raises
def _table(activation: Expression, start: Tensor, column: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return an activation at each column of each channel, and its slope over that column, both flat."""
    first, size = start.detach().double().numpy(), column.detach().double().numpy()
    x = first + size * np.arange(columns).reshape(-1, *[1] * (first.ndim - 1))
    # Where all sums of a channel are equal, its columns vanish beside them.
    half = np.maximum(size / 2, NEAR * np.abs(x))
    both = activation(x), slopes(activation, x, half)
    values, steepness = (torch.as_tensor(one.ravel(), dtype=start.dtype) for one in both)
    return values, steepness
