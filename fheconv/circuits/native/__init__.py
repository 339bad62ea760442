"""Runs Concrete in its own process, which may die without harm.

protocol: defines the messages between the two processes.
binding: imports what is used of Concrete.
options: spells a compilation's options as Concrete takes them.
modules: compiles a circuit in stages.
wiring: checks that values can go from block to block.
library: calls Concrete.
start: starts that process, which ends with its caller from the first moment.
child: serves requests in that process.
system: settles with the system how that process ends, and checks its limits.
folders: gives that process a private folder.
process: starts that process, and tells how it ended.
worker: the caller's side: sends requests within limits.
handle: holds one circuit there, also after the process died.
lookup_times: measures lookups on this machine.
"""
