"""Chooses TFHE parameters as Concrete's optimiser does, so that a circuit's price is known before compiling.

A lookup on an encrypted value first switches to a small key (key switch). Then it reads its table by turning
polynomials, once for each bit of the small key (bootstrap). Each step costs operations and adds noise. The
noise must stay so small that a value moves by half a unit with a probability of at most p_error. Concrete
takes the cheapest parameters with which it does: one set for each width of lookups, called a partition.

The formulas are those of Bergerat et al. 2023 ("Parameter Optimization and Larger Precision for (T)FHE"), for
binary keys and numbers of 64 bits. Variances are in units of the torus. `tests/benchmarks/lookups.py`
compares the choices with those of Concrete.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeAlias

import numpy as np

from fheconv.analysis.noise import LEVELS, UNIT, failure, fresh_variance, greatest_variance, switch_variances
from fheconv.basics.arrays import Array
from fheconv.basics.compile_config import ParameterRange
from fheconv.basics.security import LEAST_DIMENSION

# What is tried: bits of the small key, log2 of polynomial sizes, GLWE dimensions, and levels. Larger ones are
# never the cheapest.
SMALL = tuple(range(LEAST_DIMENSION, 1400))
SIZES, DIMENSIONS = tuple(range(8, 18)), tuple(range(1, 7))
# The dimensions that Concrete tries for the key of a circuit without lookups.
LINEAR = np.arange(512, 2600)
# The choices for partitions depend on each other. Concrete repeats them until nothing changes, at most so
# often.
ROUNDS = 10
# In `Sum.noise`: the variance of an encrypted image.
IMAGE = -1


# Two partitions: from the big key of one to a key of the other.
Pair: TypeAlias = tuple[int, int]
# How often a sum contains the variance of each partition's lookups, of images (`IMAGE`), and of conversions.
Noise: TypeAlias = dict[int | Pair, float]


@dataclass(frozen=True, kw_only=True)
class Sum:
    """Describes `count` encrypted sums of `bits` bits whose noise must stay small.

    `home` is the partition with whose big key they are encrypted. They enter lookups of the partition
    `lookup`, or are results (None).
    """

    bits: int
    noise: Noise
    home: int
    lookup: int | None
    count: int


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """Holds the parameters of one partition's bootstrap, with its cost and the variance of its results.

    In a search, `small`, `level`, `variance` and `cost` are arrays of all that is tried.
    """

    dimension: int
    size: int
    small: Any
    level: Any
    variance: Any
    cost: Any

    @property
    def big(self) -> int:
        """The dimension of the big key, with which results are encrypted."""
        return self.dimension * self.size

    @property
    def rounding_variance(self) -> Any:
        """The variance that is added when a sum is rounded to the places of a polynomial."""
        return (1 / 12 + self.small / 24) / (2 * self.size) ** 2

    @property
    def key_bytes(self) -> int:
        """The bytes of the bootstrapping key."""
        return int(self.small * self.level * (self.dimension + 1) ** 2 * self.size * 8)


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Holds a circuit's parameters: those of each partition, and the levels of its key switches.

    `key_switches` has the levels from the big key of one partition to the small key of another, and
    `conversions` those from one big key to another.
    """

    partitions: tuple[Bootstrap, ...]
    key_switches: Mapping[Pair, int]
    conversions: Mapping[Pair, int]

    def price(self, home: int, lookup: int) -> float:
        """Return the complexity of a lookup, in the optimiser's unit."""
        to = self.partitions[lookup]
        level = self.key_switches[home, lookup]
        return float(to.cost + _switch_cost(self.partitions[home].big, to.small, level))

    def conversion_price(self, pair: Pair) -> float:
        """Return the complexity of the conversion of one value to another key."""
        home, to = (self.partitions[one].big for one in pair)
        return float(_switch_cost(home, to, self.conversions[pair])) if self.conversions[pair] else 0.0

    def failures(self, sums: Sequence[Sum], security_level: int = 128) -> list[float]:
        """Return the probability that each of the sums goes wrong."""
        variances: dict[int | Pair, float] = {
            number: partition.variance for number, partition in enumerate(self.partitions)
        }
        variances |= {
            pair: self._switched(pair, self.partitions[pair[1]].big, level, security_level)
            for pair, level in self.conversions.items()
        }
        found = []
        for one in sums:
            variances[IMAGE] = fresh_variance(self.partitions[one.home].big, security_level)
            variance = sum(times * variances[source] for source, times in one.noise.items())
            if one.lookup is not None:
                pair, to = (one.home, one.lookup), self.partitions[one.lookup]
                variance += to.rounding_variance
                variance += self._switched(pair, to.small, self.key_switches[pair], security_level)
            found.append(failure(one.bits, variance))
        return found

    def _switched(self, pair: Pair, dimension: int, level: int, security_level: int) -> float:
        """Return the variance that a switch from the big key of `pair` to a key of `dimension` bits adds."""
        if not level:
            return 0.0
        (variances,) = switch_variances((dimension,), security_level)
        return float(self.partitions[pair[0]].big * variances[level - 1])

    @property
    def key_bytes(self) -> int:
        """The bytes of evaluation keys in memory."""
        switches = (
            self.partitions[home].big * level * (self.partitions[to].small + 1) * 8
            for (home, to), level in self.key_switches.items()
        )
        conversions = (
            self.partitions[home].big * level * (self.partitions[to].big + 1) * 8
            for (home, to), level in self.conversions.items()
        )
        return sum(one.key_bytes for one in self.partitions) + sum(switches) + sum(conversions)


