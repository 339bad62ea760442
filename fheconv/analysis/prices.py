"""Gives the price of a lookup by its number of bits."""

import numpy as np

# The price of one lookup by its bits, in a circuit of 64 lookups, in millions of the optimiser's complexity,
# at Concrete's default failure probability. tests/benchmarks/lookups.py prints it. Between these bits, and
# above them, the price grows by the same factor for each bit.
LOOKUP_PRICE = {1: 28, 2: 32, 3: 47, 4: 67, 5: 117, 6: 502, 7: 1158, 8: 2610, 10: 13186}


def lookup_price(bits: int) -> float:
    """Return the price of a lookup of `bits` bits, in millions of the optimiser's complexity."""
    if bits < 1:
        return 0.0
    known = np.array(sorted(LOOKUP_PRICE))
    logarithms = np.log([LOOKUP_PRICE[b] for b in known.tolist()])
    if bits <= known[-1]:
        return float(np.exp(np.interp(bits, known, logarithms)))
    slope = (logarithms[-1] - logarithms[-2]) / (known[-1] - known[-2])
    return float(np.exp(logarithms[-1] + slope * (bits - known[-1])))
