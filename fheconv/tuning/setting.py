"""Names the networks that the search tries."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

# The user's model, a student that imitates it, or a trivial model that learns the classes without it.
Kind: TypeAlias = Literal["model", "student", "control"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The setting of one network in the search: what it computes, the widths asked for, and its training.

    `kind` is "model" for the user's model, "student" for another network that imitates it, "control" for a
    trivial model: a linear one if `lookup_budget` is 0, otherwise one hidden layer of as many ReLUs. Without
    `accumulator_bits`, the windows of lookups lie where calibration leads.

    Example:
        >>> print(Setting(accumulator_bits=8, rounding_bits=5, fine_tuned=True))
        8 bits, rounded to 5, fine-tuned
        >>> print(Setting(rounding_bits=5))
        windows of 5 bits
        >>> print(Setting(kind="student", rounding_bits=5, lookup_budget=64, fine_tuned=True))
        student of 64 lookups, windows of 5 bits
    """

    accumulator_bits: int | None = None
    rounding_bits: int | None = None
    lookup_budget: int | None = None
    fine_tuned: bool = False
    kind: Kind = "model"

    def __str__(self) -> str:
        widths = f"windows of {self.rounding_bits} bits"
        if self.accumulator_bits is not None:
            kept = "" if self.rounding_bits is None else f", rounded to {self.rounding_bits}"
            widths = f"{self.accumulator_bits} bits{kept}"
        if self.kind == "student":
            return f"student of {self.lookup_budget} lookups, {widths}"
        if self.kind == "control":
            return (
                f"hidden layer of {self.lookup_budget} ReLUs, {widths}"
                if self.lookup_budget
                else "linear model"
            )
        fewer = "" if self.lookup_budget is None else f", {self.lookup_budget} lookups at most"
        trained = ", fine-tuned" if self.fine_tuned else ""
        return f"{widths}{fewer}{trained}"
