"""Searches for the cheapest circuit that is accurate enough.

result: what was found.
parameters: TFHE parameters that are fastest on this machine.
search: the entry: the search.
"""
