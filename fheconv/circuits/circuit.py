"""Compiles circuits, makes keys, encrypts, runs, decrypts, and compares results with the clear integers."""

import secrets
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from fheconv.analysis.forecast import completed
from fheconv.basics.arrays import Array, ArrayLike, Shape
from fheconv.basics.checks import check_integer
from fheconv.basics.compile_config import CompileConfig
from fheconv.basics.errors import (
    ArtifactError,
    InputRangeError,
    InvalidArgumentError,
)
from fheconv.basics.keywords import answers_keywords
from fheconv.basics.progress import status, track
from fheconv.basics.samples import Data, share_right, with_classes
from fheconv.circuits.ciphertext import OTHER_KEYS, Ciphertext
from fheconv.circuits.cost import Cost
from fheconv.circuits.files.archive import Exported, save
from fheconv.circuits.files.recipe import Recipe
from fheconv.circuits.native.child import in_process
from fheconv.circuits.native.lookup_times import expected_seconds
from fheconv.circuits.native.protocol import Limits, Session
from fheconv.circuits.native.worker import worker
from fheconv.circuits.owner import KeyedHandle, KeyOwner
from fheconv.circuits.verification import VerifyReport, compare
from fheconv.lowering.lower import Lowered, lower
from fheconv.lowering.together import images_together
from fheconv.quantized import QuantizedNetwork

Fhe: TypeAlias = Literal["disable", "simulate", "execute"]

# At least this many images are simulated to find how often approximate rounding makes a difference.
SIMULATED = 40


class LoweredHandle(KeyedHandle):
    """A handle of the function for one image, or for the images that share a ciphertext.

    `opening` is as for `Handle`. It may take the keys of `keys_of`.
    """

    def __init__(
        self,
        session: Session,
        opening: tuple[str, tuple[Any, ...]],
        lowered: Lowered,
        config: CompileConfig,
        keys_of: KeyOwner | None = None,
    ) -> None:
        self.lowered = lowered
        shared = None if keys_of is None else keys_of.present_keys
        with status("Compiling…"):
            super().__init__(session, opening, lowered.interface, Limits.of(config), shared)


