"""From what the user has, a torch module or an array of weights, to float layers."""

from typing import Any

import numpy as np

from fheconv.arrays import as_array
from fheconv.errors import CalibrationError, UnsupportedLayerError
from fheconv.network import Conv


def capture(module: Any) -> Conv:
    """Return the float layer of a `torch.nn` convolution, a bare weight array or a `Conv`.

    Raises `UnsupportedLayerError` for any other module or option, `CalibrationError` for weights that
    are not finite.
    """
    layer = module if isinstance(module, Conv) else _from_torch(module) if _is_module(module) else None
    layer = layer or Conv.of(as_array(module, "weight"))
    for name, values in (("weight", layer.weight), ("bias", layer.bias)):
        if values is not None and not np.isfinite(values).all():
            raise CalibrationError(
                f"The {name} of layer {layer.name!r} contains NaN or infinity; check the training."
            )
    return layer


def _is_module(value: Any) -> bool:
    return hasattr(value, "state_dict")  # without importing torch for arrays


def _from_torch(module: Any) -> Conv:
    import torch

    direct = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    transposed = (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)
    if not isinstance(module, (*direct, *transposed)):
        raise UnsupportedLayerError(
            f"{type(module).__name__} cannot be compiled; what is supported is torch.nn.Conv1d, Conv2d, "
            "Conv3d and their ConvTranspose, or a weight array. Take the convolution out of the model, for "
            "example model.conv1."
        )
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
