"""Tells what a network costs and how it fails, before anything is compiled.

prices: gives the price of a lookup.
remedy: says what to change when something does not fit.
budget: compares the widths of a network with a limit.
budget_report: shows that comparison as a report.
failures: computes the accuracy when lookups fail.
drawing: prepares arrays for matplotlib.
window_picture: draws the window of a lookup.
plots: draws pictures.
"""
