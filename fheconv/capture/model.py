"""Turns a torch module or an array of weights into a float network."""

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fheconv.basics.arrays import Shape, as_array
from fheconv.basics.errors import CalibrationError, InvalidArgumentError, UnsupportedLayerError
from fheconv.capture.pickles import check_no_checkpoint
from fheconv.networks.floats import Conv, Layer, Maximum, Network
from fheconv.networks.linear import Kernel

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from fheconv.capture.outputs import Outputs

# The names of torch's modules that read images, with the number of their spatial axes.
SPATIAL = r"(?:Conv|ConvTranspose|(?:Adaptive)?(?:Avg|Max)Pool)([123])d$"


def capture(module: Any, input_shape: Shape, outputs: "Outputs" = None) -> Network:
    """Return the float network of a trained model, for images of shape `input_shape` (C, *S).

    `module` is a `torch.nn.Module`, a weight array (K, C/groups, *k) or (Hf, Wf), a `Conv`, or the result of
    `torch.export.export`. A module that is not a single convolution is captured in evaluation mode with
    `torch.export`: BatchNorm is folded, dropout is removed, and linear operators merge. `outputs` is the
    index or the name of one of several outputs of a model.

    Raises `UnsupportedLayerError` naming the layer and the operator that cannot be compiled,
    `CalibrationError` for weights that are not finite, `InvalidArgumentError` for arrays and images that do
    not go together, and for `outputs` that the model does not have.
    """
    conv = single_convolution(module)
    if conv is not None and outputs is not None:
        raise InvalidArgumentError(f"outputs={outputs!r}: a convolution has one output; leave outputs out.")
    network = _export(module, input_shape, outputs) if conv is None else Network.of(conv, input_shape)
    for layer in network.layers:
        if isinstance(layer, Layer):
            _check_finite(layer)
    return _without_dead_weights(network)


def _without_dead_weights(network: Network) -> Network:
    layers: list[Layer | Maximum] = []
    for layer in network.layers:
        if isinstance(layer, Layer):
            terms = [term.without_dead_weights(network.shapes[term.source]) for term in layer.terms]
            layer = replace(layer, terms=tuple(terms))
        layers.append(layer)
    return replace(network, layers=tuple(layers))


def single_convolution(module: Any) -> Conv | None:
    """Return the `Conv` of a `torch.nn` convolution, a weight array or a `Conv`; None for other models.

    Raises `UnsupportedLayerError` for an object with a `state_dict` that is not a model, and
    `InvalidArgumentError` for any other object.
    """
    if isinstance(module, Conv):
        return module
    if not hasattr(module, "state_dict"):  # without importing torch for arrays
        check_no_checkpoint(module)
        _check_weights(module)
        return Conv.of(as_array(module, "weight"))
    import torch

    from fheconv.capture.refusals import check_module

    if isinstance(module, torch.export.ExportedProgram):
        return None
    if isinstance(module, type):
        raise UnsupportedLayerError(
            f"{module.__name__} is a class; give a model of it, such as {module.__name__}()."
        )
    if not isinstance(module, torch.nn.Module):
        raise UnsupportedLayerError(
            f"{type(module).__name__} is no torch.nn.Module; give the model, or the weights of a convolution."
        )
    check_module(module)
    return _from_torch(module) if _is_plain_convolution(module) else None


def _check_weights(value: Any) -> None:
    """Raise `InvalidArgumentError` for what is neither a model nor an array, such as a function."""
    if isinstance(value, list | tuple) and any(hasattr(part, "state_dict") for part in value):
        raise InvalidArgumentError(
            f"This {type(value).__name__} of layers is no model; give torch.nn.Sequential(*layers)."
        )
    if not isinstance(value, list | tuple | np.ndarray | float | int) and not hasattr(value, "__array__"):
        raise InvalidArgumentError(
            f"This {type(value).__name__} is no model; give a torch.nn.Module, or the weights of a "
            "convolution as an array. Models of other libraries come as ONNX files: fheconv.from_onnx."
        )


def image_axes(module: Any) -> int | None:
    """Return the number of axes of an image (C, *S) that a model takes, None if it does not show.

    A module shows it by its first convolution or pooling, a module of `fheconv.from_onnx` by its input.

    Example:
        >>> image_axes(Conv.of([[1, 0, -1]]))
        3
    """
    if isinstance(module, Conv):
        return len(module.geometry.kernel) + 1
    if not hasattr(module, "state_dict"):
        return None
    import torch

    if isinstance(module, torch.export.ExportedProgram):
        examples = [node.meta["val"] for node in module.graph.nodes if node.name in _inputs(module)]
        return examples[0].ndim - 1 if len(examples) == 1 else None
    from fheconv.capture.onnx_model import OnnxModel

    if isinstance(module, OnnxModel):
        return len(module.input_shape)
    parts = module.modules() if isinstance(module, torch.nn.Module) else ()
    kinds = (re.match(SPATIAL, type(part).__name__) for part in parts)
    return next((int(kind[1]) + 1 for kind in kinds if kind), None)


def _inputs(program: Any) -> tuple[str, ...]:
    return tuple(program.graph_signature.user_inputs)


def _export(module: Any, input_shape: Shape, outputs: "Outputs") -> Network:
    from fheconv.capture.exported import export

    return export(module, input_shape, outputs)


def _check_finite(layer: Layer) -> None:
    kernels = (step for term in layer.terms for step in term.steps if isinstance(step, Kernel))
    factors = np.array([term.factor for term in layer.terms])
    weights = (("weight", kernel.weight) for kernel in kernels)
    # The bias comes last, because a bad weight makes the bias bad too.
    for name, values in (("weight", factors), *weights, ("bias", layer.bias)):
        if not np.isfinite(values).all():
            raise CalibrationError(
                f"The {name} of layer {layer.name!r} contains NaN or infinity; check the training."
            )


def _from_torch(module: Any) -> Conv:
    transposed = type(module).__name__.startswith("ConvTranspose")
    return Conv.of(
        module.weight,
        module.bias,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
        transposed=transposed,
        output_padding=module.output_padding if transposed else 0,
    )


def _is_plain_convolution(module: Any) -> bool:
    """Return whether weights and options define what a module computes: no hooks, no `forward` of its own."""
    import torch

    names = (f"{word}{axes}d" for word in ("Conv", "ConvTranspose") for axes in (1, 2, 3))
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) in [getattr(torch.nn, name) for name in names] and not hooked
