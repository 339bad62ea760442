"""Takes the activation from a channel of a trained network, which then needs no lookups.

The channel becomes the linear function of its sums that is nearest to its activation. So whatever read it
reads what the channel was computed from: two convolutions after each other, which merge into one. (See Cho et
al. 2022, "Selective Network Linearization", which trains which activations to keep.) Where they do not merge,
or would cost more than the lookups, the channel becomes its mean, which biases hold (structured pruning).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np

from fheconv.basics.arrays import Array, Shape, along_channels, frozen
from fheconv.capture.merging import merged, summed
from fheconv.networks.floats import Layer, Network
from fheconv.networks.linear import Term


@dataclass(frozen=True, kw_only=True)
class Thinned:
    """A network during thinning: the remaining network, and the original that it must imitate.

    `original` is the trained network, with the same poolings moved, and with the same terms. Those that came
    for linear channels have the weight 0 there. `means` maps the number of a tensor to one number for each
    channel (C,). For a channel without activation it is the mean of what biases hold instead. For other
    channels it is 0.
    """

    network: Network
    original: Network
    means: dict[int, Array]


class Fit(NamedTuple):
    """The linear function `slope` · x + `offset` that takes the place of an activation."""

    slope: float
    offset: float


def fits_of(sums: Array, activations: Array) -> Iterator[Fit]:
    """Yield the linear function of least squared error, and the best constant.

    Example:
        >>> x = np.array([-1.0, 0.0, 1.0, 2.0])
        >>> [(round(slope, 2), round(offset, 2)) for slope, offset in fits_of(x, np.maximum(x, 0))]
        [(0.7, 0.4), (0.0, 0.75)]
    """
    away, mean = sums - sums.mean(), float(activations.mean())
    square = float(np.square(away).sum())
    if square > 0:
        slope = float((away * activations).sum()) / square
        yield Fit(slope, mean - slope * float(sums.mean()))
    yield Fit(0.0, mean)


def without_activation(now: Thinned, number: int, channel: int, fit: Fit) -> Thinned | None:
    """Return the network in which a channel of tensor `number` is linear in its sums.

    Return None if its readers cannot do without it, or would cost more than its lookups.
    """
    network, layer = now.network, now.network.layers[number - 1]
    gone = np.arange(network.shapes[number][0]) == channel
    rescaled = network.rescaled(number, 1.0 - gone)
    if rescaled is None or not isinstance(layer, Layer):
        return None
    # What biases hold instead: the channel without its inputs.
    alone = {source: np.where(factors == 0, fit.offset, 0.0) for source, factors in rescaled[1].items()}
    slopes = fit.slope * gone
    if fit.slope:
        if len(alone) > 1 or layer.factor_terms is not None:
            return None  # neither is a maximum of linear functions linear, nor a product
        alone[number] += along_channels(slopes, layer.bias.ndim) * layer.bias
    layers, originals = [], []
    for before, after, original in zip(network.layers, rescaled[0].layers, now.original.layers, strict=True):
        if isinstance(before, Layer) and isinstance(after, Layer) and isinstance(original, Layer):
            read = [term for term in before.terms if term.source in alone]
            bias = after.bias + sum(term.factor * term.apply(alone[term.source][None])[0] for term in read)
            paths = _paths(layer, slopes, read, network.shapes) if fit.slope and read else []
            if paths is None or (paths and before.factor_terms is not None):
                return None
            after = replace(after, bias=frozen(bias), terms=summed([*after.terms, *paths]))
            unused = [path.with_weight(np.zeros_like(path.weighted()[1].weight)) for path in paths]
            original = replace(original, terms=summed([*original.terms, *unused]))
        layers.append(after)
        originals.append(original)
    means = dict(now.means)
    for source, value in alone.items():
        means[source] = means.get(source, 0.0) + value.reshape(len(value), -1).mean(axis=1)
    return replace(
        now,
        network=replace(network, layers=tuple(layers)),
        original=replace(now.original, layers=tuple(originals)),
        means=means,
    )


def _paths(
    layer: Layer, slopes: Array, readers: Sequence[Term], shapes: Sequence[Shape]
) -> list[Term] | None:
    """Return terms that compute what `readers` read of a layer, were it its sums times `slopes` (C,).

    They read what the layer reads. None if its convolutions and those of the readers do not merge.
    """
    paths: dict[int, list[Term]] = {}
    for inner, outer in product(layer.terms, readers):
        scaled = inner.scaled(slopes, layer.bias.ndim - 1)
        steps, factor = (*scaled.steps, *outer.steps), scaled.factor * outer.factor
        paths.setdefault(inner.source, []).append(Term(source=inner.source, steps=steps, factor=factor))
    found = []
    for source, chains in paths.items():
        made = merged(chains, shapes[source])
        if made is None:
            return None
        found += [term for term in made if term.inexact()]  # without weights, nothing of the channel is read
    return found
