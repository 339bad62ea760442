"""Finds the connected groups of things, from pairs that belong together."""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fheconv.basics.arrays import Array


def connected(pairs: Array, count: int) -> Array:
    """Return labels (count,) of `count` things: equal labels for things that `pairs` (2, n) connect."""
    edges = np.unique(pairs, axis=1)
    graph = coo_array((np.ones(edges.shape[1]), (edges[0], edges[1])), shape=(count, count))
    labels: Array = connected_components(graph, directed=False)[1]
    return labels
