"""Print what planes of the last layer cost: `python tests/benchmarks/planes.py`.

TinyCNN is compiled with lookups of several widths and its last layer, of 8-bit weights, in more and more
planes. The complexity steps down as `FREE_BITS` of `fheconv.lowering.planes` says. Nothing is run,
so the figures are the same on every machine.
"""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))

import digits
import fheconv
from fheconv.lowering.lower import lower
from fheconv.lowering.planes import FREE_BITS
from fheconv.networks.bounds import norm_bits
from train_tinycnn_digits import shipped

P_ERRORS = (0.01, 0.05)
LIMITS = (99, *range(16, 4, -1))
CONVOLUTIONS = ("conv1", "conv2", "conv3")


def configurations() -> dict[str, dict[str, Any]]:
    """Return options of `QuantConfig` for lookups of 3 to 6 bits, exact and rounded."""
    exact = {f"{bits} bits": {"accumulator_bits": dict.fromkeys(CONVOLUTIONS, bits)} for bits in (4, 5, 6)}
    rounded = {f"rounded to {bits}": {"rounding_bits": bits} for bits in (4, 5, 6)}
    narrow = {"activation_bits": 2, "input_bits": 3}
    three = {"accumulator_bits": dict.fromkeys(CONVOLUTIONS, 3), **narrow}
    return {"3 bits": three, **exact, **rounded}


def main() -> None:
    images = digits.digits().train_images[:200].numpy()
    title = f"TinyCNN, complexity in 10^9 (FREE_BITS is {FREE_BITS})"
    table = Table(title=title, title_justify="left")
    columns = ("lookups", "planes", "bits", "with norm", *(f"p_error {p}" for p in P_ERRORS))
    for heading in columns:
        table.add_column(heading, justify="left" if heading == "lookups" else "right")
    for name, options in configurations().items():
        weight_bits = {**dict.fromkeys(CONVOLUTIONS, 4), "fc1": 8}
        network = fheconv.quantize(shipped(), images, fheconv.QuantConfig(weight_bits=weight_bits, **options))
        seen = set()
        for limit in LIMITS:
            with mock.patch("fheconv.lowering.planes.FREE_BITS", limit):
                planes = lower(network).planes
                if len(planes.factors) in seen:
                    continue
                seen.add(len(planes.factors))
                costs = []
                for p_error in P_ERRORS:
                    config = fheconv.CompileConfig(p_error=p_error, in_process=True)
                    costs.append(fheconv.compile(network, config).cost.complexity)
            bits = planes.bounds.offset_bits
            norm = float(norm_bits(planes.layer, network.shapes).max())
            shown = (f"{cost / 1e9:.1f}" for cost in costs)
            table.add_row(name, str(len(planes.factors)), str(bits), f"{bits + norm:.1f}", *shown)
    Console().print(table)


if __name__ == "__main__":
    main()
