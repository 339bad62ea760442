"""Trained PyTorch convolutions as exact integer circuits on encrypted images.

Names are loaded when they are first used: `import fheconv` imports neither torch nor Concrete. No module has
the name of a public function, because importing the module would then hide the function.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fheconv.errors import (
    AccumulatorOverflowError,
    ArtifactError,
    CalibrationError,
    CompilationError,
    ExecutionError,
    FheConvError,
    InputRangeError,
    InvalidArgumentError,
    MissingExtraError,
    NotCompiledError,
    RemoteError,
    TuningError,
    UnsupportedLayerError,
)

if TYPE_CHECKING:
    from fheconv.arithmetic import (
        ConvGeometry,
        conv,
        conv_gradients,
        conv_output_shape,
        conv_transpose,
        filter_matrix,
    )
    from fheconv.artifacts import load_client, load_server
    from fheconv.bounds import accumulator_bounds, max_taps
    from fheconv.budget import BudgetReport
    from fheconv.ciphertext import Ciphertext
    from fheconv.circuit import FheCircuit, compile  # noqa: A004
    from fheconv.client import Client
    from fheconv.config import CompileConfig, QuantConfig
    from fheconv.finetuning import finetune
    from fheconv.keys import EvaluationKeys
    from fheconv.network import Conv
    from fheconv.quantized import QuantizedNetwork
    from fheconv.quantizer import quantize
    from fheconv.remote import RemoteCircuit
    from fheconv.server import Server
    from fheconv.tiling import TiledCircuit, compile_tiled
    from fheconv.tuner import tune
    from fheconv.tuning import TunePoint, TuneResult

_HOMES = {
    "fheconv.arithmetic": (
        "ConvGeometry",
        "conv",
        "conv_gradients",
        "conv_output_shape",
        "conv_transpose",
        "filter_matrix",
    ),
    "fheconv.artifacts": ("load_client", "load_server"),
    "fheconv.bounds": ("accumulator_bounds", "max_taps"),
    "fheconv.budget": ("BudgetReport",),
    "fheconv.ciphertext": ("Ciphertext",),
    "fheconv.circuit": ("FheCircuit", "compile"),
    "fheconv.client": ("Client",),
    "fheconv.config": ("CompileConfig", "ParameterRange", "QuantConfig"),
    "fheconv.finetuning": ("finetune",),
    "fheconv.keys": ("EvaluationKeys",),
    "fheconv.network": ("Conv",),
    "fheconv.quantized": ("QuantizedNetwork",),
    "fheconv.quantizer": ("quantize",),
    "fheconv.remote": ("RemoteCircuit",),
    "fheconv.server": ("Server",),
    "fheconv.tiling": ("TiledCircuit", "compile_tiled"),
    "fheconv.tuner": ("tune",),
    "fheconv.tuning": ("TunePoint", "TuneResult"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AccumulatorOverflowError",
    "ArtifactError",
    "BudgetReport",
    "CalibrationError",
    "Ciphertext",
    "Client",
    "CompilationError",
    "CompileConfig",
    "Conv",
    "ConvGeometry",
    "EvaluationKeys",
    "ExecutionError",
    "FheCircuit",
    "FheConvError",
    "InputRangeError",
    "InvalidArgumentError",
    "MissingExtraError",
    "NotCompiledError",
    "ParameterRange",
    "QuantConfig",
    "QuantizedNetwork",
    "RemoteCircuit",
    "RemoteError",
    "Server",
    "TiledCircuit",
    "TunePoint",
    "TuneResult",
    "TuningError",
    "UnsupportedLayerError",
    "accumulator_bounds",
    "compile",
    "compile_tiled",
    "conv",
    "conv_gradients",
    "conv_output_shape",
    "conv_transpose",
    "filter_matrix",
    "finetune",
    "load_client",
    "load_server",
    "max_taps",
    "quantize",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
