"""Shows calls by their keywords, and answers calls with keywords that do not exist."""

import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar

from fheconv.basics.errors import UnknownKeywordError

C = TypeVar("C", bound=Callable[..., Any])

# What has another name, or none, in Concrete ML and Concrete, whose users bring their calls.
_THEIRS = {
    "n_bits": "here weights, activations and images have their own: weight_bits, activation_bits and "
    "input_bits of QuantConfig",
    "op_weights": "it is weight_bits of QuantConfig here",
    "op_inputs": "it is activation_bits of QuantConfig here",
    "model_inputs": "it is input_bits of QuantConfig here",
    "model_outputs": "leave it out: results are decrypted as they are, with all their bits",
    "rounding_threshold_bits": "it is rounding_bits of QuantConfig here",
    "import_qat": "leave it out: quantize takes every model in the same way",
    "torch_model": "give the model as the first argument, without a name",
    "torch_inputset": "give images to calibrate on as the second argument, calibration",
    "inputset": "give images to calibrate on as the second argument, calibration",
    "artifacts": "leave it out: the circuit's cost and the network's budget say what is inside",
    "show_mlir": "leave it out: the circuit's cost and the network's budget say what is inside",
    "verbose": "leave it out: progress is shown on a terminal",
    "show_progress": "leave it out: progress is shown on a terminal",
    "device": "leave it out: everything runs on the CPU",
    "use_gpu": "leave it out: everything runs on the CPU",
    "inputs_encryption_status": "leave it out: images are encrypted, weights are not",
    "reduce_sum_copy": "leave it out: nothing is needed in its place",
    "force": "leave it out: keygen always makes new keys",
    "simulate": 'give predict or score fhe="simulate"',
    "execute": 'give predict or score fhe="execute"',
    "fhe_simulation": 'give predict or score fhe="simulate"',
    "fhe_execution": 'give predict or score fhe="execute"',
}
# Functions and classes of Concrete ML, and what does the same here.
_THEIR_NAMES = {
    "FHEModelClient": "load_client", "FHEModelDev": "compile(...).save", "FHEModelServer": "load_server",
    "QuantizedModule": "quantize, whose result compile takes",
    "compile_brevitas_qat_model": "compile(fheconv.quantize(model, images)), which keeps what training chose",
    "compile_onnx_model": "compile(fheconv.quantize(fheconv.from_onnx(path), images))",
    "compile_torch_model": "compile(fheconv.quantize(model, images))",
}  # fmt: skip
# The keywords of the configurations, by their names. Each is added when its class is defined.
_configurations: dict[str, list[str]] = {}
# A name of another object is proposed only if it is nearer than one of the call's own.
_NEAR, _NEARER = 0.6, 0.8


def shown_call(config: Any, always: Collection[str] = ()) -> str:
    """Return the call that makes a dataclass: the fields named in `always`, and others without defaults."""
    shown = (
        f"{field.name}={getattr(config, field.name)!r}"
        for field in fields(config)
        if field.name in always or getattr(config, field.name) != field.default
    )
    return f"{type(config).__name__}({', '.join(shown)})"


def answered_name(name: str) -> str:
    """Return what to say of a name of Concrete ML, "" of another.

    Example:
        >>> answered_name("FHEModelClient")
        '; here it is fheconv.load_client'
    """
    return f"; here it is fheconv.{_THEIR_NAMES[name]}" if name in _THEIR_NAMES else ""


def answers_keywords(called: C) -> C:
    """Let a function or a class raise `UnknownKeywordError` for a keyword that it does not have.

    The error names the nearest keyword there is, also for keywords of Concrete ML and those that belong into
    a configuration.
    """
    name = called.__name__
    function = called.__init__ if isinstance(called, type) else called  # type: ignore[misc]
    own = [one for one in inspect.signature(function).parameters if one != "self"]

    @functools.wraps(function)
    def answering(*arguments: Any, **keywords: Any) -> Any:
        for keyword, value in keywords.items():
            if keyword not in own:
                hint = _hint(keyword, value, own)
                raise UnknownKeywordError(f"{name} has no {keyword}={value!r:.50}; {hint}.")
        return function(*arguments, **keywords)

    if isinstance(called, type):
        called.__init__ = answering  # type: ignore[misc]
        if name.endswith("Config"):
            _configurations[name] = own
        return called
    return answering  # type: ignore[return-value]


def _hint(keyword: str, value: Any, own: list[str]) -> str:
    """Return what to write instead of a keyword, given a call's own ones."""
    if keyword in _THEIRS:
        return _THEIRS[keyword]
    for name, others in _configurations.items():
        if keyword in others:
            return f"it belongs to {name}: give fheconv.{name}({keyword}={value!r:.50})"
    if near := get_close_matches(keyword, own, 1, _NEAR):
        return f"the nearest that it has is {near[0]}"
    for name, others in _configurations.items():
        if near := get_close_matches(keyword, others, 1, _NEARER):
            return f"the nearest is {near[0]} of fheconv.{name}"
    return f"it takes {', '.join(own) or 'none'}"
