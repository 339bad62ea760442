"""Chooses how to compute one term of a layer, and makes the program that computes it.

The choice (a `Plan`) depends on shapes and counts only. A `TermProgram` also holds the index arrays as
large as an image, so it is made only when somebody runs it.
"""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from fheconv.arithmetic import OUTSIDE
from fheconv.arithmetic.matrix import DENSE_LIMIT
from fheconv.basics.arrays import Array
from fheconv.basics.compile_config import Engine
from fheconv.basics.errors import InvalidArgumentError
from fheconv.lowering import engines
from fheconv.lowering.dialect import gathers, take
from fheconv.lowering.engines import ENGINES, MATRIX_COST, multiply_adds
from fheconv.lowering.pruning import Plain, prune
from fheconv.networks.linear import Kernel, Select, Term

# A convolution with its engine, or a selection.
Stage: TypeAlias = tuple[str, Plain] | Select


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The choice of how to compute the values `wanted` (K, *Out) of a term from its source tensor.

    `read` (C, *S) is the mask of the source values that are read. `stages` are the term's steps, with the
    engine of each convolution. With the engine "matrix" all steps are one product.
    """

    term: Term
    read: Array
    wanted: Array
    engine: str
    reason: str
    multiply_adds: int
    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, name: str, term: Term, read: Array, wanted: Array, engine: Engine) -> "Plan":
        """Choose how to compute a term of the layer `name`.

        Raises `InvalidArgumentError` if the named engine cannot compute it.
        """
        kept: list[tuple[Plain, dict[str, int]] | Select] = []
        steps = zip(term.steps, term.shapes(read.shape)[:-1], term.masks(wanted, read.shape)[1:], strict=True)
        for step, before, after in steps:
            if isinstance(step, Kernel):
                plain = prune(step, before, after)
                kept.append((plain, multiply_adds(plain)))
            else:
                kept.append(step)
        counts = [one[1] for one in kept if not isinstance(one, Select)]
        possible = {
            one: sum(count.get(one, count.get("conv", 0)) for count in counts)
            for one in ENGINES
            if any(one in count for count in counts)
        }
        if not all(counts):
            possible = {}
        products = int(read.sum()) * int(wanted.sum())
        if 8 * products <= DENSE_LIMIT:
            possible["matrix"] = products
        chosen, reason = _choose(name, engine, possible)
        return cls(
            term=term,
            read=read,
            wanted=wanted,
            engine=chosen,
            reason=reason,
            multiply_adds=possible[chosen],
            stages=tuple(
                one if isinstance(one, Select) else (chosen if chosen in one[1] else "conv", one[0])
                for one in kept
            ),
        )

    @property
    def pads(self) -> bool:
        """True if the program reads padding, which is an encrypted constant beside the source's values."""
        places = (
            axis
            for one in self.stages
            for axis in ((one.index,) if isinstance(one, Select) else one[1].inputs.axes)
        )
        return self.engine != "matrix" and any((place == OUTSIDE).any() for place in places)

    @property
    def gathers(self) -> bool:
        """True if the program takes some values of a tensor, or all in another order."""
        program, width = self.program(), int(self.read.sum())
        for _, plain, places in program.stages:
            if gathers(places, width):
                return True
            width = math.prod(plain.outputs.shape)
        return program.matrix is None and gathers(program.places, width)

    def program(self) -> "TermProgram":
        """Return the program that computes the term."""
        shape = self.read.shape
        inputs, outputs = np.flatnonzero(self.read), np.flatnonzero(self.wanted)
        if self.engine == "matrix":
            matrix = self.term.matrix(shape)[inputs][:, outputs].toarray()
            return TermProgram(
                source=self.term.source, matrix=matrix, stages=(), places=np.zeros(0, np.int64)
            )
        places = np.full(self.read.size, OUTSIDE)
        places[inputs] = np.arange(len(inputs))
        stages = []
        for stage in self.stages:
            if isinstance(stage, Select):
                places = np.where(stage.index == OUTSIDE, OUTSIDE, places[stage.index]).ravel()
                continue
            engine, plain = stage
            index = plain.inputs.flat
            stages.append((engine, plain, np.where(index == OUTSIDE, OUTSIDE, places[index])))
            places = np.full(math.prod(plain.outputs.within), OUTSIDE)
            places[plain.outputs.flat.ravel()] = np.arange(math.prod(plain.outputs.shape))
        return TermProgram(source=self.term.source, matrix=None, stages=tuple(stages), places=places[outputs])


@dataclass(frozen=True, kw_only=True, eq=False)
class TermProgram:
    """Computes one term (N, m) from the values (N, n) of its source that are read.

    It is either one product with `matrix` (n, m), or several convolutions one after the other. `stages` holds
    each convolution with its engine, and the places where it reads the values before it. `places` are the
    places that are read at the end.
    """

    source: int
    matrix: Array | None
    stages: tuple[tuple[str, Plain, Array], ...]
    places: Array

    def __call__(self, x: Any) -> Any:
        """Return the term (N, m) of the values x (N, n), which are padded with 0."""
        if self.matrix is not None:
            return x @ self.matrix
        for engine, plain, places in self.stages:
            y = engines.run(engine, plain, take(x, places))
            x = y.reshape((y.shape[0], math.prod(y.shape[1:])))
        return take(x, self.places)


def _choose(name: str, engine: Engine, possible: dict[str, int]) -> tuple[str, str]:
    """Return the engine to run with, and the reason for it."""
    if engine == "auto":
        costs = {one: ENGINES[one].unit_cost if one in ENGINES else MATRIX_COST for one in possible}
        predicted = {one: possible[one] * costs[one] / 1000 for one in possible}
        shown = ", ".join(f"{one} {ms:,.3g}" for one, ms in sorted(predicted.items(), key=lambda p: p[1]))
        return min(predicted, key=predicted.__getitem__), f"cheapest predicted, in ms: {shown}"
    if engine not in possible:
        if engine in ENGINES:
            reason = ENGINES[engine].needs
        else:
            reason = f"The dense matrix would take more than {DENSE_LIMIT / 2**30:.0f} GiB."
        raise InvalidArgumentError(
            f"engine={engine!r} cannot run layer {name!r}; those that can are {', '.join(possible)}. "
            + reason
        )
    return engine, "asked for"
