"""Follows what only moves the values of a softmax, which is a model's last operation and computed in clear.

Exports of Keras transpose and reshape what a softmax gives. The softmax of moved values is the same, as long
as the values that add up to one still lie along one axis.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fheconv.basics.arrays import Array
from fheconv.capture.calls import BATCH, Call
from fheconv.capture.graph import Final, Unsupported
from fheconv.capture.operators import HANDLERS, MOVES, SAME
from fheconv.networks.expression import Expression, X


def after(call: Call, final: Final, arguments: Any, options: Any) -> Final:
    """Return what an operator makes of a softmax's result: the softmax of moved values.

    Raises `Unsupported` for any other operator, and for one after an argmax.
    """
    same = call.operation in SAME or (call.operation in ("to", "to_copy") and call.real)
    if same and arguments[0] is final:
        return final
    if call.operation not in MOVES or "softmax" not in final.last.operator or arguments[0] is not final:
        raise Unsupported(
            f"the {final.last.operator} before it can only be the last operation, which the client "
            "computes in clear; the nearest that is supported: an activation"
        )
    shape = final.inner.shape
    axis = dict(final.last.options)["axis"] - 1
    groups = np.zeros(shape, np.int64)
    groups += np.arange(groups.size // shape[axis]).reshape(*shape[:axis], 1, *shape[axis + 1 :])
    places = _moved(call, np.arange(groups.size).reshape(shape), arguments, options)
    along = _axis(groups.ravel()[places], shape[axis])
    if along is None or len(np.unique(places)) != groups.size or places.size != groups.size:
        raise Unsupported(
            f"it takes apart the values over which the {final.last.operator} before it runs; return all of "
            "them, and choose after decryption"
        )
    moved = HANDLERS[call.operation](call, final.inner, *arguments[1:], **options)
    last = Expression(final.last.operator, (X,), (("axis", along + 1),))
    return Final(replace(call.graph.pending(moved), name=call.name), last)


def _moved(call: Call, values: Array, arguments: Any, options: Any) -> Array:
    """Return where an operator moves the values of one image (C, *S)."""
    batch = torch.from_numpy(np.stack([values] * BATCH))
    moved: Any = call.target(batch, *arguments[1:], **options)
    if not isinstance(moved, torch.Tensor) or moved.shape[:1] != (BATCH,):
        raise Unsupported("it takes the result of a softmax apart; return it whole")
    return moved[0].numpy()


def _axis(groups: Array, size: int) -> int | None:
    """Return the axis of `size` along which values are of one group, or None."""
    for axis, length in enumerate(groups.shape):
        if length == size and (groups == groups.take([0], axis)).all():
            return axis
    return None