class FheCircuit(KeyOwner):
    """A compiled circuit and, after `keygen`, its keys. Made by `fheconv.compile`.

    The native library runs in a worker process that all circuits share. If that dies or a call is
    interrupted, the next call starts a new worker and gives it the circuit and its keys again.

    Example:
        >>> import numpy as np
        >>> from fheconv import compile, quantize
        >>> image = np.arange(9).reshape(1, 3, 3)
        >>> circuit = compile(quantize(np.array([[1.0, -1.0], [2.0, 0.0]]), image))
        >>> circuit.keygen()
        >>> circuit.decrypt(circuit.run(circuit.encrypt(image)))
        array([[[ 5.,  7.],
                [11., 13.]]])
    """

    def __init__(
        self,
        network: QuantizedNetwork,
        config: CompileConfig,
        lowered: Lowered | None = None,
        keys_of: KeyOwner | None = None,
    ) -> None:
        """Compile the network, for the keys of `keys_of` if it is given.

        `lowered` is its function, if it was made already.
        """
        if not isinstance(config, CompileConfig):
            raise InvalidArgumentError(f"config is {config!r}; it must be a CompileConfig.")
        super().__init__()
        self.network = network
        self.config = config = completed(network, config)
        self._session: Session = in_process() if config.in_process else worker()
        one = lower(network, config.engine) if lowered is None else lowered
        self._lanes = images_together(one, config)
        self._keys_given = keys_of is not None
        if keys_of is not None:
            self._share_lock_of(keys_of)
        self._one: LoweredHandle = self._open(one, keys_of)
        self._many: LoweredHandle | None = None
        if isinstance(config.lanes, int) and config.lanes > 1:  # if these lanes are impossible, raise now
            self._handle_for(config.lanes)

    def _open(self, lowered: Lowered, keys_of: KeyOwner | None = None) -> LoweredHandle:
        """Compile the network's function, and return what holds it."""
        within = None if keys_of is None else keys_of.specs
        opening = "compile", (self.network, self.config, lowered.interface.lanes.count, within)
        return LoweredHandle(self._session, opening, lowered, self.config, keys_of)

    def _handle_for(self, images: int) -> LoweredHandle:
        """Return the handle for a batch. The one for several lanes is made when a batch first needs it."""
        if images < 2 or self._lanes == 1:
            return self._one
        many = self._of_many()
        if not self._is_current(many):
            many.keygen(f"{self._one.key_id}.{secrets.token_hex(16)}")
        return many

    def _of_many(self) -> LoweredHandle:
        """Return the handle for several lanes, which has no keys yet when it is made."""
        if self._many is None:
            lowered = lower(self.network, self.config.engine, self._lanes)
            self._many = self._open(lowered)
        return self._many

    def _is_current(self, handle: LoweredHandle) -> bool:
        """Return True if a handle's keys are the present ones, or were made with them for several lanes.

        Keys for several lanes have their own name. A key file does not hold them, so they are made anew after
        a key file is loaded.
        """
        return handle.key_id.partition(".")[0] == self._one.key_id

    def promised(self, images: int) -> float:
        """Return the probability that a value is wrong in a batch of `images` images.

        With lookups it is the probability that an image has any wrong value. It is the promise that `verify`
        holds results against.
        """
        with self._lock:
            compiled = self._handle_for(images).compiled
            return float(compiled.global_p_error if compiled.lookups else compiled.p_error)

    @property
    def complexity(self) -> float:
        """Concrete's count of operations for one encrypted image. Unlike `cost`, it times no lookup."""
        return float(self._one.compiled.complexity)

    @property
    def cost(self) -> Cost:
        """The cost of one encrypted image, alone in its ciphertext."""
        compiled = self._one.compiled
        if not compiled.lookups:
            return self._cost(self._one)
        seconds = expected_seconds(self._session, compiled.lookups, compiled.complexity)
        return replace(self._cost(self._one), seconds=seconds)

    def _described(self) -> tuple[Shape, Shape, list[tuple[str, str]]]:
        return self.network.input_shape, self.network.output_shape, self._cost(self._one).rows()

    def _cost(self, handle: LoweredHandle) -> Cost:
        """Return the cost without seconds. For seconds, lookups must be timed on this machine."""
        compiled, lowered = handle.compiled, handle.lowered
        return Cost(
            layers=lowered.layers,
            lookups=compiled.lookups,
            multiply_adds=sum(layer.multiply_adds for layer in lowered.layers),
            complexity=compiled.complexity,
            **asdict(compiled.sizes),
            p_error=compiled.p_error,
            global_p_error=compiled.global_p_error,
            accumulator_bits=max(layer.bits for layer in lowered.layers),
            assigned_bits=compiled.output_bits,
            lanes=self._lanes,
            seconds=None,
        )

    def exported(self, lanes: int = 1) -> Exported:
        """Return everything that files hold of the circuit. The seconds of this machine are left out.

        Raises `InvalidArgumentError` like `save`.
        """
        check_integer("lanes", lanes, 1)
        if lanes not in (1, self._lanes):
            raise InvalidArgumentError(
                f"lanes={lanes}; in this circuit, 1 or {self._lanes} images share a ciphertext. Compile it "
                f"with CompileConfig(lanes={lanes})."
            )
        with self._lock:
            handle = self._one if lanes == 1 else self._of_many()
        specs, mlir = handle.request("export")
        return Exported(
            interface=handle.interface,
            specs=specs,
            mlir=mlir,
            cost=self._cost(handle),
            recipe=self._recipe(),
        )

    def _recipe(self) -> Recipe:
        """Return how a server compiles the circuit again."""
        return Recipe.of(self.config, keys_given=self._keys_given)

    def save(
        self, folder: str | Path, *, class_names: Sequence[str] | None = None, lanes: int = 1
    ) -> tuple[Path, Path]:
        """Write `client.zip` and `server.zip` into a folder, and return their paths.

        The folder is made if it does not exist. The files hold no key, and nothing of the calibration images.
        `class_names` are names for the results.

        The files hold the circuit for one image in each ciphertext, or with `lanes` for so many, which may be
        1 or `cost.lanes`. With several, a batch takes less time, a single image more, and keys are others.

        Raises `ArtifactError` if they cannot be written, `InvalidArgumentError` for other lanes, if there is
        not one name for each result, and for a `CompileConfig.configuration` that files cannot hold
        (`fheconv.circuits.files.recipe`).
        """
        return save(self.exported(lanes), folder, class_names=class_names)

    def encrypt(self, x: Data) -> Ciphertext:
        """Quantize and encrypt images (n, *input_shape), or one image without n.

        Raises `InputRangeError`, which names the first value that cannot be represented, `NotCompiledError`
        before `keygen`.
        """
        return self._encrypt(*self.network.quantize_input(x))

    def _encrypt(self, q: Array, batched: bool) -> Ciphertext:
        with self._lock:
            self._one.require_keys("encrypt")
            return self._handle_for(len(q)).encrypt(q, batched)

    def run(self, ciphertext: Ciphertext) -> Ciphertext:
        """Evaluate the circuit on encrypted images.

        Raises `ArtifactError` for a ciphertext of another circuit or key set.
        """
        with self._lock:
            handle = self._check(ciphertext, "input", "run")
            values = track(ciphertext.values, "Running on encrypted images…")
            return ciphertext.with_results(handle.request("run", [value]) for value in values)

    def decrypt(self, ciphertext: Ciphertext, *, dequantize: bool = True) -> Array:
        """Return the results in torch's shape: floats, or with `dequantize=False` the exact integers.

        Raises `ArtifactError` like `run`.
        """
        with self._lock:
            accumulators = self._check(ciphertext, "output", "decrypt").decrypt(ciphertext)
        y = self.network.dequantize(accumulators) if dequantize else accumulators
        return y if ciphertext.batched else y[0]

    @answers_keywords
    def predict(self, x: Data, fhe: Fhe = "disable") -> Array:
        """Return float outputs for float images, in torch's shape.

        fhe="disable" runs the circuit's own function on clear integers. "simulate" runs Concrete's
        simulation. "execute" encrypts, runs and decrypts. A `Client` and a `RemoteCircuit`, which do not
        have the network, only know "execute". Raises like `encrypt`.
        """
        q, batched = self.network.quantize_input(x)
        y = self.network.dequantize(self.accumulate(q, fhe))
        return y if batched else y[0]

    @answers_keywords
    def score(self, x: Data, y: ArrayLike | None = None, fhe: Fhe = "disable") -> float:
        """Return the share of images (n, *input_shape) that get their right class of `y` (n,).

        Without `y`, `x` is a loader, a dataset or an iterable of pairs (images, classes). `fhe` is as for
        `predict`. Raises like `predict`, and `InvalidArgumentError` if there is not a class for each image,
        or not a score for each class.
        """
        images, classes = with_classes(x, y, len(self.network.input_shape))
        return share_right(self.predict(images, fhe), classes)

    def accumulate(self, q: Array, fhe: Fhe = "disable") -> Array:
        """Return the integer outputs (N, K, *Out) for integer images, by the mode `fhe` (see `predict`).

        It is `network.accumulate`, but with the circuit's own function, simulated or encrypted.

        Raises like `encrypt`.
        """
        if fhe == "execute":
            encrypted = self._encrypt(q, batched=True)
            return self.decrypt(self.run(encrypted), dequantize=False)
        if fhe == "simulate" and len(q):
            with self._lock:
                handle = self._handle_for(len(q))
                results = handle.request("simulate", handle.interface.prepare(q))
            return handle.interface.accumulators(results, len(q))
        if fhe not in ("disable", "simulate"):
            raise InvalidArgumentError(f'fhe={fhe!r}; it must be "disable", "simulate" or "execute".')
        lowered = self._one.lowered
        results = lowered.function(lowered.interface.prepare(q))
        return lowered.interface.accumulators(results, len(q))

    @answers_keywords
    def verify(self, x: Data, *, runs: int = 1, show: int = 10) -> VerifyReport:
        """Run images encrypted, `runs` times, and compare every result with the clear integers.

        The report counts all differences and names the first `show`. It compares their rate with the failure
        probability that the circuit was compiled for. If accumulators are rounded before lookups, it compares
        the rate with Concrete's simulation instead. Raises like `encrypt`.
        """
        check_integer("runs", runs, 1)
        check_integer("show", show, 0)
        q, _ = self.network.quantize_input(x)
        if not len(q):
            raise InputRangeError("There is nothing to verify in an empty batch; give at least one image.")
        expected = np.stack([self.network.accumulate(q)] * runs)
        got = np.stack([self.accumulate(q, "execute") for _ in range(runs)])
        looks_up = self._one.lowered.lookups > 0
        promised = self._rounded_differently(q) if self._rounds else self.promised(len(q))
        return compare(expected, got, promised, show, by_image=looks_up)

    @property
    def _rounds(self) -> bool:
        """True if accumulators are rounded before some lookup."""
        return any(0 < layer.lookup_bits < layer.bits for layer in self._one.lowered.layers)

    def _rounded_differently(self, q: Array) -> float:
        """Return the share of integer images for which Concrete's simulation gives other results."""
        tried = np.repeat(q, -(-SIMULATED // len(q)), axis=0)
        differ = self.accumulate(tried, "simulate") != self.network.accumulate(tried)
        count = int(differ.reshape(len(tried), -1).any(axis=1).sum())
        return (count + 1) / (len(tried) + 1)  # never 0: a difference that was not seen may still happen

    def _check(self, ciphertext: Any, kind: str, step: str) -> LoweredHandle:
        """Return the handle that a ciphertext belongs to. Raises `ArtifactError` if there is none."""
        self._one.require_keys(step)
        several = self._many is not None and getattr(ciphertext, "fingerprint", "") == self._many.fingerprint
        handle = self._many if self._many is not None and several else self._one
        handle.check(ciphertext, kind, step)
        if not self._is_current(handle):
            raise ArtifactError(OTHER_KEYS)
        return handle
