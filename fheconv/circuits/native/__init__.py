"""Runs Concrete in its own process, which may die without harm.

protocol: defines the messages between the two processes.
library: calls Concrete.
child: the process that runs the library.
worker: the caller's side of that process.
handle: holds one circuit there, also after the process died.
lookup_times: measures lookups on this machine.
"""
