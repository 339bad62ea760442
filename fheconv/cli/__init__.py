"""Implements the command `fheconv`.

arguments: reads arguments and files.
circuits: the commands for saved circuits.
inspection: tells what a file is.
lock: writes what a model needs, and fails when it needs more.
bench: times the steps of a circuit.
demo: runs the demo.
main: the entry: the commands.
"""
