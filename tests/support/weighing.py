"""Counts what a captured network would quantize."""

from fheconv.networks.floats import Layer


def weights(network) -> int:
    """How many weights are to be quantized."""
    layers = (layer for layer in network.layers if isinstance(layer, Layer))
    return sum(term.weighted()[1].weight.size for layer in layers for term in layer.terms)