def choose(
    sums: Sequence[Sum],
    conversions: Mapping[Pair, int],
    p_error: float,
    security_level: int = 128,
    allowed: ParameterRange | None = None,
) -> Parameters | None:
    """Return the cheapest parameters for the sums of a circuit with lookups, None if there are none.

    `conversions` are the numbers of values that are converted from one key to another. Each lookup and each
    result goes wrong with a probability of at most `p_error`. Of a range of `allowed` parameters, the levels
    of key switches are not heeded.
    """
    allowed = ParameterRange() if allowed is None else allowed
    count = 1 + max(one.lookup for one in sums if one.lookup is not None)
    search = _Search(
        sums=sums,
        conversions=conversions,
        p_error=p_error,
        security_level=security_level,
        chosen=[None] * count,
        dimensions=allowed.glwe_dimensions or DIMENSIONS,
        sizes=allowed.log2_polynomial_sizes or SIZES,
    )
    for _ in range(ROUNDS):
        before = list(search.chosen)
        for partition in reversed(range(count)):
            search.choose(partition)
        if search.chosen == before or count == 1:
            break
    return search.parameters()


def linear_dimension(bits: int, noise: float, p_error: float, security_level: int = 128) -> int | None:
    """Return the dimension of the key of a circuit without lookups, None if there is none.

    Its results have `bits` bits, and contain `noise` times the variance of an encrypted image.
    """
    fresh = np.array([fresh_variance(dimension, security_level) for dimension in LINEAR.tolist()])
    enough = np.flatnonzero(noise * fresh <= greatest_variance(bits, p_error))
    return int(LINEAR[enough[0]]) if len(enough) else None


