"""Implements the command `fheconv`.

arguments: reads arguments and files.
kinds: tells which kind of file a file is.
outcome: turns errors into messages and exit statuses.
circuits: the commands for saved circuits.
running: runs a saved circuit on a ciphertext.
serve: serves a saved circuit.
experiments: tries a model before it is used: simulate, verify, tune and finetune.
inspection: tells what a file is.
lock: writes what a model needs, and fails when it needs more.
bench: times the steps of a circuit.
demo: runs the demo.
main: the commands.
entry: the entry: signals, and then the imports.
"""
