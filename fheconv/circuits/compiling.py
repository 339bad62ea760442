"""Compiles networks: checks their cost first, and finds what does compile where Concrete refuses."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

from fheconv.analysis.affordability import check_cost, check_cost_within
from fheconv.analysis.forecast import completed
from fheconv.basics.checks import check_integer
from fheconv.basics.compile_config import GLOBAL_P_ERROR, CompileConfig
from fheconv.basics.errors import CompilationError, InvalidArgumentError
from fheconv.basics.keywords import answers_keywords
from fheconv.circuits.circuit import FheCircuit
from fheconv.circuits.client import load_client
from fheconv.circuits.files.security import check_security
from fheconv.circuits.owner import KeyOwner
from fheconv.circuits.refused import compiled
from fheconv.circuits.staged import StagedCircuit
from fheconv.lowering.lower import lower
from fheconv.quantized import QuantizedNetwork

# A retrained network may need parameters for slightly greater sums. So much more often may its lookups fail.
MORE = (1.1, 1.25, 1.5, 2.0, 4.0, 10.0)
# The most blocks of a stage. Each is a function of its own, which takes time to compile.
MOST_BLOCKS = 1024


@overload
def compile(  # noqa: A001
    network: QuantizedNetwork,
    config: CompileConfig | None = None,
    *,
    keys_of: KeyOwner | str | Path | None = None,
    stages: None = None,
    blocks: int = 1,
) -> FheCircuit: ...


@overload
def compile(  # noqa: A001
    network: QuantizedNetwork,
    config: CompileConfig | None = None,
    *,
    keys_of: KeyOwner | str | Path | None = None,
    stages: Literal["layers"],
    blocks: int = 1,
) -> StagedCircuit: ...


@answers_keywords
def compile(  # noqa: A001
    network: QuantizedNetwork,
    config: CompileConfig | None = None,
    *,
    keys_of: KeyOwner | str | Path | None = None,
    stages: Literal["layers"] | None = None,
    blocks: int = 1,
) -> FheCircuit:
    """Compile a quantized network to an FHE circuit. No key is made yet.

    keys_of: another circuit, or a client of it (a `Client`, or its `client.zip`), under whose keys this one
        is to run. So a retrained model gets new files, and its clients keep their keys. If there are keys
        already, the new circuit has them. Keys that either makes later are those of both.
    stages: "layers" for a circuit that runs layer by layer (`StagedCircuit`). Its runs show progress within
        an image, can be interrupted and go on, and can be spread over several machines. It costs as much.
    blocks: the most blocks in which the lookups of a layer are run, one by one or on several machines.

    Stages run under keys of another circuit, too, unless the network has maxima: then Concrete finds no
    parameters.

    Concrete chooses the widths of keys for the widest lookup and its failure probability. So a network runs
    under keys of another if its lookups are as wide or narrower, and may fail as often or more often. A
    circuit without lookups has a secret key that fits only itself, and a server needs no key for it.

    Warns (`CostWarning`) of a circuit that takes over a minute an image or over 30 s to compile, or has over
    2 GB of keys, or takes more than twice the time under the given keys than under its own. Raises
    `CostError` before Concrete starts for a circuit that costs more than `config` allows, or for which there
    are no parameters; both say what brings the cost down. Raises `AccumulatorOverflowError` for accumulators
    wider than Concrete can hold, `CompilationError` if Concrete cannot compile the network, or cannot for the
    given keys. What these advise was compiled before.

    Example:
        >>> import numpy as np
        >>> from fheconv import quantize
        >>> image = np.arange(9).reshape(1, 3, 3)
        >>> circuit = compile(quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), image))
        >>> circuit.predict(image)
        array([[[ 5.,  7.],
                [11., 13.]]])
        >>> retrained = compile(quantize(np.array([[2.0, -1.0], [1.0, 0.0]]), image), keys_of=circuit)
        >>> retrained.keyset == circuit.keyset, retrained.fingerprint == circuit.fingerprint
        (True, False)
    """
    if not isinstance(network, QuantizedNetwork):
        raise InvalidArgumentError(
            f"compile takes what fheconv.quantize returned, not {type(network).__name__}; quantize it first."
        )
    most = None if stages is None and blocks == 1 else _check_stages(network, stages, blocks)
    if keys_of is None:
        making = partial(_checked, most=most)
        return compiled(making, network, _checked_config(CompileConfig() if config is None else config))
    owner = _owner_of(keys_of)
    if config is None:
        config = owner.config if isinstance(owner, FheCircuit) else CompileConfig()
    config = _within(owner, network, _checked_config(config))
    making = partial(_checked, most=most, keys_of=owner)
    return compiled(making, network, config, _more_failures(config))


def _checked(
    network: QuantizedNetwork,
    config: CompileConfig,
    *,
    most: int | None,
    keys_of: KeyOwner | None = None,
) -> FheCircuit:
    """Compile a network that costs no more than allowed, in stages of `most` blocks unless that is None."""
    lowered = lower(network, config.engine)
    check_cost(lowered, config)
    if most is None:
        circuit = FheCircuit(network, config, lowered, keys_of)
    else:
        circuit = StagedCircuit(network, config, lowered, most, keys_of)
    if keys_of is not None:
        check_cost_within(lowered, config, circuit.complexity)
    return circuit


def _checked_config(config: Any) -> CompileConfig:
    if not isinstance(config, CompileConfig):
        raise InvalidArgumentError(f"config is {config!r}; it must be a CompileConfig.")
    return config


def _check_stages(network: QuantizedNetwork, stages: Any, blocks: Any) -> int:
    """Return the number of blocks. Raises `InvalidArgumentError` for stages that there cannot be."""
    check_integer("blocks", blocks, 1, MOST_BLOCKS)
    if stages != "layers":
        raise InvalidArgumentError(
            f'stages={stages!r:.50} and blocks={blocks}; stages must be "layers" for a circuit in stages. '
            "Leave both out for one that runs as a whole."
        )
    if len(network.layers) < 2:
        raise InvalidArgumentError(
            "This network has one layer, and no lookup: there are no stages. Leave stages= and blocks= out."
        )
    return int(blocks)


def _owner_of(keys_of: Any) -> KeyOwner:
    """Return the owner of keys that a user gave: a circuit, a client, or the path of a `client.zip`.

    Raises `InvalidArgumentError` for anything else, and `ArtifactError` like `load_client`.
    """
    if isinstance(keys_of, str | Path):
        return load_client(keys_of)
    if not isinstance(keys_of, KeyOwner):
        raise InvalidArgumentError(
            f"keys_of={keys_of!r:.100}; it must be a circuit that fheconv.compile returned, a client, or the "
            "path of a client.zip."
        )
    return keys_of


def _within(owner: KeyOwner, network: QuantizedNetwork, config: CompileConfig) -> CompileConfig:
    """Return the configuration with which the network is compiled for the keys of `owner`.

    Keys are compressed or not, whatever the configuration says. Images do not share a ciphertext, because
    that takes other keys. Raises `CompilationError` for a network that needs keys of another kind,
    `InvalidArgumentError` for a configuration that cannot go with given keys.
    """
    if config.lanes not in ("auto", 1):
        raise InvalidArgumentError(
            f"lanes={config.lanes} together with keys_of=; images that share a ciphertext need other keys. "
            "Use lanes=1."
        )
    if config.parameters is not None:
        raise InvalidArgumentError(
            "CompileConfig.parameters together with keys_of=; the keys have their parameters already. Leave "
            "one of them out."
        )
    specs, looks_up = check_security(owner.specs), len(network.layers) > 1
    if looks_up and not specs.bootstraps:
        raise CompilationError(
            "The given keys are of a circuit without lookups, and this network has lookups; compile it for "
            "keys of its own."
        )
    if specs.bootstraps and not looks_up:
        raise CompilationError(
            "The given keys are of a circuit with lookups, and this network has none. Compile it for keys of "
            "its own: they are made in an instant, and a server needs none of them."
        )
    return replace(completed(network, config), lanes=1, compress_evaluation_keys=specs.seeded)


def _more_failures(config: CompileConfig) -> list[dict[str, Any]]:
    """Return settings with which more lookups fail, by and by, so that keys suffice that nearly do."""
    name = "global_p_error" if config.p_error is None else "p_error"
    now = getattr(config, name) or GLOBAL_P_ERROR
    return [{name: float(f"{factor * now:.2g}")} for factor in MORE if factor * now < 1]
