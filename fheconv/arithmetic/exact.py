"""In which dtype a sum of products is exact."""

from typing import Any

import numpy as np

from fheconv.basics.arrays import Array
from fheconv.basics.errors import AccumulatorOverflowError


def _max_abs(x: Array) -> int:
    return max(abs(int(x.max())), abs(int(x.min()))) if x.size else 0


def exact_dtypes(a: Array, b: Array, terms: int, bias: Array | None) -> tuple[np.dtype[Any], np.dtype[Any]]:
    """Return the dtype to compute sums of `terms` products in, and the dtype of their result.

    Integers go through floating-point BLAS where terms · max|a| · max|b| + max|bias| is proved to be
    below 2²⁴ (float32) or 2⁵³ (float64): every partial sum is then exact, in whatever order BLAS adds
    (numpy's integer product has no BLAS and is some fifty times slower). Above, int64; past that,
    `AccumulatorOverflowError`.
    """
    operands = [a, b] if bias is None else [a, b, bias]
    if any(operand.dtype.kind == "f" for operand in operands):
        dtype = np.result_type(*operands)
        # Half precision holds few sums, and scipy.sparse not at all.
        working = np.result_type(dtype, np.float32)
        return working, dtype if "f" in (a.dtype.kind, b.dtype.kind) else working
    bound = terms * _max_abs(a) * _max_abs(b) + (0 if bias is None else _max_abs(bias))
    bound = max(bound, *(_max_abs(operand) for operand in operands))
    if bound >= 2**63:
        raise AccumulatorOverflowError(
            f"A sum of {terms} integer products may reach {bound}, past int64 (2**63 − 1); use "
            "narrower weights or inputs.",
            value=bound,
            limit=2**63 - 1,
        )
    if bound < 2**24:
        return np.dtype(np.float32), np.dtype(np.int64)
    return np.dtype(np.float64 if bound < 2**53 else np.int64), np.dtype(np.int64)
