"""Tells what a network costs and how it fails, before anything is compiled.

prices: what a lookup costs.
remedy: what to change where something does not fit.
budget: the widths of a network, held against a limit.
budget_report: the same as a report.
failures: accuracy under failing lookups.
drawing: arrays as matplotlib draws them.
plots: pictures.
"""
