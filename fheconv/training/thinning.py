"""Removes lookups that hardly matter from a trained network.

The price of an encrypted image is the price of its lookups, one for each value of an activation. Three
changes save many lookups at once. First, a channel loses its activation, and becomes linear or constant
(`fheconv.training.linear_channels`). Second, an average pooling that follows an activation is moved before
it, where it costs nothing. Third, so is a max pooling, which becomes an average.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np

from fheconv.basics.arrays import Array, along_channels, channel_means, frozen
from fheconv.basics.errors import LookupBudgetError
from fheconv.basics.progress import status
from fheconv.networks.demand import demand
from fheconv.networks.floats import Layer, Maximum, Network
from fheconv.networks.quantization import Quantization
from fheconv.quantizer.evidence import least_squares
from fheconv.quantizer.rows import Rows
from fheconv.training.linear_channels import Thinned, fits_of, without_activation
from fheconv.training.pooling import averaged_before, only_maximum, pooled_before, renumbered

# Changes are compared on at most this many images.
MOST_IMAGES = 200
# For `Rows`: real numbers without a scale.
UNIT = Quantization(scale=1.0, zero_point=0, minimum=0, maximum=1)


def lookups(network: Network) -> int:
    """Return the number of lookups for one image."""
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

    Changes are made one at a time. Each time, the change is taken that changes the results on `images`
    (N, C, *S) the least, by mean square, for each lookup that it saves. After each change, the weights of the
    smaller network are fitted again, layer by layer, to the sums of the trained network (He et al. 2017).
    Training makes up for much of the remaining error.

    Raises `LookupBudgetError` if the budget cannot be met. The message names the least possible number.
    """
    now, meant = Thinned(network=network, original=network, means={}), network.tensors(images)[-1]
    some = slice(None, None, -(-len(images) // MOST_IMAGES))

    def price(changed: Network) -> float:
        saved = needed - lookups(changed)
        error = np.square(changed.tensors(images[some])[-1] - meant[some]).mean()
        return float(error) / saved if saved > 0 else np.inf

    with status("Looking for lookups that hardly matter…"):
        while (needed := lookups(now.network)) > lookup_budget:
            priced = [(price(changed.network), changed) for changed in _changes(now, images[some])]
            least, now = min(priced, key=lambda one: one[0], default=(np.inf, now))
            if least == np.inf:
                raise LookupBudgetError(
                    f"lookup_budget={lookup_budget} is too small: with all taken out that can be, this "
                    f"network still needs {needed} lookups; allow as many, or train a smaller network "
                    "(fheconv.distill)."
                )
            now = replace(now, network=fitted(now, images))
    return now.network


def fitted(now: Thinned, images: Array) -> Network:
    """Return the network with the weights and biases that best reproduce the sums of the original's layers.

    `thinned` calls it after each change. Values that no filter of the network reads stay unread.
    """
    network, original = now.network, now.original
    meant, tensors, layers = original.tensors(images), [images.astype(np.float64)], [*network.layers]
    # The biases already hold the means, so the weights are fitted without them.
    beyond = [
        x - along_channels(now.means[n], x.ndim - 1) if n in now.means else x for n, x in enumerate(meant)
    ]
    for number, (layer, trained) in enumerate(zip(network.layers, original.layers, strict=True)):
        if isinstance(layer, Layer) and isinstance(trained, Layer):
            inputs = [UNIT] * len(layer.terms)
            rows, before = (Rows(one, inputs, network.shapes) for one in (layer, trained))
            none = [1.0] * len(inputs), [0] * len(inputs)
            delivered, wanted = rows.windows(tensors, *none), before.windows(beyond, *none)
            weights = [rows.weights(row) for row in rows.rows]
            for batch in rows.together():
                numbers = batch.numbers
                read, once = (np.stack([r.read(r.rows[n]) for n in numbers]) for r in (rows, before))
                if not batch.joint and (read & ~once).any():
                    continue  # what linear channels add is known, but not how it covaries with the rest
                free, held = batch.over_inputs(read), np.stack([weights[n] for n in numbers])
                then = batch.over_inputs(before.stacked(numbers))
                some = free.any(axis=0)
                moment, target = rows.covariances(batch, delivered, wanted, then)
                moment, target = moment[np.ix_(some, some)], target[some]
                fitted_rows = batch.over_inputs(held)
                fitted_rows[:, some] = least_squares(moment, target, fitted_rows[:, some], free[:, some])
                for n, values in zip(numbers, batch.of_weights(fitted_rows), strict=True):
                    weights[n] = values
            layer = replace(layer, terms=rows.terms(weights))
            mean = channel_means(trained.sums(meant) - layer.sums(tensors))
            layers[number] = replace(layer, bias=frozen(layer.bias + mean))
        tensors.append(layers[number].output(tensors))
    return replace(network, layers=tuple(layers))


def _changes(now: Thinned, images: Array) -> Iterator[Thinned]:
    """Yield the network after each change that can be made."""
    network = now.network
    masks, tensors = demand(network), network.tensors(images)
    for number, layer in enumerate(network.layers, 1):
        if isinstance(layer, Layer) and layer.activation is not None:
            read = np.flatnonzero(masks[number].reshape(layer.shape[0], -1).any(axis=1))
            sums = layer.sums(tensors)
            for channel in read:
                fits = fits_of(sums[:, channel], tensors[number][:, channel])
                # The last channel must not be constant: results would no longer depend on the image.
                allowed = (fit for fit in fits if fit.slope or len(read) > 1)
                changed = (without_activation(now, number, int(channel), fit) for fit in allowed)
                yield from islice((one for one in changed if one is not None), 1)
            pooled, both = pooled_before(network, number), pooled_before(now.original, number)
            if pooled is not None and both is not None:
                yield replace(now, network=pooled, original=both)
            place = only_maximum(network, number)
            if place is None or only_maximum(now.original, number) != place:
                continue
            pooled, both = (averaged_before(one, number, images) for one in (network, now.original))
            if pooled is not None and both is not None:
                means = {renumbered(n, place + 1, number): m for n, m in now.means.items() if n != number}
                yield replace(now, network=pooled, original=both, means=means)
