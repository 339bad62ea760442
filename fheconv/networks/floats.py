"""Defines a trained network in floats.

Tensors are numbered: 0 is the image, i is the output of layer i − 1. One layer holds everything linear
between two activations, so that each activation is one lookup.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fheconv.arithmetic import ConvGeometry
from fheconv.arithmetic.geometry import Padding, PaddingMode, PerAxis, direct_form
from fheconv.basics.arrays import Array, ArrayLike, Shape, along_channels, as_array, channel_vector, frozen
from fheconv.basics.errors import InvalidArgumentError
from fheconv.networks.expression import Expression
from fheconv.networks.linear import Kernel, Select, Term
from fheconv.networks.quantization import Quantization


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Conv:
    """Holds a convolution in floats: `weight` (K, C/groups, *k), `bias` (K,) or None.

    A transposed convolution is kept as a plain convolution over the expanded input that `geometry` describes:
    its weight is flipped and has this layout.

    Example:
        >>> up = Conv.of(np.ones((2, 1, 4, 4)), stride=2, padding=1, transposed=True)
        >>> up.weight.shape, up.in_channels
        ((1, 2, 4, 4), 2)
    """

    name: str
    weight: Array
    bias: Array | None
    geometry: ConvGeometry

    @classmethod
    def of(
        cls,
        weight: ArrayLike,
        bias: ArrayLike | None = None,
        *,
        stride: PerAxis = 1,
        padding: Padding = 0,
        dilation: PerAxis = 1,
        groups: int = 1,
        padding_mode: PaddingMode = "zeros",
        transposed: bool = False,
        output_padding: PerAxis = 0,
        name: str = "conv",
    ) -> "Conv":
        """Make a convolution from a weight (K, C/groups, *k) or (Hf, Wf), and torch's arguments.

        The weight of a transposed convolution is (C, K/groups, *k), as in torch.

        Example:
            >>> conv = Conv.of([[1, 0, -1], [2, 0, -2], [1, 0, -1]], stride=2, name="sobel")
            >>> conv.name, conv.weight.shape, conv.in_channels
            ('sobel', (1, 1, 3, 3), 1)

        Raises `InvalidArgumentError` for arguments that do not fit together.
        """
        weight = as_array(weight, "weight")
        if weight.ndim == 2:
            weight = weight[None, None]
        if weight.ndim < 3 or 0 in weight.shape:
            raise InvalidArgumentError(
                f"weight has shape {weight.shape}; it must be (out_channels, in_channels/groups, *kernel), "
                "none of them 0, or a plain (Hf, Wf)."
            )
        weight, geometry = direct_form(
            weight,
            transposed=transposed,
            padding_mode=padding_mode,
            output_padding=output_padding,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
        geometry.check_channels(weight.shape[1] * groups, weight.shape)
        bias = None if bias is None else channel_vector(bias, len(weight))
        return cls(
            name=str(name),
            weight=frozen(weight),
            bias=None if bias is None else frozen(bias),
            geometry=geometry,
        )

    def __repr__(self) -> str:
        bias = "no bias" if self.bias is None else "a bias"
        return f"Conv {self.name!r}: weight {self.weight.shape}, {bias}, {self.geometry!r}"

    @property
    def in_channels(self) -> int:
        """The number C of channels that it reads."""
        return int(self.weight.shape[1]) * self.geometry.groups


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """Computes Σ terms + `bias` (C, *S), and then an activation.

    The last layer has the `activation` None: its sums are decrypted without a lookup.

    Two tensors x and y are multiplied by squares: xy = (x + y)²/4 − (x − y)²/4. A layer that computes these
    squares has x + y in the channels 0, 2, … and x − y in the channels 1, 3, …, and its first `factor_terms`
    terms are those of x. They are read as differences alone. In all other layers this is None.
    """

    name: str
    terms: tuple[Term, ...]
    bias: Array
    activation: Expression | None
    factor_terms: int | None = None

    def __repr__(self) -> str:
        return f"Layer {self.name!r}: {self.kind} → {self.shape}"

    @property
    def shape(self) -> Shape:
        """The shape (C, *S) of its output."""
        return self.bias.shape

    @property
    def sources(self) -> tuple[int, ...]:
        """The tensors that it reads."""
        return tuple(term.source for term in self.terms)

    @property
    def kind(self) -> str:
        """A description in a few words, such as "conv 3×3, pool 2×2, relu"."""
        words: list[str] = []
        for term in self.terms:
            for step in term.steps:
                if isinstance(step, Kernel) and not term.is_plain():
                    size = "×".join(map(str, step.geometry.kernel))
                    words.append(f"{'pool' if step.exact else 'conv'} {size}" if size else "linear")
            if term.is_plain():
                words.append("skip")
        names = [] if self.activation is None else self.activation.operators()
        return ", ".join([*dict.fromkeys(words), *names])

    def sums(self, tensors: Sequence[Array]) -> Array:
        """Return what enters the activation, (N, C, *S)."""
        y = self.bias[None]
        for term in self.terms:
            y = y + term.factor * term.apply(tensors[term.source])
        return y

    def output(self, tensors: Sequence[Array]) -> Array:
        """Return the layer's output, (N, C, *S)."""
        y = self.sums(tensors)
        return y if self.activation is None else self.activation(y)


