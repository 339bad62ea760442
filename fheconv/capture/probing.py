"""Takes whatever operator torch can show to be linear in the image, as a sparse matrix.

That it is linear is proved first, and only then measured. torch knows the derivative of its operators: traced
as a graph of operators, a derivative that does not read the image is the same everywhere, so what it belongs
to is affine. Left are steps, such as floor, whose derivative is the same wherever there is one: they are known
by name and by the types of what they give. At last, what was measured is compared with torch on random images
of many sizes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse
import torch
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from fheconv.basics.arrays import Array, Shape
from fheconv.capture.calls import BATCH, Call, image_shape
from fheconv.capture.graph import Affine, Unsupported, Value
from fheconv.networks.matrices import MOST_ENTRIES, Chain, channelwise, chains

# A function of tensors (BATCH, *S), one for each encrypted argument, in double precision.
Function: TypeAlias = Callable[..., torch.Tensor]
# A linear function of rows (n, inputs), which gives rows (n, outputs).
Rows: TypeAlias = Callable[[Array], Array]

# Functions of steps: flat, or of slope 1, almost everywhere.
_STEPS = {
    "bernoulli", "bucketize", "ceil", "copysign", "fix", "floor", "floor_divide", "fmod", "frac", "heaviside",
    "nan_to_num", "nextafter", "remainder", "rint", "round", "searchsorted", "sgn", "sign", "signbit", "trunc",
}  # fmt: skip
# What reads the shape of a tensor, and none of its values.
_SHAPES = {
    "empty_like", "full_like", "has_same_storage_numel", "is_same_size", "new_empty", "new_full", "new_ones",
    "new_zeros", "ones_like", "sym_size", "zeros_like",
}  # fmt: skip
# Sizes of the random images: what bends, bends between some of them.
_SCALES = (1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e9, 1e15, 1e30)
_COLOURS = 64
# So many numbers are run through the operator at once.
_PIECE = 2**22


def linear(call: Call, arguments: Any, options: Any) -> Affine | None:
    """Return what an operator makes of its arguments, some of which are values, if it is linear in them.

    None if it is not shown to be. Raises `Unsupported` if it mixes the images of a batch or its matrix has
    more than `MOST_ENTRIES` entries.
    """
    values = [leaf for leaf in _leaves((arguments, options)) if isinstance(leaf, Value)]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        own = iter(tensors)
        filled, named = _filled((arguments, options), lambda leaf: _double(leaf, own))
        result: torch.Tensor = call.target(*filled, **named)
        return result

    return of_function(call, function, values)


def of_function(call: Call, function: Function, values: Sequence[Value]) -> Affine | None:
    """Return what a function of the tensors of some values makes of them, as `linear` does."""
    if not all(_is_float(node.meta.get("val")) for node in (call.node, *call.node.all_input_nodes)):
        return None  # truth values and whole numbers are added up in other ways
    output = call.shape
    shapes = [value.shape for value in values]
    zeros = [torch.zeros(BATCH, *shape, dtype=torch.float64) for shape in shapes]
    if not _is_affine(function, zeros):
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
        for (*steps, last), factor in found:
            made = call.graph.affine(value)
            for step in steps:
                made = call.graph.linear(made, step, call.name)
            made = call.graph.linear(made, last, call.name, factor)
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
            results, pullback = torch.func.vjp(self.of, self.zeros[self.number])
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
        """Whether the same seems to be done to each channel: the last comparison will tell."""
        rng = np.random.default_rng(0)
        image = rng.standard_normal((1, channels, math.prod(self.shape[1:])))
        image[0, 0] = 0
        results = self.forward(image.reshape(1, -1)).reshape(channels, -1)
        rolled = self.forward(np.roll(image, 1, axis=1).reshape(1, -1)).reshape(channels, -1)
        same = np.abs(np.roll(results, 1, axis=0) - rolled).max() <= 1e-12 * np.abs(rolled).max()
        return bool(same and not results[0].any())


def sparse_matrix(forward: Rows, backward: Rows, inputs: int, outputs: int) -> scipy.sparse.csr_array:
    """Return the matrix (inputs, outputs) of a linear function, in memory that its entries need.

    `forward` applies it to rows, `backward` applies the transposed matrix.
    Raises `Unsupported` if it has more than `MOST_ENTRIES` entries.
    """
    if outputs < inputs:
        return scipy.sparse.csr_array(sparse_matrix(backward, forward, outputs, inputs).T)
    width = 1 << max(inputs - 1, 0).bit_length()
    # Blocks of inputs, and which outputs each may reach: halved until a block is one input.
    starts, reach = [0], [np.arange(outputs)]
    values = [np.zeros(0)]
    while True:
        reach, values = _reached(forward, starts, width, reach, inputs)
        if sum(map(len, reach)) > MOST_ENTRIES:
            raise Unsupported(
                f"it is linear, but each output reads so many of the {inputs:,} values that its matrix has more "
                f"than {MOST_ENTRIES:,} entries; reduce the image before it"
            )
        if width == 1:
            break
        width //= 2
        halves = [(s, r) for start, r in zip(starts, reach, strict=True) for s in (start, start + width)
                  for r in [r] if s < inputs and len(r)]  # fmt: skip
        starts, reach = [s for s, _ in halves], [r for _, r in halves]
        if not starts:
            return scipy.sparse.csr_array((inputs, outputs))
    rows = np.repeat(starts, [len(r) for r in reach])
    entries = np.concatenate(values), (rows, np.concatenate(reach))
    return scipy.sparse.csr_array(entries, shape=(inputs, outputs))


def _reached(
    forward: Rows, starts: Sequence[int], width: int, reach: Sequence[Array], inputs: int
) -> tuple[list[Array], list[Array]]:
    """Return which outputs each block of inputs reaches, and their values.

    Blocks that reach none in common share an image (Curtis, Powell and Reid 1974). A block shows random
    numbers, of which no two sums cancel; a block of one shows 1.
    """
    rng = np.random.default_rng(width)
    shown = np.ones(inputs) if width == 1 else rng.uniform(0.5, 1, inputs) * rng.choice([-1.0, 1.0], inputs)
    images = _coloured(reach)
    found: list[Array] = [np.zeros(0, np.int64)] * len(starts)
    values: list[Array] = [np.zeros(0)] * len(starts)
    outputs = max((int(r.max()) + 1 for r in reach if len(r)), default=1)
    count = max(BATCH, _PIECE // max(inputs, outputs))
    for first in range(0, len(images), count):
        piece = images[first : first + count]
        rows = np.zeros((len(piece), inputs))
        for row, blocks in zip(rows, piece, strict=True):
            for block in blocks:
                own = slice(starts[block], starts[block] + width)
                row[own] = shown[own]
        for result, blocks in zip(forward(rows), piece, strict=True):
            for block in blocks:
                own_values = result[reach[block]]
                found[block] = reach[block][own_values != 0]
                values[block] = own_values[own_values != 0]
    return found, values


def _coloured(reach: Sequence[Array]) -> list[list[int]]:
    """Return the numbers of the blocks in lists of those that reach no output in common."""
    outputs = max((int(r.max()) + 1 for r in reach if len(r)), default=1)
    used = np.zeros(outputs, np.uint64)
    images: list[list[int]] = [[] for _ in range(_COLOURS)]
    alone: list[list[int]] = []
    for block, own in enumerate(reach):
        taken = int(np.bitwise_or.reduce(used[own]))
        free = ~taken & (2**_COLOURS - 1)
        if not free:
            alone.append([block])
            continue
        lowest = free & -free
        used[own] |= np.uint64(lowest)
        images[lowest.bit_length() - 1].append(block)
    return [one for one in images if one] + alone


# The proof.


def _is_affine(function: Function, examples: Sequence[torch.Tensor]) -> bool:
    """Whether torch's derivative of a function reads none of its arguments, and the function has no steps."""
    count = len(examples)

    def derivative(*tensors: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.func.jvp(function, tensors[:count], tensors[count:])[1]
        return result

    try:
        values = make_fx(function)(*examples).graph
        slopes = make_fx(derivative)(*examples, *examples).graph
    except Exception:  # whatever an operator without a derivative raises, or one whose path needs the values
        return False
    read = _depends(slopes, _inputs(slopes)[:count])
    (output,) = slopes.find_nodes(op="output")
    if any(node in read for node in output.all_input_nodes):
        return False
    # Floats all the way: comparisons, truth values and whole numbers are steps.
    for node in _depends(values, _inputs(values)):
        result = node.meta.get("val")
        if _plain_name(node) in _STEPS or node.kwargs.get("rounding_mode") is not None:
            return False
        if isinstance(result, torch.Tensor) and not (result.is_floating_point() or result.is_complex()):
            return False
    return True


def _inputs(graph: Graph) -> list[Node]:
    return list(graph.find_nodes(op="placeholder"))


def _depends(graph: Graph, sources: Sequence[Node]) -> set[Node]:
    """Return the nodes whose values depend on those of some nodes."""
    found = set(sources)
    for node in graph.nodes:
        if _plain_name(node) not in _SHAPES and any(one in found for one in node.all_input_nodes):
            found.add(node)
    return found


def _plain_name(node: Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).split(".")[0].strip("_")


def _agrees(
    function: Function,
    zeros: Sequence[torch.Tensor],
    bias: torch.Tensor,
    matrices: Sequence[scipy.sparse.csr_array],
) -> bool:
    """Whether matrices and bias give what torch does, on random images of many sizes."""
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


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _double(leaf: Any, own: Iterator[torch.Tensor]) -> Any:
    """Return a tensor for a value, and constants in double precision."""
    if isinstance(leaf, Value):
        return next(own)
    if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
        return leaf.detach().cpu().double()
    if isinstance(leaf, torch.dtype) and leaf.is_floating_point:
        return torch.float64
    return leaf


def _filled(arguments: Any, fill: Callable[[Any], Any]) -> Any:
    if isinstance(arguments, dict):
        return {key: _filled(part, fill) for key, part in arguments.items()}
    if isinstance(arguments, list | tuple):
        return type(arguments)(_filled(part, fill) for part in arguments)
    return fill(arguments)


def _leaves(arguments: Any) -> Iterator[Any]:
    if isinstance(arguments, dict):
        arguments = arguments.values()
    elif not isinstance(arguments, list | tuple):
        yield arguments
        return
    for part in arguments:
        yield from _leaves(part)
