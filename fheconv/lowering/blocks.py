"""Names the blocks of a staged circuit, so that its program itself tells what each of them reads."""

import re
from dataclasses import dataclass

from fheconv.basics.errors import ArtifactError

_NAME = re.compile(r"stage(0|[1-9]\d{0,5})_value([1-9]\d{0,5})_of((?:_(?:0|[1-9]\d{0,5}))+)")
_FUNCTION = re.compile(r"^\s*func\.func @(\w+)\(", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One function of a staged circuit, which computes value number `number`.

    Value 0 is the image. `reads` are the numbers of the values that it takes, in their order. `stage` is the
    number of its stage, counted from 0.

    Example:
        >>> Block(stage=1, number=3, reads=(1, 2)).name
        'stage1_value3_of_1_2'
    """

    stage: int
    number: int
    reads: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name of its function."""
        return f"stage{self.stage}_value{self.number}_of_{'_'.join(map(str, self.reads))}"


def blocks_of(mlir: str) -> tuple[Block, ...]:
    """Return the blocks of a circuit from its program as Concrete's text; () if it is not in stages.

    Raises `ArtifactError` for functions that are not the blocks of a staged circuit.

    Example:
        >>> blocks_of("func.func @stage0_value1_of_0(%x) {}")
        (Block(stage=0, number=1, reads=(0,)),)
    """
    names = _FUNCTION.findall(mlir)
    if not any(map(_NAME.fullmatch, names)):
        return ()
    blocks: list[Block] = []
    for name in names:
        found = _NAME.fullmatch(name)
        if found is None:
            raise ArtifactError(f"The program is altered: {name:.80} is no block of a circuit in stages.")
        reads = tuple(map(int, found[3].split("_")[1:]))
        blocks.append(Block(stage=int(found[1]), number=int(found[2]), reads=reads))
        in_order = blocks[-1].number == len(blocks) and max(reads) < len(blocks)
        if not in_order or blocks[-1].stage < blocks[-2 if len(blocks) > 1 else -1].stage:
            raise ArtifactError(f"The program is altered: block {name:.80} does not follow what it reads.")
    return tuple(blocks)
