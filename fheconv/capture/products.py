"""Multiplies encrypted values: xy = (x + y)²/4 − (x − y)²/4, two lookups for each product.

Everything else is linear. Where x and y have different sizes, one of the squares would hide the other factor;
the quantizer weighs the factors against each other, because only it sees images
(`fheconv.quantizer.factors`).
"""

import numpy as np

from fheconv.capture.calls import BATCH, Call, broadcast, move
from fheconv.capture.graph import Value
from fheconv.networks.expression import Expression, X
from fheconv.networks.linear import pointwise


def multiplied(call: Call, x: Value, y: Value) -> Value:
    """Multiply two encrypted values, which are repeated to the result's shape.

    A factor that is repeated, such as one for each channel, is looked up before, once for each of its values.
    """
    shape, graph = call.shape or (1,), call.graph
    a, b = (
        graph.affine(move(call, broadcast(call, value, call.shape), lambda t: t.reshape(BATCH, *shape)))
        for value in (x, y)
    )
    if not (a.terms and b.terms):  # one of them is constant after all
        constant, other = (b, a) if a.terms else (a, b)
        product = graph.scale(other, constant.bias, call.name)
    else:
        channels, axes = shape[0], len(shape) - 1
        both = pointwise(np.ones((2 * channels, 1)), axes, groups=channels)
        signs = pointwise(np.tile([[1.0], [-1.0]], (channels, 1)), axes, groups=channels)
        difference = pointwise(np.tile([[1.0, -1.0]], (channels, 1)), axes, groups=channels)
        first, second = graph.linear(a, both, call.name), graph.linear(b, signs, call.name)
        squares = graph.squares(first, second, call.name)
        product = graph.linear(squares, difference, call.name, factor=0.25)
    return move(call, product, lambda t: t.reshape(BATCH, *call.shape))


def divided(call: Call, x: Value, y: Value) -> Value:
    """Divide by an encrypted value, which is a product with its reciprocal."""
    inverse = call.graph.apply(y, Expression("reciprocal", (X,)), call.name, call.read_once)
    return multiplied(call, x, inverse)


def glu(call: Call, x: Value, dim: int = -1) -> Value:
    """Multiply the first half of an axis with the sigmoid of the second half."""
    call.axis(dim, x.shape)
    half, gate = move(call, x, lambda t: t.chunk(2, dim))
    return multiplied(call, half, call.graph.apply(gate, Expression("sigmoid", (X,)), call.name))
