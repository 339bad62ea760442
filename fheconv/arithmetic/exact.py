"""Finds the dtype in which a sum of products is exact."""

from typing import Any

import numpy as np

from fheconv.basics.arrays import Array
from fheconv.basics.errors import AccumulatorOverflowError


def _max_abs(x: Array) -> int:
    return max(abs(int(x.max())), abs(int(x.min()))) if x.size else 0


def exact_dtypes(a: Array, b: Array, terms: int, bias: Array | None) -> tuple[np.dtype[Any], np.dtype[Any]]:
    """Return two dtypes: one in which sums of `terms` products are computed, and one for their result.

    Integers use floating-point BLAS if terms · max|a| · max|b| + max|bias| is proved to be below 2²⁴
    (float32) or 2⁵³ (float64). Then every partial sum is exact, in any order of addition. (numpy's integer
    product has no BLAS and is some fifty times slower.) Larger sums use int64. Sums that may pass int64 raise
    `AccumulatorOverflowError`.
    """
    operands = [a, b] if bias is None else [a, b, bias]
    if any(operand.dtype.kind == "f" for operand in operands):
        dtype = np.result_type(*operands)
        # Half precision is exact for few sums only, and scipy.sparse does not support it.
        working = np.result_type(dtype, np.float32)
        return working, dtype if "f" in (a.dtype.kind, b.dtype.kind) else working
    bound = terms * _max_abs(a) * _max_abs(b) + (0 if bias is None else _max_abs(bias))
    bound = max(bound, *(_max_abs(operand) for operand in operands))
    if bound >= 2**63:
        raise AccumulatorOverflowError(
            f"A sum of {terms} integer products may reach {bound}, past int64 (2**63 − 1). "
            "Narrower weights or inputs reach less far.",
            value=bound,
            limit=2**63 - 1,
        )
    if bound < 2**24:
        return np.dtype(np.float32), np.dtype(np.int64)
    return np.dtype(np.float64 if bound < 2**53 else np.int64), np.dtype(np.int64)
