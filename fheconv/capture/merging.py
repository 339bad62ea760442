"""Merges layers in a row with no activation between them, or says where to cut them apart with a lookup.

A term of a layer quantizes the weights of one convolution: after two roundings in a row, the widths of both
would add up in one accumulator. So several become one convolution, several that add up, or a dense matrix,
whichever has the fewest multiplications. None of these takes a lookup. If the product is so much larger than
its factors that lookups between them are cheaper, or is too large at all, it is cut: the values in between
are looked up, like those of an activation.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fheconv.arithmetic import OUTSIDE
from fheconv.basics.arrays import Shape, frozen
from fheconv.networks.composition import composed
from fheconv.networks.linear import Kernel, Select, Step, Term, is_pooling
from fheconv.networks.matrices import TERM_COST, chains, matrix_of

# A lookup of five bits, 5 ms, takes as long as so many multiplications with a weight, 1.2 µs each.
LOOKUP_COST = 4000
# A sum is looked up rather than having more terms of several convolutions: each residual sum doubles them.
MOST_PRODUCTS = 16


def merged(terms: Sequence[Term], shape: Shape) -> list[Term] | None:
    """Return terms that add up to those given, which read one tensor of `shape`, with one convolution each.

    None if lookups between the convolutions are cheaper, or the product is too large.
    """
    found: list[Term] = []
    rest: list[Term] = []
    for term in terms:
        made = composed(term, shape)
        if made is None:
            rest.append(term)
        else:
            found += made
    if rest:
        matrix = matrix_of(rest, shape)
        if matrix is None:
            return None
        source, output = rest[0].source, rest[0].shapes(shape)[-1]
        found += [
            Term(source=source, steps=steps, factor=factor) for steps, factor in chains(matrix, shape, output)
        ]
    if not found:  # no output reads anything
        nothing = Select(index=frozen(np.full(terms[0].shapes(shape)[-1], OUTSIDE)))
        return [Term(source=terms[0].source, steps=(nothing,))]
    cost = sum(_cost(term, shape) for term in found)
    return found if cost <= sum(cheapest_cut(term, shape)[1] for term in terms) else None


def summed(terms: Sequence[Term]) -> tuple[Term, ...]:
    """Return terms that add up to the same, where convolutions that differ in their weights alone are one."""
    found: dict[Any, Term] = {}
    for number, term in enumerate(terms):
        if len(term.inexact()) != 1:
            found[number] = term
            continue
        at, kernel = term.weighted()
        others = tuple(_content(step) for step in (*term.steps[:at], *term.steps[at + 1 :]))
        key = (term.source, at, kernel.geometry, kernel.weight.shape, others)
        if key in found:
            same = found[key]
            weight = same.factor * same.weighted()[1].weight + term.factor * kernel.weight
            term = replace(same.with_weight(weight), factor=1.0)
        found[key] = term
    return tuple(found.values())


def _content(step: Step) -> Any:
    """Return what is equal for steps that compute the same."""
    if isinstance(step, Select):
        return step.index.shape, step.index.tobytes()
    return step.geometry, step.weight.dtype, step.weight.tobytes()


def cheapest_cut(term: Term, shape: Shape) -> tuple[int, int]:
    """Return after how many steps the fewest lookups cut a term, and what it costs then."""
    first, *_, last = term.inexact()
    shapes = term.shapes(shape)
    # Nothing is gained between a convolution and the pooling that follows it.
    places = [at for at in range(first + 1, last + 1) if shapes[at] and not is_pooling(term.steps[at])]
    at = min(places, key=lambda place: math.prod(shapes[place]))
    return at, _cost(term, shape) + LOOKUP_COST * math.prod(shapes[at])


def _cost(term: Term, shape: Shape) -> int:
    """Return how many multiplications a term takes, or what takes as long."""
    shapes = term.shapes(shape)
    kernels = zip(term.steps, shapes[1:], strict=True)
    return TERM_COST + sum(
        step.weight.size * math.prod(after[1:]) for step, after in kernels if isinstance(step, Kernel)
    )


def before(term: Term, at: int) -> Term:
    """Return the first steps of a term, without its factor."""
    return replace(term, steps=term.steps[:at], factor=1.0)
