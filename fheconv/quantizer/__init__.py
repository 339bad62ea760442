"""Turns a network in floats, and calibration images, into one in integers.

layerwise: the entry: layer after layer.
sparing: a bit less of weights or activations, where that is as good.
allocation: chooses the widths that are "auto".
components: groups what has to share a scale.
factors: sizes of the two factors of a product.
activations: scales of images and activations.
equalization: scales of an activation's channels.
evidence: how much calibration images tell.
rows: filters that must share a scale.
moments: second moments of what weights multiply.
weights: integer weights of a layer.
trained: integer weights that training has left.
rounding: the methods that round weights.
tables: lookup tables.
windows: windows of lookups, and how wide they may be.
placement: where windows lie.
steps: how fine accumulators are, and which widths are tried.
gains: integers that multiply the weights of narrow channels.
draft: a layer with integer weights, before gains and lookup.
building: the integer network, as far as it is built.
"""
