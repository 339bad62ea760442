"""Tells how much noise an encryption needs, by the length of its secret key.

For a secret of n random bits, Concrete's noise has a standard deviation of 2^(slope · n + bias) of the torus,
and nowhere less than 2^FLOOR. It has such a line for each security level, got out of the lattice estimator
(Albrecht, Player and Scott 2015).
"""

# Slope and bias for each security level in bits: those of Concrete 2.11, for 64-bit words and binary secrets.
LINES = {
    128: (-0.025696778711484593, 2.675931372549016),
    132: (-0.024891456582633045, 2.65734593837534),
}
FLOOR = -62.0
# The lines were fitted to longer secrets. Below this Concrete has no parameters.
LEAST_DIMENSION = 450
