"""Compiles networks, and keeps keys, ciphertexts and both sides of a circuit.

files: what is written and read.
native: the process in which Concrete runs.
cost: what a circuit costs.
ciphertext: encrypted images and results.
keys: evaluation keys and key files.
owner: whoever has the keys: encrypts and decrypts.
verification: encrypted results against clear ones.
circuit: the entry: both sides at once.
client: the side with the keys.
server: the side without them.
tiled: images of any size, tile by tile.
"""
