"""Networks with fewer lookups: what hardly matters is taken out of a trained network.

The price of an encrypted image is that of its lookups, one for each value of an activation. Two changes save
them by the dozen: a channel is replaced by its mean, which the biases of its readers take up (structured
pruning), and an average pooling moves before the activation that it follows, where it costs nothing.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from fheconv.arrays import Array, frozen
from fheconv.errors import InvalidArgumentError
from fheconv.network import Layer, Maximum, Network
from fheconv.progress import status
from fheconv.pruning import demand
from fheconv.steps import Kernel, is_pooling

# On so many images, at most, changes are compared.
MOST_IMAGES = 200


def lookups(network: Network) -> int:
    """Return how many lookups an image takes."""
    masks = demand(network)
    count = 0
    for layer, mask in zip(network.layers, masks[1:], strict=True):
        if isinstance(layer, Maximum):
            count += (len(layer.index) - 1) * int(mask.sum())
        elif layer.activation is not None:
            count += int(mask.sum())
    return count


def thinned(network: Network, images: Array, lookup_budget: int) -> Network:
    """Return the network with the changes that matter least, and at most `lookup_budget` lookups.

    Changes are made one at a time: the one that changes the results on `images` (N, C, *S) the least, by mean
    square, for each lookup that it saves. Training makes up for much of it.

    Raises `InvalidArgumentError`, with the least number that it comes to, if that is more than the budget.
    """
    images = images[:: -(-len(images) // MOST_IMAGES)]
    meant = network.tensors(images)[-1]

    def price(changed: Network) -> float:
        saved = needed - lookups(changed)
        return float(np.square(changed.tensors(images)[-1] - meant).mean()) / saved if saved > 0 else np.inf

    with status("Looking for lookups that hardly matter…"):
        while (needed := lookups(network)) > lookup_budget:
            priced = [(price(changed), changed) for changed in _changes(network, images)]
            least, network = min(priced, key=lambda pair: pair[0], default=(np.inf, network))
            if least == np.inf:
                raise InvalidArgumentError(
                    f"lookup_budget={lookup_budget} is too small: with all taken out that can be, and one "
                    f"channel left of each activation, this network still needs {needed} lookups; allow as "
                    "many, or train a smaller network."
                )
    return network


def _changes(network: Network, images: Array) -> Iterator[Network]:
    """Yield the network with each of the changes that can be made."""
    masks, tensors = demand(network), network.tensors(images)
    for number, layer in enumerate(network.layers, 1):
        if isinstance(layer, Layer) and layer.activation is not None:
            read = np.flatnonzero(masks[number].reshape(layer.shape[0], -1).any(axis=1))
            for channel in read if len(read) > 1 else []:
                changed = _without(network, number, int(channel), float(tensors[number][:, channel].mean()))
                if changed is not None:
                    yield changed
            pooled = _pooled_before(network, number)
            if pooled is not None:
                yield pooled


def _without(network: Network, number: int, channel: int, mean: float) -> Network | None:
    """Return the network with a channel of tensor `number` replaced by its mean; None if it cannot be."""
    kept = np.ones(network.shapes[number][0])
    kept[channel] = 0
    rescaled = network.rescaled(number, kept)
    if rescaled is None:
        return None
    layers = []
    for before, after in zip(network.layers, rescaled[0].layers, strict=True):
        if isinstance(before, Layer) and isinstance(after, Layer):
            bias = after.bias
            for term in before.terms:
                if term.source in rescaled[1]:
                    mean_alone = np.where(rescaled[1][term.source] == 0, mean, 0.0)[None]
                    bias = bias + term.factor * term.apply(mean_alone)[0]
            after = replace(after, bias=frozen(bias))
        layers.append(after)
    return replace(network, layers=tuple(layers))


def _pooled_before(network: Network, number: int) -> Network | None:
    """Return the network with the average pooling that reads activation `number` before it, or None.

    All that reads the activation must start with the same pooling, of windows without padding.
    """
    layer = network.layers[number - 1]
    readers = [
        term
        for reader in network.layers
        for term in (reader.terms if isinstance(reader, Layer) else ())
        if term.source == number
    ]
    firsts = [term.steps[0] if term.steps else None for term in readers]
    pool = firsts[0] if firsts else None
    if (
        not isinstance(layer, Layer)
        or not isinstance(pool, Kernel)
        or not is_pooling(pool)
        or pool.geometry.expands
        or any(isinstance(one, Maximum) and one.source == number for one in network.layers)
        or not all(
            isinstance(one, Kernel) and is_pooling(one) and one.geometry == pool.geometry for one in firsts
        )
    ):
        return None
    window = int(np.prod(pool.geometry.kernel))
    layers = []
    for place, one in enumerate(network.layers, 1):
        if isinstance(one, Layer):
            terms, bias = one.terms, one.bias
            if place == number:
                terms = tuple(
                    replace(term, steps=(*term.steps, pool), factor=term.factor / window) for term in terms
                )
                bias = frozen(pool.apply(bias[None], 0)[0] / window)
            terms = tuple(
                replace(term, steps=term.steps[1:], factor=term.factor * window)
                if term.source == number
                else term
                for term in terms
            )
            one = replace(one, terms=terms, bias=bias)
        layers.append(one)
    return replace(network, layers=tuple(layers))
