"""Computes convolutions with numpy and scipy alone.

Every function is N-d: `*S` stands for the spatial sizes (M, N for an image), `*k` for the kernel's sizes (Hf,
Wf). "Convolution" means cross-correlation, as torch and TensorFlow compute it.

exact: the float types in which integer sums stay exact.
geometry: shapes, strides, paddings, and which tap reads which pixel.
matrix: the filter matrix B, whose product with an image is the convolution.
formulations: the entry: convolutions, im2col and gradients.
"""

from fheconv.arithmetic.exact import exact_dtypes
from fheconv.arithmetic.formulations import conv, conv_gradients, conv_transpose, im2col, tap_slices
from fheconv.arithmetic.geometry import (
    OUTSIDE,
    ConvGeometry,
    conv_output_shape,
    expand,
    tap_sources,
    transposed_weight,
)
from fheconv.arithmetic.matrix import filter_matrix

__all__ = [
    "OUTSIDE",
    "ConvGeometry",
    "conv",
    "conv_gradients",
    "conv_output_shape",
    "conv_transpose",
    "exact_dtypes",
    "expand",
    "filter_matrix",
    "im2col",
    "tap_slices",
    "tap_sources",
    "transposed_weight",
]
