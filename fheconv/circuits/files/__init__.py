"""Writes circuits, keys and ciphertexts, and reads them back from files that nobody vouches for.

envelope: bytes with a header and a digest.
interface: a circuit's interface as plain data.
manifest: what a file says of its circuit.
security: which parameters a client accepts.
archive: client.zip and server.zip.
"""
