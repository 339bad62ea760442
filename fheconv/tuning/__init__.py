"""Searches for the cheapest circuit that is accurate enough.

result: holds the circuits that were found.
parameters: finds the TFHE parameters that are fastest on this machine.
search: the entry: searches.
"""
