"""Finds out whether a network was trained for integers, and takes over how it quantizes its images."""

from dataclasses import replace

import numpy as np

from fheconv.basics.arrays import along_channels, frozen
from fheconv.networks.expression import Expression, X
from fheconv.networks.floats import Finish, Layer, Maximum, Network
from fheconv.networks.grids import trained_quantization
from fheconv.networks.linear import Select
from fheconv.networks.quantization import Quantization


def as_trained(network: Network, *, rounds_weights: bool) -> Network:
    """Return the network with what training for integers has left in it.

    `rounds_weights` says that the model rounds some of its constants. A quantizer of images at the start
    needs no lookup: the client applies it when it encrypts.
    """
    readers = _readers(network, 0)
    quantizers = {number: _of_images(network, number) for number in readers}
    image = next(iter(quantizers.values()), None)
    alike = all(one == image for one in quantizers.values())
    if image is not None and alike and len(network.layers) not in quantizers:
        network = replace(_without(network, set(quantizers)), image=replace(image, clips=True))
    quantized = (trained_quantization(one.activation) for one in network.layers if isinstance(one, Layer))
    if not (rounds_weights or network.image is not None or any(quantized)):
        return network
    return replace(_with_last_bias_in_clear(network), trained=True)


def _with_last_bias_in_clear(network: Network) -> Network:
    """Return the network whose last bias is added in clear: accumulators would hold whole steps of it."""
    last = network.layers[-1]
    if isinstance(last, Maximum) or not last.bias.any():
        return network
    first = along_channels(last.bias.reshape(len(last.bias), -1)[:, 0], last.bias.ndim)
    shift = Expression("add", (X, frozen(first if (last.bias == first).all() else last.bias)))
    finish = Finish(activation=X) if network.finish is None else network.finish
    finish = replace(finish, activation=finish.activation.of(shift))
    layers = (*network.layers[:-1], replace(last, bias=frozen(np.zeros(last.shape))))
    return replace(network, layers=layers, finish=finish)


def _readers(network: Network, number: int) -> list[int]:
    """Return the numbers of the tensors that are computed from tensor `number`."""
    return [at for at, layer in enumerate(network.layers, 1) if number in layer.sources]


def _of_images(network: Network, number: int) -> Quantization | None:
    """Return the quantization that tensor `number` is of the image, None if it is something else."""
    layer = network.layers[number - 1]
    if isinstance(layer, Maximum) or layer.activation is None or len(layer.terms) > 1:
        return None
    (term,), bias = layer.terms, float(layer.bias.flat[0])
    if (layer.bias != bias).any():
        return None
    factor = term.factor
    for step in term.steps:
        if isinstance(step, Select):
            same = step.is_identity(network.input_shape)
        else:
            values = step.weight.ravel()
            alone = values.size == len(step.weight) == step.geometry.groups
            same = alone and step.output_shape(network.input_shape) == network.input_shape
            same, factor = same and bool((values == values[0]).all()), factor * float(values[0])
        if not same:
            return None
    function = layer.activation.of(Expression("add", (Expression("mul", (X, factor)), bias)))
    found = trained_quantization(function)
    return found if found is not None and _rounds_to(function, found) else None


def _rounds_to(function: Expression, quantization: Quantization) -> bool:
    """Return whether a function only rounds to the numbers of a quantization, and clips."""
    if function.arrays():
        return False
    low, high = quantization.real_range
    beyond = np.linspace(2 * low - high, 2 * high - low, 50 * quantization.maximum + 1)
    steps = beyond / quantization.scale
    beyond = beyond[np.abs(steps % 1 - 0.5) > 1e-3]  # the middle between two numbers may go to either
    expected = quantization.real(quantization.nearest(beyond))
    return bool(np.abs(function(beyond) - expected).max() <= 1e-3 * quantization.scale)


def _without(network: Network, quantizers: set[int]) -> Network:
    """Return the network without some layers, whose readers then read the image."""
    kept = [number for number in range(1, len(network.layers) + 1) if number not in quantizers]
    numbers = {0: 0, **dict.fromkeys(quantizers, 0), **{old: new for new, old in enumerate(kept, 1)}}
    layers: list[Layer | Maximum] = []
    for layer in (network.layers[number - 1] for number in kept):
        if isinstance(layer, Maximum):
            layers.append(replace(layer, source=numbers[layer.source]))
        else:
            terms = tuple(replace(term, source=numbers[term.source]) for term in layer.terms)
            layers.append(replace(layer, terms=terms))
    return replace(network, layers=tuple(layers))
