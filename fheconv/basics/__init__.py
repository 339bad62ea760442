"""Holds the tools that every room uses. Nothing here knows about convolutions.

errors: the tree of exceptions.
arrays: turns what users pass into numpy arrays.
samples: turns loaders, datasets and batches of images into arrays.
checks: checks of numbers and words.
config: what users choose: how to quantize.
compile_config: what users choose: how to compile.
security: how much noise an encryption needs.
report: reports as tables, and objects in a few lines, in terminals and notebooks.
keywords: shows calls by their keywords, and answers keywords that do not exist.
progress: spinners and bars, and lines of the log where there is no terminal.
files: writes files whole or not at all, and reads regular files of a bounded size.
warning: warns of probable mistakes.
"""
