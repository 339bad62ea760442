"""Searches for the cheapest circuit that is accurate enough.

setting: names the networks that are tried.
making: makes them.
parameters: finds the TFHE parameters that are fastest on this machine.
result: holds the circuits that were found.
trying: compiles the networks, and predicts their accuracy.
search: the entry: searches.
"""
