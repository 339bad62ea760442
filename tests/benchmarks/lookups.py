"""Print what a lookup costs, beside `fheconv.analysis.prices`: `python tests/benchmarks/lookups.py`.

Circuits of lookups and nothing else are compiled, and the optimiser's complexity of each is divided by their
number. Nothing is run, so the figures are the same on every machine. By default the failure probability is
that of a whole circuit (Concrete's default, 1e-5), so that a lookup costs more among many: a step wherever
Concrete has to take the next larger parameters.
"""

import argparse
import warnings
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fheconv.analysis.prices import LOOKUP_PRICE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # concrete-python 2.11 imports the deprecated pkg_resources
    from concrete import fhe

WIDTHS = (*range(1, 9), 10)
# By so much a constant may be off.
TOLERANCE = 0.1


def price(bits: int, lookups: int, p_error: float | None) -> float:
    """Return the complexity of a lookup of so many bits, in millions, where there are `lookups` of them."""
    table = fhe.LookupTable(list(range(2**bits)))

    def function(x: Any) -> Any:
        return table[fhe.hint(x, bit_width=bits)]

    configuration = fhe.Configuration(p_error=p_error, compress_input_ciphertexts=True)
    compiler = fhe.Compiler(function, {"x": "encrypted"})
    circuit = compiler.compile([np.zeros(lookups, np.int64)], configuration)
    if circuit.programmable_bootstrap_count != lookups:
        raise SystemExit(f"Concrete made {circuit.programmable_bootstrap_count} lookups of {lookups}.")
    return float(circuit.complexity) / lookups / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the optimiser's complexity of a lookup, by its bits.")
    parser.add_argument(
        "--lookups",
        type=int,
        nargs="+",
        default=[64, 384],
        help="how many there are in a circuit; the constants are held against the first (default: 64 384)",
    )
    parser.add_argument("--p-error", type=float, help="of each lookup (default: Concrete's, of a circuit)")
    arguments = parser.parse_args()

    p_error: float | None = arguments.p_error
    whose = "the default failure probability" if p_error is None else f"p_error={p_error}"
    table = Table(title=f"Complexity of a lookup in millions, {whose}", title_justify="left")
    columns = [f"of {count}" for count in arguments.lookups]
    for heading in ("bits", "LOOKUP_PRICE", *columns, f"{columns[0]} / LOOKUP_PRICE"):
        table.add_column(heading, justify="right")
    off = {}
    for bits in WIDTHS:
        prices = [price(bits, count, p_error) for count in arguments.lookups]
        ratio = prices[0] / LOOKUP_PRICE[bits]
        if abs(ratio - 1) > TOLERANCE:
            off[bits] = round(prices[0])
        style = "red" if bits in off else None
        cells = (f"{value:,.1f}" for value in prices)
        table.add_row(str(bits), f"{LOOKUP_PRICE[bits]:,}", *cells, f"{ratio:.2f}", style=style)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"Done: off by more than {TOLERANCE:.0%}: {off}." if off else f"Done: all within {TOLERANCE:.0%}."
    )


if __name__ == "__main__":
    main()