@dataclass(frozen=True, kw_only=True, eq=False)
class Maximum:
    """Computes maxima of values of one tensor: max(x.flat[index[0]], x.flat[index[1]], …).

    `index` is (n, C, *S). The same layer works for floats and for integers.
    """

    name: str
    source: int
    index: Array

    @property
    def shape(self) -> Shape:
        """The shape (C, *S) of its output."""
        return self.index.shape[1:]

    @property
    def sources(self) -> tuple[int, ...]:
        """The tensor that it reads."""
        return (self.source,)

    @property
    def kind(self) -> str:
        """A description in a few words, such as "maximum of 4"."""
        return f"maximum of {len(self.index)}"

    def candidates(self, x: Array) -> Array:
        """Return the values (n, N, C, *S) whose maximum over n is the output, for the tensor `x`."""
        return np.moveaxis(x.reshape(len(x), math.prod(x.shape[1:]))[:, self.index], 1, 0)

    def output(self, tensors: Sequence[Array]) -> Array:
        """Return the layer's output, (N, C, *S)."""
        return self.candidates(tensors[self.source]).max(axis=0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Finish:
    """Computes, on the client and in clear, the model's outputs from the decrypted results."""

    activation: Expression
    view: Select | None = None
    last: Expression | None = None

    def __call__(self, y: Array) -> Array:
        """Return the model's outputs (N, …) for the last layer's, (N, C, *S)."""
        y = self.activation(y)
        if self.view is not None:
            y = self.view.apply(y, 0)
        return y if self.last is None else self.last(y)


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """Computes in floats the model's outputs for images of shape `input_shape`.

    `trained` says that the model was trained for integers: it rounds its own weights or activations. `image`
    is the quantization of images that such a model begins with, None if it has none.
    """

    input_shape: Shape
    layers: tuple[Layer | Maximum, ...]
    finish: Finish | None = None
    trained: bool = False
    image: Quantization | None = None

    def __repr__(self) -> str:
        trained = ", trained for integers" if self.trained else ""
        return f"Network: {self.input_shape} → {self.shapes[-1]}, {len(self.layers)} layers{trained}"

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The shape of each tensor."""
        return (self.input_shape, *(layer.shape for layer in self.layers))

    @np.errstate(over="ignore", invalid="ignore")  # callers check what is not finite
    def tensors(self, x: Array) -> list[Array]:
        """Return every tensor for a batch of images, float64."""
        x = x.astype(np.float64)
        tensors = [x if self.image is None else self.image.real(self.image.nearest(x))]
        for layer in self.layers:
            tensors.append(layer.output(tensors))
        return tensors

    def rescaled(self, number: int, factors: Array) -> "tuple[Network, dict[int, Array]] | None":
        """Return the network whose weights expect tensor `number` divided by `factors` (C,), one a channel.

        Also return the factor of each value, for every tensor that changes: this one, and maxima of it.
        Return None if one weight, or one maximum, would have to compensate several factors.
        """
        shape = self.shapes[number]
        concerned = {number: np.broadcast_to(along_channels(factors, len(shape)), shape)}
        layers = [*self.layers]
        for place, reader in enumerate(layers):
            if isinstance(reader, Maximum):
                if reader.source in concerned:
                    candidates = reader.candidates(concerned[reader.source][None])[:, 0]
                    if (candidates != candidates[0]).any():
                        return None
                    concerned[place + 1] = candidates[0]
            else:
                terms = []
                for term in reader.terms:
                    own = concerned.get(term.source)
                    absorbed = term if own is None else term.absorbed(own)
                    if absorbed is None:
                        return None
                    terms.append(absorbed)
                layers[place] = replace(reader, terms=tuple(terms))
        return replace(self, layers=tuple(layers)), concerned

    def __call__(self, x: Array) -> Array:
        """Return the outputs for a batch (N, *input_shape), as torch computes them, in float64."""
        y = self.tensors(x)[-1]
        return y if self.finish is None else self.finish(y)

    @classmethod
    def of(cls, conv: Conv, input_shape: Shape) -> "Network":
        """Return a network of a single convolution."""
        kernel = Kernel(weight=conv.weight, geometry=conv.geometry)
        output = kernel.output_shape(input_shape)
        bias = np.zeros(len(conv.weight)) if conv.bias is None else conv.bias.astype(np.float64)
        full = np.broadcast_to(along_channels(bias, len(output)), output)
        term = Term(source=0, steps=(kernel,))
        return cls(
            input_shape=input_shape,
            layers=(Layer(name=conv.name, terms=(term,), bias=frozen(full), activation=None),),
        )


def real_results(accumulators: Array, scale: Array, finish: Finish | None) -> Array:
    """Turn the last accumulators (N, K, *Out) into the model's outputs (float64)."""
    y = accumulators * scale
    return y if finish is None else finish(y)
