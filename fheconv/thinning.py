"""Networks with fewer lookups: what hardly matters is taken out of a trained network.

The price of an encrypted image is that of its lookups, one for each value of an activation. Two changes save
them by the dozen: a channel is replaced by its mean, which the biases of its readers take up (structured
pruning), and an average pooling moves before the activation that it follows, where it costs nothing.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import scipy.linalg

from fheconv.arrays import Array, frozen
from fheconv.errors import InvalidArgumentError
from fheconv.network import Layer, Maximum, Network, Quantization
from fheconv.progress import status
from fheconv.pruning import demand
from fheconv.quantizer.weights import Rows
from fheconv.steps import Kernel, is_pooling

# On so many images, at most, changes are compared.
MOST_IMAGES = 200
# How much weights that are fitted again hold on to what they were, as a share of the inputs' variance.
RIDGE = 0.01
# Real numbers as they are, for `Rows`.
UNIT = Quantization(scale=1.0, zero_point=0, minimum=0, maximum=1)


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
    square, for each lookup that it saves. After each, the weights are fitted again, layer by layer, to
    compute from what is left what the trained network did (He et al. 2017). Training makes up for much of
    the rest.

    Raises `InvalidArgumentError`, with the least number that it comes to, if that is more than the budget.
    """
    original, meant = network, network.tensors(images)[-1]
    some = slice(None, None, -(-len(images) // MOST_IMAGES))

    def price(changed: Network) -> float:
        saved = needed - lookups(changed)
        error = np.square(changed.tensors(images[some])[-1] - meant[some]).mean()
        return float(error) / saved if saved > 0 else np.inf

    with status("Looking for lookups that hardly matter…"):
        while (needed := lookups(network)) > lookup_budget:
            priced = [(price(changed[0]), *changed) for changed in _changes(network, original, images[some])]
            least, network, original = min(
                priced, key=lambda one: one[0], default=(np.inf, network, original)
            )
            if least == np.inf:
                raise InvalidArgumentError(
                    f"lookup_budget={lookup_budget} is too small: with all taken out that can be, and one "
                    f"channel left of each activation, this network still needs {needed} lookups; allow as "
                    "many, or train a smaller network."
                )
            network = _fitted(network, original, images)
    return network


def _fitted(network: Network, original: Network, images: Array) -> Network:
    """Return the network with weights and biases that best give what the original's layers sum.

    Both have the same layers and shapes. What no filter of the network reads stays unread.
    """
    meant, tensors, layers = original.tensors(images), [images.astype(np.float64)], [*network.layers]
    for number, (layer, trained) in enumerate(zip(network.layers, original.layers, strict=True)):
        if isinstance(layer, Layer) and isinstance(trained, Layer):
            inputs = [UNIT] * len(layer.terms)
            rows, before = (Rows(one, inputs, network.shapes) for one in (layer, trained))
            none = [1.0] * len(inputs), [0] * len(inputs)
            delivered, wanted = rows.windows(tensors, *none), before.windows(meant, *none)
            weights = [rows.weights(row) for row in rows.rows]
            for numbers in rows.alike():
                row = rows.rows[numbers[0]]
                now = np.stack([weights[n] for n in numbers])
                then = np.stack([before.weights(before.rows[n]) for n in numbers])
                read = (now != 0).any(axis=0)
                moment = rows.covariance(row, delivered, delivered)[np.ix_(read, read)]
                ridge = RIDGE * np.trace(moment) / max(len(moment), 1)
                if ridge > 0:
                    target = rows.covariance(row, delivered, wanted)[read] @ then.T + ridge * now.T[read]
                    moment += ridge * np.eye(len(moment))
                    now[:, read] = scipy.linalg.solve(moment, target, assume_a="pos").T
                for n, values in zip(numbers, now, strict=True):
                    weights[n] = values
            layer = replace(layer, terms=rows.terms(weights))
            off = trained.sums(meant) - layer.sums(tensors)
            mean = off.mean(axis=(0, *range(2, off.ndim))).reshape(-1, *[1] * (off.ndim - 2))
            layers[number] = replace(layer, bias=frozen(layer.bias + mean))
        tensors.append(layers[number].output(tensors))
    return replace(network, layers=tuple(layers))


def _changes(network: Network, original: Network, images: Array) -> Iterator[tuple[Network, Network]]:
    """Yield the network with each of the changes that can be made, and what it is to compute then."""
    masks, tensors = demand(network), network.tensors(images)
    for number, layer in enumerate(network.layers, 1):
        if isinstance(layer, Layer) and layer.activation is not None:
            read = np.flatnonzero(masks[number].reshape(layer.shape[0], -1).any(axis=1))
            for channel in read if len(read) > 1 else []:
                changed = _without(network, number, int(channel), float(tensors[number][:, channel].mean()))
                if changed is not None:
                    yield changed, original
            pooled, both = _pooled_before(network, number), _pooled_before(original, number)
            if pooled is not None and both is not None:
                yield pooled, both


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
