"""Gives the price of lookups that are too wide for one bootstrap each.

For them Concrete cuts values into residues and looks these up with several bootstraps (circuit bootstrapping,
Bergerat et al. 2023, section 5). Then all lookups of a circuit have the parameters of the widest. These are
the prices that Concrete gives for circuits of a few lookups, which `tests/benchmarks/lookups.py` prints.
Between failure probabilities, prices are interpolated.
"""

import math

import numpy as np

# The columns: failure probabilities of a lookup.
P_ERRORS = (1e-1, 1e-3, 1e-5, 1e-7, 1e-9, 1e-12)
# The rows: log2 of the Euclidean norm of weights before a lookup. Above the last, it no longer counts.
NORM_BITS = (1, 2, 3, 4)
# The greatest dimension of a key, for the bytes of ciphertexts.
WIDE_DIMENSION = 4096
# Millions of the optimiser's complexity of one lookup, by its bits: for each norm, by failure probability.
COMPLEXITY = {
    11: (
        (8070, 8070, 8070, 8070, 8685, 9560),
        (11063, 11063, 11063, 11063, 11895, 12259),
        (15198, 15198, 15198, 15198, 16711, 17560),
        (22700, 22700, 22700, 22700, 23446, 26624),
    ),
    12: (
        (7364, 7364, 8835, 9598, 10451, 12041),
        (10144, 10144, 12127, 13021, 13675, 17119),
        (15495, 15495, 16631, 18626, 19579, 23948),
        (20354, 20354, 24728, 26529, 31002, 39559),
    ),
    13: (
        (6615, 7812, 9474, 10193, 11090, 12808),
        (9123, 10825, 12994, 13825, 14682, 18185),
        (12521, 16467, 17787, 19837, 21058, 25764),
        (16977, 21796, 26373, 29604, 33488, 42331),
    ),
    14: (
        (7653, 9097, 11245, 11921, 12725, 14765),
        (10554, 12684, 15421, 15883, 18237, 20923),
        (14370, 18929, 20810, 22727, 25446, 29774),
        (19973, 25778, 30217, 34203, 40817, 48886),
    ),
    15: (
        (8046, 10856, 12234, 14710, 15849, 17914),
        (11040, 14783, 17745, 21404, 23604, 26542),
        (15928, 20898, 24441, 30527, 33071, 35853),
        (21850, 29114, 40453, 52821, 55040, 66364),
    ),
    16: (
        (8803, 11205, 12620, 13661, 16298, 17356),
        (12112, 15325, 16861, 19809, 22682, 26193),
        (15792, 21062, 24106, 27310, 33533, 36763),
        (22531, 31444, 36214, 45284, 54433, 61091),
    ),
}
# In the same way, megabytes of evaluation keys.
KEYS = {
    11: (
        (545, 545, 545, 545, 801, 598),
        (652, 652, 652, 652, 797, 811),
        (916, 916, 916, 916, 970, 865),
        (1124, 1124, 1124, 1124, 913, 988),
    ),
    12: (
        (580, 580, 548, 810, 602, 782),
        (591, 591, 657, 802, 825, 939),
        (874, 874, 803, 855, 892, 1196),
        (899, 899, 899, 1026, 1235, 1088),
    ),
    13: (
        (685, 590, 552, 812, 602, 783),
        (756, 593, 662, 803, 842, 950),
        (751, 875, 806, 856, 899, 1014),
        (1177, 904, 901, 1081, 1248, 1092),
    ),
    14: (
        (689, 595, 794, 821, 603, 786),
        (759, 602, 791, 805, 869, 954),
        (752, 877, 818, 858, 916, 1022),
        (1209, 924, 903, 975, 1292, 1114),
    ),
    15: (
        (561, 800, 607, 550, 692, 623),
        (562, 796, 882, 809, 756, 906),
        (818, 971, 924, 861, 887, 1060),
        (1116, 913, 930, 953, 991, 1096),
    ),
    16: (
        (554, 542, 818, 606, 547, 579),
        (555, 648, 804, 881, 841, 741),
        (766, 911, 857, 922, 840, 883),
        (813, 1119, 973, 1004, 1244, 984),
    ),
}


def wide_lookup(bits: int, growth: float, p_error: float) -> tuple[float, float] | None:
    """Return the complexity of one lookup, and the bytes of keys, or None if it is too wide for Concrete.

    `bits` is the width of the widest lookup of a circuit. `growth` is the greatest sum of squared weights.
    """
    if bits > max(COMPLEXITY):
        return None
    bits = max(bits, min(COMPLEXITY))
    norm = 0.5 * math.log2(max(growth, 1.0))
    row = min(int(np.searchsorted(NORM_BITS, norm - 0.05)), len(NORM_BITS) - 1)
    at = -math.log10(max(p_error, P_ERRORS[-1]))
    columns = [-math.log10(one) for one in P_ERRORS]
    complexity, keys = (
        math.exp(float(np.interp(at, columns, np.log(table[bits][row])))) * 1e6
        for table in (COMPLEXITY, KEYS)
    )
    return complexity, keys
