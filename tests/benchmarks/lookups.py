"""Print what a lookup costs by Concrete and by the forecast: `python tests/benchmarks/lookups.py`.

Two lookups with a multiplication between them are compiled, and the optimiser's complexity and the bytes of
keys are printed beside what `fheconv.analysis.parameters` predicts. With `--wide` it prints the lookups that
one bootstrap cannot do, as the rows of `fheconv.analysis.wide`. Nothing is run, so the figures are the same
on every machine.
"""

import argparse
import warnings
from itertools import product
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fheconv.analysis.parameters import IMAGE, Parameters, Sum, choose
from fheconv.analysis.wide import COMPLEXITY, P_ERRORS
from fheconv.circuits.sizes import sizes_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # concrete-python 2.11 imports the deprecated pkg_resources
    from concrete import fhe

WIDTHS = (*range(3, 9), 10)
LOOKUPS = 10


def compiled(bits: int, norm_bits: int, p_error: float) -> tuple[float, float]:
    """Return the complexity of a lookup and the bytes of keys, both in millions, by Concrete."""
    table = fhe.LookupTable([(3 * n + 1) % 7 for n in range(2**bits)])

    def function(x: Any) -> Any:
        y = fhe.hint(table[fhe.hint(x, bit_width=bits)] * 2**norm_bits, bit_width=bits)
        return fhe.hint(table[y], bit_width=bits)

    configuration = fhe.Configuration(
        p_error=p_error, compress_input_ciphertexts=True, compress_evaluation_keys=True
    )
    compiler = fhe.Compiler(function, {"x": "encrypted"})
    circuit = compiler.compile([np.zeros(LOOKUPS, np.int64)], configuration)
    sizes = sizes_of(circuit.client.specs.program_info.serialize())
    return circuit.complexity / (2 * LOOKUPS) / 1e6, sizes.key_bytes / 1e6


def predicted(bits: int, norm_bits: int, p_error: float) -> Parameters | None:
    """Return the parameters for such lookups, by the forecast."""
    noises: list[tuple[dict[Any, float], int | None]] = [({IMAGE: 1.0}, 0), ({0: 4.0**norm_bits}, 0)]
    sums = [
        Sum(bits=bits, noise=noise, home=0, lookup=lookup, count=1)
        for noise, lookup in [*noises, ({0: 1.0}, None)]
    ]
    return choose(sums, {}, p_error)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the price of a lookup, by Concrete and predicted.")
    parser.add_argument("--p-error", type=float, default=1e-2, help="of each lookup (default: 0.01)")
    parser.add_argument("--wide", action="store_true", help="print the rows of fheconv.analysis.wide")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    if arguments.wide:
        for bits, norm_bits, p_error in product(COMPLEXITY, (1, 2, 3, 5), P_ERRORS):
            if predicted(bits, norm_bits, p_error) is None:
                complexity, keys = compiled(bits, norm_bits, p_error)
                console.print(f"{bits} bits, norm 2^{norm_bits}, {p_error:g}: {complexity:.0f}, {keys:.0f}")
        return
    table = Table(title=f"A lookup at p_error={arguments.p_error}, in millions", title_justify="left")
    for heading in ("bits", "norm", "complexity", "predicted", "key bytes", "predicted"):
        table.add_column(heading, justify="right")
    for bits in WIDTHS:
        for norm_bits in range(1, bits, 2):
            complexity, keys = compiled(bits, norm_bits, arguments.p_error)
            parameters = predicted(bits, norm_bits, arguments.p_error)
            expected = (
                ("–", "–")
                if parameters is None
                else (f"{parameters.price(0, 0) / 1e6:,.1f}", f"{parameters.key_bytes / 1e6:,.0f}")
            )
            cells = f"{complexity:,.1f}", expected[0], f"{keys:,.0f}", expected[1]
            table.add_row(str(bits), f"2^{norm_bits}", *cells)
    console.print(table)


if __name__ == "__main__":
    main()
