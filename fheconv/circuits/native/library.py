"""Calls Concrete: compiles circuits, makes keys, encrypts, runs and decrypts.

Other modules call it through `fheconv.circuits.native.worker`, because the native library may end the
process. What requests carry is imported here: what a worker imports later counts towards a user's limits.
"""

import math
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fheconv.basics.arrays import Array
from fheconv.basics.compile_config import CompileConfig
from fheconv.basics.errors import ArtifactError, CompilationError
from fheconv.circuits.files.identity import identity_of
from fheconv.circuits.files.recipe import Recipe
from fheconv.circuits.keys import StoredKeys
from fheconv.circuits.native.binding import fhe
from fheconv.circuits.native.modules import compiled_circuit, compiled_stages, names_of, rules_of
from fheconv.circuits.native.options import configuration_of, saved_configuration
from fheconv.circuits.native.protocol import CircuitForgotten, Compiled, KeysForgotten, Opened, Refused
from fheconv.circuits.native.system import require_addresses, require_programs
from fheconv.circuits.native.wiring import check_wires, ends_of
from fheconv.circuits.sizes import sizes_of
from fheconv.lowering.blocks import blocks_of
from fheconv.lowering.interface import Interface
from fheconv.lowering.lower import lower
from fheconv.lowering.stages import in_stages
from fheconv.quantized import QuantizedNetwork


