"""Turns a network in integers into one function, for numpy and for Concrete.

pruning: removes the work of a convolution that nobody reads.
dialect: operations that numpy and Concrete spell differently.
engines: the ways to compute a convolution.
plan: chooses how to compute one term of a layer.
planes: splits the last layer into narrow accumulators.
lanes: packs several images into one ciphertext.
interface: turns images into a circuit's integers, and its results into real numbers.
layers: makes the function of each layer.
lower: the entry: makes the function of a whole network.
together: decides how many images share a ciphertext.
blocks: names the parts of a circuit in stages.
stages: cuts that function into stages, and these into blocks.
"""
