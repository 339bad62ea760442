"""Tells what a network costs and how it fails, before anything is compiled.

advice: holds what a message advises.
seconds: tells how long lookups and compiling take.
noise: tells how often the noise of encrypted values makes them wrong.
parameters: chooses TFHE parameters as Concrete does.
sums: finds the encrypted sums whose noise must stay small.
wide: gives the price of lookups that are too wide for one bootstrap.
forecast: tells what a circuit costs before it is compiled.
tiled_forecast: tells the same of an image that runs tile by tile.
trials: finds a way to quantize that fits, by trying.
affordability: refuses circuits that cost too much, with a change that helps.
remedy: says what to change when something does not fit.
budget: compares the widths of a network with a limit.
budget_report: shows that comparison as a report.
failures: computes the accuracy when lookups fail.
drawing: prepares arrays for matplotlib.
window_picture: draws the window of a lookup.
front_picture: draws circuits by accuracy and cost.
plots: draws pictures.
"""
