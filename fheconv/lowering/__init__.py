"""Turns a network in integers into one function, for numpy and for Concrete.

pruning: what is left of a convolution when only what is read is computed.
dialect: what numpy and Concrete spell differently.
engines: the ways to compute a convolution.
plan: how one term of a layer is computed.
planes: the last layer in narrow accumulators.
lanes: several images in one ciphertext.
interface: images to a circuit's integers, and results to numbers.
lower: the entry: the function of a whole network.
"""
