"""Writes circuits, keys and ciphertexts, and reads them back from files that are not trusted.

envelope: makes bytes with a header and a digest.
interface: turns a circuit's interface into plain data.
manifest: describes the circuit of a file.
security: checks the parameters before a client accepts them.
archive: writes and reads client.zip and server.zip.
"""
