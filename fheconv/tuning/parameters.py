"""Finds the TFHE parameters that are fastest on this machine, or have the smallest keys.

Concrete's optimiser takes the parameters with the fewest operations. But a lookup also takes the time to
stream the bootstrapping key from memory. So parameters with more operations and smaller keys may be as fast
or faster. All parameters have the security level that was asked for.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np

from fheconv.basics.checks import check_integer
from fheconv.basics.compile_config import CompileConfig, ParameterRange
from fheconv.basics.errors import CompilationError, InvalidArgumentError
from fheconv.basics.progress import track
from fheconv.circuits.ciphertext import Ciphertext
from fheconv.circuits.circuit import FheCircuit
from fheconv.quantized import QuantizedNetwork

# One polynomial size or any (lookups of several widths have several sizes), small dimensions, and either the
# key switch levels with the fewest operations, or few levels, for smaller keys. Other ranges were never
# faster and never had smaller keys.
RANGES = tuple(
    ParameterRange(log2_polynomial_sizes=sizes, glwe_dimensions=dimensions, keyswitch_levels=levels)
    for sizes, dimensions, levels in product(((), (10,), (11,), (12,)), ((), (1,), (2,)), ((), (1, 2, 3)))
)


@dataclass(frozen=True, kw_only=True)
class ParameterChoice:
    """TFHE parameters for one network. Compile the network with `config` to use them.

    `complexity` and `key_bytes` are those of `circuit.cost`. `seconds` is the median time of one encrypted
    image on this machine, or None before `measure`.
    """

    config: CompileConfig
    complexity: float
    key_bytes: int
    p_error: float
    seconds: float | None = None

    def beaten_by(self, other: "ParameterChoice") -> bool:
        """Return True if the other has no more operations and no larger keys, and less of one of them."""
        ours, theirs = (self.complexity, self.key_bytes), (other.complexity, other.key_bytes)
        return theirs != ours and theirs[0] <= ours[0] and theirs[1] <= ours[1]


def parameter_choices(
    network: QuantizedNetwork, config: CompileConfig | None = None
) -> tuple[ParameterChoice, ...]:
    """Return the parameters worth measuring for a network, the optimiser's own first.

    The network is compiled without keys for each of `RANGES`, with everything else as in `config`. Parameters
    are left out if Concrete cannot compile with them, if they are repetitions, or if others beat them in both
    operations and key size. An interruption ends the search, and the choices found so far are returned.

    Raises `InvalidArgumentError` if `config` names parameters itself, `CompilationError` if Concrete cannot
    compile the network with any parameters.
    """
    config = CompileConfig() if config is None else config
    if config.parameters is not None:
        raise InvalidArgumentError(
            f"config.parameters={config.parameters} leaves nothing to choose; use a CompileConfig without."
        )
    found = [_choice(network, config)]
    try:
        for parameters in track(RANGES, "Compiling with other parameters…"):
            try:
                found.append(_choice(network, replace(config, parameters=parameters)))
            except CompilationError:
                continue  # no parameters of this range fit
    except KeyboardInterrupt:
        pass
    distinct = {(choice.complexity, choice.key_bytes): choice for choice in reversed(found)}
    best = [c for c in distinct.values() if not any(c.beaten_by(other) for other in distinct.values())]
    return tuple(sorted(best, key=lambda choice: choice.complexity))


def measure(
    network: QuantizedNetwork, choices: Sequence[ParameterChoice], *, runs: int = 3
) -> tuple[ParameterChoice, ...]:
    """Return the choices with the seconds that one encrypted image takes, the fastest first.

    Keys are made for each choice. Then all choices take turns, `runs` times, so that other work on the
    machine disturbs all of them equally. After an interruption, the choices timed at least once are returned.

    Raises `ExecutionError` if the native library fails.
    """
    check_integer("runs", runs, 1)
    trials: list[_Trial] = []
    try:
        for choice in track(choices, "Generating keys…"):
            trials.append(_Trial.of(network, choice))
        for _ in track(range(runs), "Timing encrypted images…"):
            for trial in trials:
                trial.run()
    except KeyboardInterrupt:
        if not any(trial.seconds for trial in trials):
            raise
    timed = (
        replace(trial.choice, seconds=float(np.median(trial.seconds))) for trial in trials if trial.seconds
    )
    return tuple(sorted(timed, key=lambda choice: choice.seconds or 0.0))


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """A circuit with keys, an image encrypted for it, and the seconds of each run."""

    choice: ParameterChoice
    circuit: FheCircuit
    encrypted: Ciphertext
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, network: QuantizedNetwork, choice: ParameterChoice) -> "_Trial":
        circuit = FheCircuit(network, choice.config)
        circuit.keygen()
        return cls(
            choice=choice,
            circuit=circuit,
            encrypted=circuit.encrypt(np.full(network.input_shape, network.input.real_range[0])),
        )

    def run(self) -> None:
        started = time.perf_counter()
        self.circuit.run(self.encrypted)
        self.seconds.append(time.perf_counter() - started)


def _choice(network: QuantizedNetwork, config: CompileConfig) -> ParameterChoice:
    cost = FheCircuit(network, config).cost
    return ParameterChoice(
        config=config, complexity=cost.complexity, key_bytes=cost.key_bytes, p_error=cost.p_error
    )
