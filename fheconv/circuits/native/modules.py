"""Compiles a circuit in stages: one module of Concrete, with a function for each block and one key set."""

import inspect
import warnings
from collections.abc import Iterable
from typing import Any

from fheconv.lowering.blocks import Block
from fheconv.lowering.stages import BlockFunction, Staged

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # concrete-python 2.11 imports the deprecated pkg_resources
    from concrete import fhe
    from concrete.fhe.compilation.composition import CompositionClause, CompositionRule
    from concrete.fhe.compilation.module_compiler import FunctionDef, ModuleCompiler


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
