"""Writes circuits, keys and ciphertexts, and reads them back from files that are not trusted.

plain: reads JSON at a bounded cost.
envelope: makes bytes with a header and a digest.
interface: turns a circuit's interface into plain data.
identity: names circuits.
recipe: says how a circuit is compiled.
manifest: describes the circuit of a file.
specs: turns Concrete's parameters into plain data.
security: checks the parameters before a client accepts them.
consistency: checks that the parts of a file are of one circuit.
archive: writes and reads client.zip and server.zip.
"""