class NativeCircuits:
    """Compiled circuits by number, each with the key set that was generated for it or loaded into it.

    Every call names the key set that it means. A circuit that has another key set, or none yet, counts as
    forgotten. The reason: a caller that was interrupted in `keygen` does not have the keys that the worker
    may have made, and Concrete would make new ones without an error.
    """

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}
        self._folders: defaultdict[int, set[str]] = defaultdict(set)
        self._evaluation_keys: dict[str, Any] = {}
        self._has_run = False

    def compile(
        self,
        number: int,
        network: QuantizedNetwork,
        config: CompileConfig,
        lanes: int,
        within: bytes | None = None,
        key_id: str = "",
        keys: bytes | None = None,
    ) -> Compiled:
        """Compile `network` as circuit `number`, with `lanes` images in one ciphertext.

        `within` are the parameters of another circuit, under whose keys it is to run. `keys` are the keys
        that `keygen` returned for `key_id`. Raises `Refused` for what cannot be compiled, or not for these
        keys.

        By itself, Concrete gives each value the width that it sees on some inputs. Here every width comes as
        a hint, from the proof, and the inputs show only the sign.
        """
        require_programs()
        lowered = lower(network, config.engine, lanes)
        try:
            configuration = configuration_of(lowered.lookups > 0, config, within)
            circuit = compiled_circuit(lowered, configuration, within)
        except RuntimeError as error:
            widest = max(lowered.layers, key=lambda layer: layer.plane_bits)
            raise Refused(
                f"Concrete cannot compile this network of {names_of(lowered)}: {error}. Its widest "
                f"accumulator is that of layer {widest.name!r}, {widest.plane_bits} bits."
            ) from error
        output = next(iter(circuit.graph.output_nodes.values())).output
        if output.dtype.bit_width < lowered.bits or circuit.mlir is None:
            raise CompilationError(
                f"Concrete gave the result of layer {lowered.layers[-1].name!r} {output.dtype.bit_width} "
                f"bits, but {lowered.bits} are proved necessary; please report this network."
            )
        specs = circuit.client.specs.serialize()
        self._hold(number, key_id, keys, circuit, circuit.client)
        lookups = circuit.programmable_bootstrap_count
        bits = output.dtype.bit_width
        return _figures(circuit, circuit.p_error, lowered.interface, specs, lookups, bits)

    def compile_stages(
        self,
        number: int,
        network: QuantizedNetwork,
        config: CompileConfig,
        blocks: int,
        within: bytes | None = None,
        key_id: str = "",
        keys: bytes | None = None,
    ) -> Compiled:
        """Compile `network` as circuit `number`, in stages of up to `blocks` blocks, all under one key set.

        The parameters are those of the circuit without stages, or chosen for all blocks together. The other
        arguments are as for `compile`. Raises `Refused` for what cannot be compiled.
        """
        require_programs()
        staged = in_stages(network, config.engine, blocks)
        try:
            whole = compiled_circuit(staged.lowered, configuration_of(True, config, within), within)
            self._folders[number].add(_folder(whole.server))
            module, as_whole = compiled_stages(staged, whole, config, within)
            specs = module.client.specs.serialize()
        except RuntimeError as error:
            raise Refused(f"Concrete cannot compile this network in stages: {error}.") from error
        check_wires(specs, staged.blocks)
        ends = ends_of(specs)
        self._hold(number, key_id, keys, module, fhe.Client(fhe.ClientSpecs.deserialize(ends)))
        functions = module.functions().values()
        lookups = sum(function.programmable_bootstrap_count for function in functions)
        (output,) = module.graphs[staged.blocks[-1].name].output_nodes.values()
        chosen, bits = whole if as_whole else module, output.output.dtype.bit_width
        figures = _figures(module, chosen.p_error, staged.lowered.interface, ends, lookups, bits)
        return replace(figures, blocks=staged.blocks, as_whole=as_whole)

    def export(self, number: int, key_id: str) -> tuple[bytes, str]:
        """Return the circuit's parameters, which a client needs, and the MLIR text that a server compiles."""
        held = self._named(number, key_id)
        return held.client.specs.serialize(), held.circuit.mlir

    def open_client(
        self, number: int, fingerprint: str, specs: bytes, key_id: str = "", keys: bytes | None = None
    ) -> Opened:
        """Make the client side of an exported circuit, as number `number`."""
        client = fhe.Client(fhe.ClientSpecs.deserialize(specs))
        _load_keys(client, keys)
        self._held[number] = _Held(key_id=key_id, client=client)
        return Opened(fingerprint=fingerprint, specs=specs)

    def open_server(
        self,
        number: int,
        fingerprint: str,
        specs: bytes,
        mlir: str,
        looks_up: bool,
        recipe: Recipe,
    ) -> Opened:
        """Make the server side of an exported circuit, as number `number`.

        It is compiled here from text, because a compiled library from elsewhere could do anything.
        """
        require_programs()
        tfhers = fhe.ClientSpecs.deserialize(specs).tfhers_specs
        config, settings = recipe.config, recipe.settings
        if settings is not None:
            config = replace(config, configuration=saved_configuration(settings))
        configuration = configuration_of(looks_up, config, specs if recipe.keys_given else None)
        blocks = blocks_of(mlir)
        # The programs of stages know nothing of others' types, which a file holds of the ends only.
        server = fhe.Server.create(
            mlir,
            configuration,
            tfhers_specs=None if blocks else tfhers,
            composition_rules=rules_of(blocks) if blocks else None,
        )
        self._folders[number].add(_folder(server))
        found = server.client_specs.serialize()
        if (ends_of(found) if blocks else found) != specs:
            raise ArtifactError(
                "Concrete chooses other parameters here than where the circuit was compiled: it is altered, "
                "or from another version of Concrete. Compile and save it anew."
            )
        self._held[number] = _Held(server=server)
        return Opened(fingerprint=fingerprint, specs=specs, blocks=blocks)

    def run_for(
        self,
        number: int,
        name: str,
        keys: bytes | StoredKeys | None,
        most: int,
        values: Sequence[bytes],
        block: str | None = None,
    ) -> bytes:
        """Evaluate a server's circuit, or a block of it, under the evaluation keys of that name.

        At most `most` key sets are kept in memory. Those used least recently are removed. Raises
        `KeysForgotten` if the keys are not here and `keys` is not given.
        """
        server = self._named(number, "").server
        if name in self._evaluation_keys:
            found = self._evaluation_keys.pop(name)
        elif keys is None:
            raise KeysForgotten(f"The evaluation keys {name} are not here.")
        else:
            found = fhe.EvaluationKeys.deserialize(keys if isinstance(keys, bytes) else keys.read())
        self._evaluation_keys[name] = found
        while len(self._evaluation_keys) > most:
            del self._evaluation_keys[next(iter(self._evaluation_keys))]
        return self._evaluate(server, found, values, block)

    def keygen(self, number: int, key_id: str, new_id: str) -> bytes:
        """Make new keys with the name `new_id` for the circuit. Return them, secret keys included."""
        held = self._named(number, key_id)
        del self._held[number]  # if this fails, the circuit has neither old nor new keys
        held.client.keygen(force=True)
        self._held[number] = replace(held, key_id=new_id)
        return held.client.keys.serialize()

    def evaluation_keys(self, number: int, key_id: str) -> bytes:
        """Return the keys that a server needs to run the circuit. No secret key is among them."""
        return self._named(number, key_id).client.evaluation_keys.serialize()

    def encrypt(self, number: int, key_id: str, images: Array) -> list[bytes]:
        """Return a ciphertext for each integer image of (N, C, *S)."""
        client = self._named(number, key_id).client
        return [client.encrypt(image).serialize() for image in _each(images)]

    def run(self, number: int, key_id: str, values: Sequence[bytes], block: str | None = None) -> bytes:
        """Evaluate the circuit on one encrypted image, or a block of it on the values that it reads."""
        held = self._named(number, key_id)
        return self._evaluate(held.server, held.client.evaluation_keys, values, block)

    def decrypt(self, number: int, key_id: str, ciphertexts: list[bytes]) -> Array:
        """Return the integer results (N, K, *Out) in offset form."""
        client = self._named(number, key_id).client
        return np.concatenate([client.decrypt(fhe.Value.deserialize(c)) for c in ciphertexts])

    def simulate(self, number: int, key_id: str, images: Array) -> Array:
        """Return the results (N, K, *Out) of Concrete's simulation, in offset form."""
        circuit = self._named(number, key_id).circuit
        self._require_addresses()
        circuit.enable_fhe_simulation()
        self._folders[number].add(_folder(circuit.simulator))
        return np.concatenate([circuit.simulate(image) for image in _each(images)])

    def time_lookups(self, bits: int, lookups: int) -> tuple[float, float]:
        """Return the complexity and the seconds of one lookup of `bits` bits, when `lookups` run at once."""
        table = fhe.LookupTable(list(range(2**bits)))

        def function(x: Any) -> Any:
            return table[fhe.hint(x, bit_width=bits)]

        configuration = fhe.Configuration(p_error=0.01, compress_input_ciphertexts=True)
        zeros = np.zeros(lookups, np.int64)
        circuit = fhe.Compiler(function, {"x": "encrypted"}).compile([zeros], configuration)
        seconds = []
        try:
            circuit.keygen()
            encrypted = circuit.encrypt(zeros)
            self._require_addresses()
            for _ in range(3):
                started = time.perf_counter()
                circuit.run(encrypted)
                seconds.append(time.perf_counter() - started)
            return circuit.complexity / lookups, min(seconds) / lookups
        finally:
            shutil.rmtree(_folder(circuit.server), ignore_errors=True)

    def release(self, numbers: list[int]) -> None:
        """Remove circuits that nobody holds any longer, and their folders, which Concrete would leave."""
        for number in numbers:
            self._held.pop(number, None)
            for folder in self._folders.pop(number, ()):
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Remove all circuits."""
        self.release(list(self._folders))

    def _hold(self, number: int, key_id: str, keys: bytes | None, circuit: Any, client: Any) -> None:
        """Keep what was compiled, with the keys of that name."""
        self._folders[number].add(_folder(circuit.server))
        _load_keys(client, keys)
        self._held[number] = _Held(key_id=key_id, client=client, server=circuit.server, circuit=circuit)

    def _evaluate(self, server: Any, keys: Any, values: Sequence[bytes], block: str | None) -> bytes:
        self._require_addresses()
        # What is read is not kept while the result is written: both have megabytes.
        read = map(fhe.Value.deserialize, values)
        result = server.run(*read, evaluation_keys=keys, function_name=block)
        self._has_run = True
        return result.serialize()

    def _require_addresses(self) -> None:
        """Raise `ExecutionError` before a first run for which there are too few addresses."""
        if not self._has_run:
            require_addresses()

    def _named(self, number: int, key_id: str) -> "_Held":
        held = self._held.get(number)
        if held is None or held.key_id != key_id:
            raise CircuitForgotten(f"Circuit {number} is not here with these keys.")
        return held


@dataclass(frozen=True, kw_only=True)
class _Held:
    """The two sides of a circuit. A client and a server hold only their own side. `circuit` simulates."""

    key_id: str = ""
    client: Any = None
    server: Any = None
    circuit: Any = None


def _figures(
    circuit: Any, p_error: float, interface: Interface, specs: bytes, lookups: int, output_bits: int
) -> Compiled:
    """Return what is to be known of a compiled circuit, or of one in stages."""
    return Compiled(
        fingerprint=identity_of(specs, circuit.mlir.encode(), interface).fingerprint,
        specs=specs,
        output_bits=output_bits,
        lookups=lookups,
        complexity=circuit.complexity,
        sizes=sizes_of(specs),
        p_error=p_error,
        # Concrete's own figure does not cover all lookups together.
        global_p_error=-math.expm1(max(lookups, 1) * math.log1p(-p_error)),
    )


def _folder(server: Any) -> str:
    """Return the folder in which Concrete keeps a compiled circuit."""
    return str(server._library.get_output_dir_path())


def _load_keys(client: Any, keys: bytes | None) -> None:
    if keys is None:
        return
    try:
        client.keys.load_from_bytes(keys)
    except RuntimeError as error:
        raise ArtifactError(f"Concrete cannot read these keys: {error}.") from error


def _each(images: Array) -> list[Array]:
    """Return the images one by one, in C order, because Concrete ignores strides when it reads memory."""
    return [np.ascontiguousarray(image[None]) for image in images]
