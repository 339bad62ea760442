"""Rounds weights to integers, by one of several methods.

base: what methods share.
minmax: the nearest integers, scaled by the greatest weight.
mse: the integers and the scale of least squared error.
gptq: the integers that change the layer's outputs least.
accumulator: integers like those of gptq, within a budget for the span of each accumulator.
methods: the methods by name.
"""
