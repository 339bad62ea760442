"""Runs Concrete in its own process, which may die without harm.

protocol: defines the messages between the two processes.
library: calls Concrete.
child: the process that runs the library.
system: ties that process to its caller, and checks its limits.
folders: gives that process a private folder.
process: starts that process, and tells how it ended.
worker: the caller's side: sends requests within limits.
handle: holds one circuit there, also after the process died.
lookup_times: measures lookups on this machine.
"""
