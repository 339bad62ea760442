"""Defines networks in floats and in integers, and computes the exact ranges of their accumulators.

An *accumulator* is one sum of integer products, before an activation. A *lookup* turns accumulators into the
integers of an activation, by a table. The *span* of an accumulator is its maximum minus its minimum over all
images. A *width* is a number of bits: the width of an accumulator holds its span, because the circuit
subtracts the minimum first (*offset form*).

expression: functions of one variable: the activations.
linear: linear steps between tensors, and chains of them.
composition: convolutions in a row as one convolution, or several that add up.
matrices: sparse matrices as linear steps.
quantization: which real number each integer stands for.
grids: the quantization that a function ends with, as training left it.
floats: networks in floats.
integers: networks in exact integers.
bounds: the exact range of every accumulator.
tiling: images in tiles, for networks of one convolution.
demand: the values that a network's results depend on.
"""
