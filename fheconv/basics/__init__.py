"""Holds the tools that every room uses. Nothing here knows about convolutions.

errors: the tree of exceptions.
arrays: turns what users pass into numpy arrays.
checks: checks of numbers and words.
config: what users choose: how to quantize, how to compile.
report: reports as tables in terminals and notebooks.
progress: spinners and bars.
files: writes files whole or not at all, and refuses to read what is none.
warning: warns of probable mistakes.
"""
