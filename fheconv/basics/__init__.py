"""Holds what every room uses, and knows nothing of convolutions.

errors: the tree of exceptions.
arrays: what users pass, as numpy arrays.
checks: checks of numbers and words.
config: what users choose: how to quantize, how to compile.
report: reports as tables in terminals and notebooks.
progress: spinners and bars.
files: files written whole or not at all.
"""
