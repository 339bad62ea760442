"""Tells what a lookup of so many bits costs."""

import numpy as np

# What a lookup of so many bits costs, 64 of them in a circuit, in millions of the optimiser's complexity,
# at Concrete's default failure probability. tests/benchmarks/lookups.py prints it. In between, and above, it
# grows by the same factor a bit.
LOOKUP_PRICE = {1: 28, 2: 32, 3: 47, 4: 67, 5: 117, 6: 502, 7: 1158, 8: 2610, 10: 13186}


def lookup_price(bits: int) -> float:
    """Return what a lookup of so many bits costs, in millions of the optimiser's complexity."""
    if bits < 1:
        return 0.0
    known = np.array(sorted(LOOKUP_PRICE))
    logarithms = np.log([LOOKUP_PRICE[b] for b in known.tolist()])
    if bits <= known[-1]:
        return float(np.exp(np.interp(bits, known, logarithms)))
    slope = (logarithms[-1] - logarithms[-2]) / (known[-1] - known[-2])
    return float(np.exp(logarithms[-1] + slope * (bits - known[-1])))
