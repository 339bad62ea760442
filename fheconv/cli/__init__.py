"""Is the command `fheconv`.

arguments: arguments and files as users give them.
circuits: commands of saved circuits.
inspection: what a file is.
bench: how long the steps take.
demo: the demo.
main: the entry: the commands.
"""
