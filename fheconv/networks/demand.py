"""Finds the values that a network's results depend on."""

import numpy as np

from fheconv.basics.arrays import Array
from fheconv.networks.floats import Maximum, Network
from fheconv.networks.integers import IntegerNetwork, QuantizedLayer


def demand(network: Network | IntegerNetwork) -> list[Array]:
    """Return a mask for each tensor: the values that the network's results depend on.

    The masks are traced backwards from the results. A value counts as read if the trained weights read it,
    even if the integer weights are zero there. It also counts if the integer weights read it: integers of one
    bit cannot be zero. If nothing reads a tensor, its first value counts, because Concrete has no empty
    tensors.
    """
    source = network.source if isinstance(network, IntegerNetwork) else network
    masks = [np.zeros(shape, bool) for shape in network.shapes]
    masks[-1][:] = True
    for number in reversed(range(len(network.layers))):
        layer, integers, wanted = source.layers[number], network.layers[number], masks[number + 1]
        wanted.flat[0] |= not wanted.any()
        if isinstance(layer, Maximum):
            masks[layer.source].reshape(-1)[layer.index[:, wanted].ravel()] = True
        else:
            for term in (*layer.terms, *(integers.terms if isinstance(integers, QuantizedLayer) else ())):
                masks[term.source] |= term.read(wanted, network.shapes[term.source])
    masks[0].flat[0] |= not masks[0].any()
    return masks
