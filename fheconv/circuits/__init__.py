"""Compiles networks, and keeps keys, ciphertexts and both sides of a circuit.

files: writes and reads files.
native: runs Concrete in its own process.
sizes: computes the bytes of keys and ciphertexts.
cost: reports the cost of a circuit.
ciphertext: holds encrypted images and results.
keys: holds evaluation keys, and writes and reads key files.
owner: holds the keys, encrypts and decrypts.
verification: compares encrypted results with clear ones.
refused: finds out what does compile, where Concrete refuses.
circuit: both sides of a circuit at once.
kept: keeps the encrypted values of a run that has not finished.
stepping: runs a circuit in stages, block by block.
staged: both sides of a circuit in stages.
compiling: the entry: compiles a network, for keys of its own or of another circuit.
client: the side with the keys.
server: the side without secret keys.
tiled: runs images of any size, tile by tile.
cascade: lets a cheap circuit answer first.
"""
