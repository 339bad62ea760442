"""Settles how blocks go together: by which options, in which form values go on, and what the ends need."""

import json
from dataclasses import replace
from typing import Any

from fheconv.basics.compile_config import CompileConfig
from fheconv.circuits.files.specs import named_circuit
from fheconv.circuits.native.protocol import Refused
from fheconv.lowering.blocks import Block

# The failure probability with which blocks are compiled for keys that are chosen already.
LENIENT = 0.5


def lenient(config: CompileConfig) -> CompileConfig:
    """Return the configuration with which blocks are compiled for the keys of the circuit without stages."""
    return replace(config, p_error=LENIENT, global_p_error=None, parameters=None)


def ends_of(specs: bytes) -> bytes:
    """Return the parameters of one circuit that takes the image and returns the results, in Concrete's words.

    Of a circuit in stages, each of whose blocks has inputs and a result, these are the image of the first
    block and the results of the last. Whoever encrypts and decrypts need not know of the others.
    """
    data = json.loads(specs)
    image, result = data["circuits"][0]["inputs"][0], data["circuits"][-1]["outputs"][0]
    return json.dumps({"keyset": data["keyset"], **named_circuit(image, result)}).encode()


def check_wires(specs: bytes, blocks: tuple[Block, ...]) -> None:
    """Raise `Refused` unless every block takes values as they are: of one width, under one secret key."""
    circuits = {circuit["name"]: circuit for circuit in json.loads(specs)["circuits"]}
    made = [circuits[blocks[0].name]["inputs"][blocks[0].reads.index(0)]]
    made += [circuits[block.name]["outputs"][0] for block in blocks]
    for block in blocks:
        for number, taken in zip(block.reads, circuits[block.name]["inputs"], strict=True):
            if _form(taken) != _form(made[number]):
                what = "the image" if number == 0 else f"value {number}"
                raise Refused(
                    f"Concrete encodes {what} otherwise for block {block.name} than where it comes from; "
                    "compile the network as one circuit, without stages."
                )


def _form(one: Any) -> tuple[Any, ...]:
    """Return how a value is encrypted, apart from its compression: a block takes both forms."""
    value = one["typeInfo"]["lweCiphertext"]
    return value["abstractShape"]["dimensions"], value["encoding"], value["encryption"]
