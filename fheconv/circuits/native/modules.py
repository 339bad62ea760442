"""Compiles a circuit in stages: one module of Concrete, with a function for each block and one key set.

Concrete wants every result of a function to be readable by itself. The values between two stages have as many
bits as the sums of the next one, of which rounding then looks at a few only. So where sums are rounded, this
asks for less noise than the circuit without stages needs, and may cost 16 % more. But stages do the same
sums and lookups as that circuit. Under its keys, their lookups fail as seldom as there. So they are compiled
for its keys, with a failure probability so lenient that what nobody reads may be as noisy as it is.
"""

import contextlib
import inspect
import math
from collections.abc import Iterable
from typing import Any

from fheconv.basics.compile_config import CompileConfig
from fheconv.circuits.files.identity import keyset_of
from fheconv.circuits.native.binding import (
    CompositionClause,
    CompositionRule,
    FunctionDef,
    ModuleCompiler,
    fhe,
)
from fheconv.circuits.native.options import configuration_of
from fheconv.circuits.native.protocol import Refused
from fheconv.circuits.native.wiring import lenient
from fheconv.lowering.blocks import Block
from fheconv.lowering.lower import Lowered
from fheconv.lowering.stages import BlockFunction, Staged


def compiled_circuit(lowered: Lowered, configuration: Any, within: bytes | None) -> Any:
    """Return the compiled circuit of a function that is not in stages.

    Raises `Refused` if it does not run under the keys whose parameters are `within`. Where Concrete has no
    parameters for them, it silently takes others.
    """
    compiler = fhe.Compiler(lowered.function, {"x": "encrypted"})
    circuit = compiler.compile([x[None] for x in lowered.inputset()], configuration)
    if within is not None and keyset_of(circuit.client.specs.serialize()) != keyset_of(within):
        raise Refused(
            f"This network of {names_of(lowered)} cannot run under the given keys: its widths, its failure "
            "probability or its security level need other parameters than the keys have."
        )
    return circuit


def names_of(lowered: Lowered) -> str:
    """Return the names of the layers in words."""
    return ", ".join(repr(layer.name) for layer in lowered.layers)


def compiled_stages(
    staged: Staged, whole: Any, config: CompileConfig, within: bytes | None
) -> tuple[Any, bool]:
    """Return the module of a circuit in stages, and True if it runs under the keys of the `whole` circuit.

    It does if Concrete then uses each key as often as there. Otherwise its parameters are chosen anew, for
    all blocks together. Raises `Refused` if they may not, because the keys `within` are given.
    """
    if config.configuration is None:
        specs = whole.client.specs.serialize()
        with contextlib.suppress(RuntimeError):  # Concrete finds no parameters
            module = compiled_module(staged, configuration_of(True, lenient(config), specs))
            same = keyset_of(module.client.specs.serialize()) == keyset_of(specs)
            if same and math.isclose(module.complexity, whole.complexity, rel_tol=1e-3):
                return module, True
    if within is not None:
        raise Refused(
            "In stages, this network cannot run under the given keys, though it can as a whole; leave "
            "stages= and blocks= out, or keys_of=."
        )
    return compiled_module(staged, configuration_of(True, config, None)), False


def compiled_module(staged: Staged, configuration: Any) -> Any:
    """Return the compiled module of a network in blocks.

    Its wires tell Concrete which results become inputs. So both have one width, and the optimiser counts the
    noise of a result where it is read.
    """
    definitions = {
        block.number: _definition(block, function)
        for block, function in zip(staged.blocks, staged.functions, strict=True)
    }
    wires = {
        fhe.Wire(fhe.Output(definitions[number], 0), fhe.Input(definitions[block.number], place))
        for block, place, number in _wires(staged.blocks)
    }
    inputs = {block.name: [staged.inputset(block)] for block in staged.blocks}
    return ModuleCompiler([*definitions.values()], fhe.Wired(wires)).compile(inputs, configuration)


def rules_of(blocks: tuple[Block, ...]) -> list[CompositionRule]:
    """Return the same wires for a program that is compiled from Concrete's text."""
    names = {block.number: block.name for block in blocks}
    return [
        CompositionRule(CompositionClause(names[number], 0), CompositionClause(block.name, place))
        for block, place, number in _wires(blocks)
    ]


def _wires(blocks: tuple[Block, ...]) -> Iterable[tuple[Block, int, int]]:
    """Yield (block, place, number): where a block takes the result of an earlier one."""
    for block in blocks:
        for place, number in enumerate(block.reads):
            if number:
                yield block, place, number


def _definition(block: Block, function: BlockFunction) -> FunctionDef:
    """Return a block's function for Concrete, which wants a name, and a parameter for each value."""
    names = [f"x{place}" for place in range(len(block.reads))]

    def taking_names(**values: Any) -> Any:
        return function([values[name] for name in names])

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    taking_names.__name__ = block.name
    taking_names.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind) for name in names]
    )
    return FunctionDef(taking_names, dict.fromkeys(names, "encrypted"))
