"""Turns trained PyTorch convolutions into exact integer circuits that run on encrypted images.

Names are loaded when they are first used: `import fheconv` imports neither torch nor Concrete.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fheconv.basics.errors import (
    AccumulatorOverflowError,
    ArtifactError,
    CalibrationError,
    CompilationError,
    CostError,
    ExecutionError,
    FheConvError,
    InputRangeError,
    InvalidArgumentError,
    LookupBudgetError,
    MissingExtraError,
    NotCompiledError,
    RemoteError,
    TuningError,
    UnfinishedError,
    UnknownKeywordError,
    UnsupportedLayerError,
)

if TYPE_CHECKING:  # the same as `_HOMES` and `_MODULES`, which a test compares with this
    from fheconv.analysis import failures, plots
    from fheconv.analysis.budget_report import BudgetReport, ChannelBudget, LayerBudget
    from fheconv.analysis.forecast import Forecast, LayerForecast
    from fheconv.analysis.tiled_forecast import TiledForecast
    from fheconv.arithmetic import (
        ConvGeometry,
        conv,
        conv_gradients,
        conv_output_shape,
        conv_transpose,
        filter_matrix,
    )
    from fheconv.basics.compile_config import CompileConfig, ParameterRange
    from fheconv.basics.config import QuantConfig
    from fheconv.basics.warning import (
        CostWarning,
        FheConvWarning,
        InputRangeWarning,
        InputScaleWarning,
        RequantizationWarning,
    )
    from fheconv.capture.onnx_file import from_onnx
    from fheconv.capture.splitting import split
    from fheconv.circuits.cascade import Cascade, CascadeCost
    from fheconv.circuits.ciphertext import Ciphertext
    from fheconv.circuits.circuit import FheCircuit
    from fheconv.circuits.client import Client, load_client
    from fheconv.circuits.compiling import compile  # noqa: A004
    from fheconv.circuits.cost import Cost, TiledCost
    from fheconv.circuits.files.manifest import Manifest
    from fheconv.circuits.keys import EvaluationKeys
    from fheconv.circuits.server import Server, load_server
    from fheconv.circuits.staged import StagedCircuit
    from fheconv.circuits.tiled import TiledCircuit, compile_tiled
    from fheconv.circuits.verification import Mismatch, VerifyReport
    from fheconv.networks.bounds import AccumulatorBounds, accumulator_bounds, max_taps
    from fheconv.networks.floats import Conv
    from fheconv.quantized import QuantizedNetwork, quantize
    from fheconv.serving import app as serve
    from fheconv.serving import distributed
    from fheconv.serving.remote import RemoteCircuit
    from fheconv.serving.tls import Tls
    from fheconv.training.distilling import distill
    from fheconv.training.finetuning import finetune
    from fheconv.training.trainable import TrainableNetwork
    from fheconv.tuning.result import TunePoint, TuneResult
    from fheconv.tuning.search import tune
    from fheconv.tuning.setting import Setting

    __version__: str

# The home of each name that is loaded when it is first used.
_HOMES = {
    "analysis.budget_report": ("BudgetReport", "ChannelBudget", "LayerBudget"),
    "analysis.forecast": ("Forecast", "LayerForecast"),
    "analysis.tiled_forecast": ("TiledForecast",),
    "arithmetic": (
        "ConvGeometry",
        "conv",
        "conv_gradients",
        "conv_output_shape",
        "conv_transpose",
        "filter_matrix",
    ),
    "basics.compile_config": ("CompileConfig", "ParameterRange"),
    "basics.config": ("QuantConfig",),
    "basics.warning": (
        "CostWarning",
        "FheConvWarning",
        "InputRangeWarning",
        "InputScaleWarning",
        "RequantizationWarning",
    ),
    "capture.onnx_file": ("from_onnx",),
    "capture.splitting": ("split",),
    "circuits.cascade": ("Cascade", "CascadeCost"),
    "circuits.ciphertext": ("Ciphertext",),
    "circuits.circuit": ("FheCircuit",),
    "circuits.client": ("Client", "load_client"),
    "circuits.compiling": ("compile",),
    "circuits.cost": ("Cost", "TiledCost"),
    "circuits.files.manifest": ("Manifest",),
    "circuits.keys": ("EvaluationKeys",),
    "circuits.server": ("Server", "load_server"),
    "circuits.staged": ("StagedCircuit",),
    "circuits.tiled": ("TiledCircuit", "compile_tiled"),
    "circuits.verification": ("Mismatch", "VerifyReport"),
    "networks.bounds": ("AccumulatorBounds", "accumulator_bounds", "max_taps"),
    "networks.floats": ("Conv",),
    "quantized": ("QuantizedNetwork", "quantize"),
    "serving.remote": ("RemoteCircuit",),
    "serving.tls": ("Tls",),
    "training.distilling": ("distill",),
    "training.finetuning": ("finetune",),
    "training.trainable": ("TrainableNetwork",),
    "tuning.result": ("TunePoint", "TuneResult"),
    "tuning.search": ("tune",),
    "tuning.setting": ("Setting",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
# Public modules, `from fheconv import plots`.
_MODULES = {
    "distributed": "serving.distributed",
    "failures": "analysis.failures",
    "plots": "analysis.plots",
    "serve": "serving.app",
}

__all__ = [
    "AccumulatorBounds",
    "AccumulatorOverflowError",
    "ArtifactError",
    "BudgetReport",
    "CalibrationError",
    "Cascade",
    "CascadeCost",
    "ChannelBudget",
    "Ciphertext",
    "Client",
    "CompilationError",
    "CompileConfig",
    "Conv",
    "ConvGeometry",
    "Cost",
    "CostError",
    "CostWarning",
    "EvaluationKeys",
    "ExecutionError",
    "FheCircuit",
    "FheConvError",
    "FheConvWarning",
    "Forecast",
    "InputRangeError",
    "InputRangeWarning",
    "InputScaleWarning",
    "InvalidArgumentError",
    "LayerBudget",
    "LayerForecast",
    "LookupBudgetError",
    "Manifest",
    "Mismatch",
    "MissingExtraError",
    "NotCompiledError",
    "ParameterRange",
    "QuantConfig",
    "QuantizedNetwork",
    "RemoteCircuit",
    "RemoteError",
    "RequantizationWarning",
    "Server",
    "Setting",
    "StagedCircuit",
    "TiledCircuit",
    "TiledCost",
    "TiledForecast",
    "Tls",
    "TrainableNetwork",
    "TunePoint",
    "TuneResult",
    "TuningError",
    "UnfinishedError",
    "UnknownKeywordError",
    "UnsupportedLayerError",
    "VerifyReport",
    "__version__",
    "accumulator_bounds",
    "compile",
    "compile_tiled",
    "conv",
    "conv_gradients",
    "conv_output_shape",
    "conv_transpose",
    "distill",
    "distributed",
    "failures",
    "filter_matrix",
    "finetune",
    "from_onnx",
    "load_client",
    "load_server",
    "max_taps",
    "plots",
    "quantize",
    "serve",
    "split",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fheconv")
    if name in _MODULES:
        return import_module(f"fheconv.{_MODULES[name]}")
    if name in _HOME_OF:
        return getattr(import_module(f"fheconv.{_HOME_OF[name]}"), name)
    from fheconv.basics.keywords import answered_name

    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{answered_name(name)}")


def __dir__() -> list[str]:
    return sorted(__all__)