@dataclass(kw_only=True)
class _Search:
    """Chooses the parameters of one partition after the other, with those of the others as last `chosen`."""

    sums: Sequence[Sum]
    conversions: Mapping[Pair, int]
    p_error: float
    security_level: int
    chosen: list[Bootstrap | None]
    dimensions: Sequence[int]
    sizes: Sequence[int]

    def choose(self, partition: int) -> None:
        """Choose the parameters of a partition. Others without parameters are taken to have the same."""
        least, own = math.inf, [one for one in self.sums if one.lookup == partition]
        count = sum(one.count for one in own)
        room = min(greatest_variance(one.bits, self.p_error) for one in own)
        for dimension in self.dimensions:
            for log_size in sorted(self.sizes):
                if dimension << log_size < LEAST_DIMENSION:
                    continue
                tried = _bootstraps(dimension, log_size, self.security_level)
                switched = LEAST_DIMENSION * switch_variances(SMALL, self.security_level)[:, -1:]
                (rows,) = np.nonzero((tried.rounding_variance + switched <= room).ravel())
                if not len(rows):
                    continue
                tried = replace(tried, **{n: getattr(tried, n)[rows] for n in ("small", "variance", "cost")})
                if count * float(tried.cost[0, 0]) >= least:
                    break
                others = replace(tried, variance=tried.variance[:, -1:], cost=0.0)
                total = self._total([one or others for one in self._with(partition, tried)])
                row, column = np.unravel_index(total.argmin(), total.shape)
                if total[row, column] < least:
                    least = float(total[row, column])
                    self.chosen[partition] = Bootstrap(
                        dimension=dimension,
                        size=tried.size,
                        small=int(tried.small[row, 0]),
                        level=int(tried.level[column]),
                        variance=float(tried.variance[row, column]),
                        cost=float(tried.cost[row, column]),
                    )

    def parameters(self) -> Parameters | None:
        """Return what was chosen, None if nothing holds the noise."""
        partitions = tuple(one for one in self.chosen if one is not None)
        if len(partitions) < len(self.chosen):
            return None
        switches = {}
        for (home, to), room in self._room(partitions).items():
            if to is None:
                continue
            switches[home, to] = int(1 + self._levels(partitions[home], partitions[to], room))
            if switches[home, to] > len(LEVELS):
                return None
        return Parameters(
            partitions=partitions,
            key_switches=switches,
            conversions={
                (home, to): int(self._converted(partitions[home], partitions[to])[0])
                for home, to in self.conversions
            },
        )

    def _with(self, partition: int, tried: Bootstrap) -> list[Bootstrap | None]:
        return [tried if number == partition else one for number, one in enumerate(self.chosen)]

    def _total(self, partitions: Sequence[Bootstrap]) -> Array:
        """Return the circuit's complexity with each of the parameters tried, infinite if it is too noisy."""
        shape = np.broadcast_shapes(*(np.shape(one.variance) for one in partitions))
        total = np.zeros(shape)
        for (home, to), room in self._room(partitions).items():
            if to is None:
                total = np.where(room >= 0, total, math.inf)
                continue
            count = sum(one.count for one in self.sums if (one.home, one.lookup) == (home, to))
            levels = 1 + self._levels(partitions[home], partitions[to], np.broadcast_to(room, shape))
            switch = _switch_cost(partitions[home].big, partitions[to].small, levels)
            total = total + np.where(levels > len(LEVELS), math.inf, count * (partitions[to].cost + switch))
        for (home, to), count in self.conversions.items():
            level, _ = self._converted(partitions[home], partitions[to])
            switch = _switch_cost(partitions[home].big, partitions[to].big, level)
            total = total + np.where(level > 0, count * switch, 0.0)
        return total

    def _room(self, partitions: Sequence[Bootstrap]) -> dict[tuple[int, int | None], Any]:
        """Return how much variance key switches may add, by partitions, and what results still hold."""
        room: dict[tuple[int, int | None], Any] = {}
        for one in self.sums:
            left = greatest_variance(one.bits, self.p_error)
            for source, times in one.noise.items():
                variance: Any
                if isinstance(source, tuple):
                    variance = self._converted(*(partitions[one] for one in source))[1]
                elif source == IMAGE:
                    variance = fresh_variance(partitions[one.home].big, self.security_level)
                else:
                    variance = partitions[source].variance
                left = left - times * variance
            if one.lookup is not None:
                left = left - partitions[one.lookup].rounding_variance
            pair = one.home, one.lookup
            room[pair] = np.minimum(room.get(pair, math.inf), left)
        return room

    def _converted(self, home: Bootstrap, to: Bootstrap) -> tuple[Array, Array]:
        """Return the levels of a conversion to another big key, and the variance that it adds.

        It takes the fewest levels that add no more variance than lookups have. Equal keys need none.
        """
        if (home.dimension, home.size) == (to.dimension, to.size):
            return np.zeros(np.shape(home.variance), int), np.zeros(np.shape(home.variance))
        noises = home.big * switch_variances((to.big,), self.security_level)[0]
        place = np.searchsorted(-noises, -np.asarray(home.variance))
        place = np.minimum(place, len(LEVELS) - 1)
        return LEVELS[place], noises[place]

    def _levels(self, home: Bootstrap, to: Bootstrap, room: Any) -> Array:
        """Return the places in `LEVELS` of the fewest levels that add no more variance than `room`."""
        noises = home.big * switch_variances(tuple(np.ravel(to.small).tolist()), self.security_level)
        found = np.full(np.shape(room), len(LEVELS))
        for place in reversed(range(len(LEVELS))):
            found[noises[:, place].reshape(np.shape(to.small)) <= room] = place
        return found


@cache
def _bootstraps(dimension: int, log_size: int, security_level: int) -> Bootstrap:
    """Return all small keys (n, 1) with all useful levels (l,), for polynomials of one size."""
    size = 2.0**log_size
    big, parts = dimension * size, dimension + 1
    level, base = LEVELS[:, None].astype(float), 2.0 ** np.arange(1, 33)
    step = 2.0 ** np.minimum(2 * level * np.log2(base), 128)
    key = level * parts * size * (base**2 + 2) / 12 * fresh_variance(int(big), security_level)
    rest = (1 / step - UNIT**2) / 24 * (1 + big / 2) + UNIT**2 * (big / 32 + (1 - big) ** 2 / 64)
    # Fourier transforms compute with 53 bits. The exponent was measured by the makers of Concrete.
    fourier = 2.0 ** (22 - 2.57722494) * level * (base * size) ** 2 * parts * UNIT**2
    noise = (key + rest + fourier).min(axis=1)
    useful = np.append(True, noise[1:] < np.minimum.accumulate(noise)[:-1])
    small, levels = np.array(SMALL)[:, None], LEVELS[useful]
    turn = parts * (levels + 1) * size * (log_size + 1) + parts**2 * levels * size
    return Bootstrap(
        dimension=dimension,
        size=int(size),
        small=small,
        level=levels,
        variance=small * noise[useful],
        cost=small * turn,
    )


def _switch_cost(big: int, small: Any, levels: Any) -> Any:
    """Return the operations of a key switch."""
    return big * levels * (2 * small + 3) - small
