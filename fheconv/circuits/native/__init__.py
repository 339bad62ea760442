"""Runs Concrete in a process of its own, which may die without harm.

protocol: what the two processes say to each other.
library: the calls to Concrete.
child: the process that runs the library.
worker: the caller's side of that process.
handle: one circuit there, across its deaths.
lookup_times: how long lookups take on this machine.
"""
