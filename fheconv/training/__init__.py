"""Trains a network on within its widths.

straight_through: gradients of lookups.
trainable: an integer network as a torch module.
thinning: networks with fewer lookups.
finetuning: the entry: training on.
"""
