"""From what the user has, a torch module or an array of weights, to a float network."""

import warnings
from typing import Any

import numpy as np

from fheconv.arrays import as_array
from fheconv.errors import CalibrationError, UnsupportedLayerError
from fheconv.network import Conv, Layer, Network
from fheconv.steps import Kernel, Shape


def capture(module: Any, input_shape: Shape) -> Network:
    """Return the float network of a trained model, for images of shape `input_shape` (C, *S).

    `module` is a `torch.nn.Module`, a bare weight array (K, C/groups, *k) or (Hf, Wf), or a `Conv`. A module
    that is not a single convolution is captured in evaluation mode with `torch.export`: BatchNorm is folded,
    dropout is dropped, whatever is linear merges.

    Raises `UnsupportedLayerError` naming the layer and the operator that cannot be compiled, `CalibrationError`
    for weights that are not finite.
    """
    conv = single_convolution(module)
    network = _export(module, input_shape) if conv is None else Network.of(conv, input_shape)
    for layer in network.layers:
        if isinstance(layer, Layer):
            _check_finite(layer)
    return network


def single_convolution(module: Any) -> Conv | None:
    """Return the layer of a `torch.nn` convolution, a bare weight array or a `Conv`; None for other modules."""
    if isinstance(module, Conv):
        return module
    if _is_module(module):
        return _from_torch(module) if _is_convolution(module) else None
    return Conv.of(as_array(module, "weight"))


def _check_finite(layer: Layer) -> None:
    kernels = (step for term in layer.terms for step in term.steps if isinstance(step, Kernel))
    for name, values in (("bias", layer.bias), *(("weight", kernel.weight) for kernel in kernels)):
        if not np.isfinite(values).all():
            raise CalibrationError(
                f"The {name} of layer {layer.name!r} contains NaN or infinity; check the training."
            )


def _export(module: Any, input_shape: Shape) -> Network:
    """Capture a whole model."""
    import torch

    from fheconv.graph import BATCH, network_of

    if isinstance(module, torch.nn.Module) and any(map(torch.nn.parameter.is_lazy, module.parameters())):
        raise UnsupportedLayerError(
            f"This {type(module).__name__} has layers without weights yet; run it once, or load them."
        )
    training = [part for part in module.modules() if part.training]
    parameter = next(iter(module.parameters()), torch.zeros(()))
    example = torch.zeros(BATCH, *input_shape, dtype=parameter.dtype, device=parameter.device)
    try:
        module.eval()
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            module(example)
            program = torch.export.export(module, (example,))
    except Exception as error:  # whatever the user's own forward raises
        raise UnsupportedLayerError(
            f"{type(module).__name__} cannot be run or exported on images of shape {input_shape}: "
            f"{str(error).strip() or type(error).__name__}. Calibrate on images as the model takes them; a model "
            "whose path depends on the values of the image has no circuit."
        ) from error
    finally:
        for part in training:
            part.training = True
    return network_of(program, input_shape)


def _is_convolution(module: Any) -> bool:
    import torch

    kinds = tuple(
        getattr(torch.nn, f"{word}{axes}d") for word in ("Conv", "ConvTranspose") for axes in (1, 2, 3)
    )
    return isinstance(module, kinds)


def _is_module(value: Any) -> bool:
    return hasattr(value, "state_dict")  # without importing torch for arrays


def _from_torch(module: Any) -> Conv:
    import torch

    direct = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    transposed = (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)
    name = type(module).__name__
    if torch.nn.parameter.is_lazy(module.weight):
        raise UnsupportedLayerError(f"This {name} has no weights yet; run it once, or load them.")
    base = next(kind for kind in (*direct, *transposed) if isinstance(module, kind))
    methods = [method for method in ("__call__", "forward", "_conv_forward") if hasattr(base, method)]
    if any(
        method in vars(module) or getattr(type(module), method) is not getattr(base, method)
        for method in methods
    ):
        raise UnsupportedLayerError(
            f"{name} computes something of its own: its forward is not that of {base.__name__}. Write what "
            f"it computes as a {base.__name__}."
        )
    if module._forward_hooks or module._forward_pre_hooks:
        raise UnsupportedLayerError(
            f"This {name} has forward hooks, whose effect cannot be seen in its weights. Remove them, for "
            "example with torch.nn.utils.remove_weight_norm."
        )
    return Conv.of(
        module.weight,
        module.bias,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
        transposed=isinstance(module, transposed),
        output_padding=module.output_padding if isinstance(module, transposed) else 0,
    )
