"""Takes whatever operator torch can show to be linear in the image, as a sparse matrix.

That it is linear is proved first, then its matrix is measured. At last, what was measured is compared with
torch on random images of many sizes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import scipy.sparse
import torch

from fheconv.basics.arrays import Array, Shape
from fheconv.capture.calls import BATCH, Call
from fheconv.capture.graph import Affine, Unsupported, Value
from fheconv.capture.jacobian import Rows, sparse_matrix
from fheconv.capture.proof import Function, is_affine
from fheconv.networks.matrices import Chain, chains, channelwise

# Sizes of the random images: what bends, bends between some of them.
_SCALES = (1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e9, 1e15, 1e30)


def linear(call: Call, arguments: Any, options: Any) -> Affine | None:
    """Return what an operator makes of its arguments, some of which are values, if it is linear in them.

    None if it is not shown to be. Raises `Unsupported` if it mixes the images of a batch or its matrix has
    more than `MOST_ENTRIES` entries.
    """
    values = [leaf for leaf in leaves((arguments, options)) if isinstance(leaf, Value)]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        own = iter(tensors)
        positional, named = filled(
            (arguments, options), lambda leaf: next(own) if isinstance(leaf, Value) else precise(leaf)
        )
        result: torch.Tensor = call.target(*positional, **named)
        return result

    return of_function(call, function, values)


def of_function(call: Call, function: Function, values: Sequence[Value]) -> Affine | None:
    """Return what a function of the tensors of some values makes of them, as `linear` does."""
    if not call.real:  # truth values and whole numbers are added up in other ways
        return None
    output = call.shape
    shapes = [value.shape for value in values]
    zeros = [torch.zeros(BATCH, *shape, dtype=torch.float64) for shape in shapes]
    if not is_affine(function, zeros):
        return None
    bias = function(*zeros)
    if bias.shape != (BATCH, *output) or not torch.isfinite(bias).all():
        return None
    if not torch.equal(bias[0], bias[1]):
        raise Unsupported("its constants differ between the images of a batch")
    total: Affine | None = None
    matrices = []
    for number, value in enumerate(values):
        found, matrix = _Part(function, zeros, bias, number).chains(output)
        matrices.append(matrix)
        for steps, factor in found:
            made = call.graph.affine(value)
            for step in steps[:-1]:
                made = call.graph.linear(made, step, call.name)
            made = call.graph.linear(made, steps[-1], call.name, factor)
            total = made if total is None else call.graph.add(total, made, call.name)
    if not _agrees(function, zeros, bias, matrices):
        return None
    constant = bias[0].numpy()
    if total is None:
        return Affine(call.name, (), constant)
    return Affine(total.name, total.terms, total.bias + constant)


class _Part:
    """The linear function of one of several arguments: what is left where the others are zero."""

    def __init__(
        self, function: Function, zeros: Sequence[torch.Tensor], bias: torch.Tensor, number: int
    ) -> None:
        self.function, self.zeros, self.bias, self.number = function, zeros, bias, number
        self.shape: Shape = tuple(zeros[number].shape[1:])
        self.outputs = bias[0].numel()

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Return the results, less the bias, for a batch of `BATCH` images."""
        result: torch.Tensor = (
            self.function(*(x if at == self.number else zero for at, zero in enumerate(self.zeros)))
            - self.bias
        )
        return result

    def forward(self, rows: Array) -> Array:
        """Return the results (n, outputs) for images (n, inputs)."""
        found = np.empty((len(rows), self.outputs))
        for at in range(0, len(rows), BATCH):
            batch = np.zeros((BATCH, rows.shape[1]))
            batch[: len(rows[at : at + BATCH])] = rows[at : at + BATCH]
            results = self.of(torch.from_numpy(batch).reshape(BATCH, *self.shape)).reshape(BATCH, -1)
            found[at : at + BATCH] = results.numpy()[: len(rows) - at]
        return found

    def backward(self, rows: Array) -> Array:
        """Return the sums (n, inputs) of the matrix's columns, weighed by rows (n, outputs)."""
        found = np.empty((len(rows), math.prod(self.shape)))
        with torch.enable_grad():
            results, pullback, *_ = torch.func.vjp(self.of, self.zeros[self.number])
            for at in range(0, len(rows), BATCH):
                batch = np.zeros((BATCH, rows.shape[1]))
                batch[: len(rows[at : at + BATCH])] = rows[at : at + BATCH]
                (sums,) = pullback(torch.from_numpy(batch).reshape(results.shape))
                found[at : at + BATCH] = sums.detach().reshape(BATCH, -1).numpy()[: len(rows) - at]
        return found

    def chains(self, output: Shape) -> tuple[list[Chain], scipy.sparse.csr_array]:
        """Return the steps that do the same, and the matrix that they come from."""
        channels = self.shape[0] if self.shape else 1
        if channels == 1 or output[:1] != (channels,) or not self._is_channelwise(channels):
            matrix = sparse_matrix(self.forward, self.backward, math.prod(self.shape), self.outputs)
            return chains(matrix, self.shape, output), matrix

        def alone(function: Rows, made: int) -> Rows:
            # Each image shows as many rows as it has channels.
            def of(rows: Array) -> Array:
                count = -(-len(rows) // channels)
                full = np.zeros((count * channels, rows.shape[1]))
                full[: len(rows)] = rows
                return function(full.reshape(count, -1)).reshape(-1, made)[: len(rows)]

            return of

        inner, positions = math.prod(self.shape[1:]), math.prod(output[1:])
        forward, backward = alone(self.forward, positions), alone(self.backward, inner)
        matrix = sparse_matrix(forward, backward, inner, positions)
        whole = scipy.sparse.kron(scipy.sparse.eye_array(channels), matrix, format="csr")
        return channelwise(matrix, self.shape, output), whole

    def _is_channelwise(self, channels: int) -> bool:
        """Return whether the same seems to be done to each channel: the last comparison will tell."""
        rng = np.random.default_rng(0)
        image = rng.standard_normal((1, channels, math.prod(self.shape[1:])))
        image[0, 0] = 0
        results = self.forward(image.reshape(1, -1)).reshape(channels, -1)
        rolled = self.forward(np.roll(image, 1, axis=1).reshape(1, -1)).reshape(channels, -1)
        same = np.abs(np.roll(results, 1, axis=0) - rolled).max() <= 1e-12 * np.abs(rolled).max()
        return bool(same and not results[0].any())


def _agrees(
    function: Function,
    zeros: Sequence[torch.Tensor],
    bias: torch.Tensor,
    matrices: Sequence[scipy.sparse.csr_array],
) -> bool:
    """Return whether matrices and bias give what torch does, on random images of many sizes."""
    generator = torch.Generator().manual_seed(0)
    for scale in _SCALES:
        images = [torch.randn(zero.shape, generator=generator, dtype=torch.float64) * scale for zero in zeros]
        result = function(*images)
        if result.dtype != torch.float64:
            return False
        flat = [image.reshape(BATCH, -1).numpy() for image in images]
        sums = [np.asarray(x @ matrix) for x, matrix in zip(flat, matrices, strict=True)]
        sizes = [np.asarray(abs(x) @ abs(matrix)) for x, matrix in zip(flat, matrices, strict=True)]
        base = bias.reshape(BATCH, -1).numpy()
        error = np.abs(result.reshape(BATCH, -1).numpy() - base - sum(sums))
        if not (error <= 1e-11 * (sum(sizes) + np.abs(base))).all():
            return False
    return True


def precise(leaf: Any) -> Any:
    """Return a constant or a type in double precision; anything else as it is."""
    dtype = leaf.dtype if isinstance(leaf, torch.Tensor) else leaf
    if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or dtype.is_complex):
        return leaf
    double = torch.complex128 if dtype.is_complex else torch.float64
    return leaf.detach().cpu().to(double) if isinstance(leaf, torch.Tensor) else double


def filled(arguments: Any, fill: Callable[[Any], Any]) -> Any:
    """Return arguments of an operator with each of their leaves replaced."""
    if isinstance(arguments, dict):
        return {key: filled(part, fill) for key, part in arguments.items()}
    if isinstance(arguments, list | tuple):
        return type(arguments)(filled(part, fill) for part in arguments)
    return fill(arguments)


def leaves(arguments: Any) -> Iterator[Any]:
    """Yield what is in lists and dictionaries of arguments of an operator."""
    if isinstance(arguments, dict):
        arguments = arguments.values()
    elif not isinstance(arguments, list | tuple):
        yield arguments
        return
    for part in arguments:
        yield from leaves(part)
