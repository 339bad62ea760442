"""Turns a trained model and calibration images into the network that users hold."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fheconv.analysis.budget import report
from fheconv.analysis.budget_report import BudgetReport
from fheconv.basics.arrays import Array, as_array
from fheconv.basics.config import QuantConfig
from fheconv.basics.errors import CalibrationError, InvalidArgumentError
from fheconv.capture.model import capture, single_convolution
from fheconv.networks.floats import Conv, Layer
from fheconv.networks.integers import IntegerNetwork
from fheconv.networks.quantization import CalibratedInput
from fheconv.quantizer.allocation import allocate
from fheconv.quantizer.layerwise import quantize_network

if TYPE_CHECKING:
    from fheconv.training.trainable import TrainableNetwork


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedNetwork(IntegerNetwork):
    """An integer network with what users ask of it. Made by `fheconv.quantize` and `fheconv.finetune`."""

    def budget(self, accumulator_bits: int | None = None) -> BudgetReport:
        """Return the proved accumulator widths, held against a limit if one is given.

        Raises `InvalidArgumentError` for a limit that is no width.
        """
        return report(self, accumulator_bits)

    def to_torch(self) -> "TrainableNetwork":
        """Return a torch module that computes the same but for rounding, whose weights can be trained."""
        from fheconv.training.trainable import TrainableNetwork  # imports torch, which takes seconds

        return TrainableNetwork(self)


def quantize(module: Any, calibration: Any, config: QuantConfig | None = None) -> QuantizedNetwork:
    """Turn a trained model into exact integer arithmetic.

    `module` is a `torch.nn.Module`, what `torch.export.export` returned, a weight array (K, C/groups, *k) or
    (Hf, Wf), or a `fheconv.Conv`; `calibration` a batch of images (N, C, *S), or one (C, *S) for a single
    convolution, which fix the image size and the scales. Integer images that fit `input_bits` are taken as
    they are, with scale 1 and the whole range of the data type. Other images are scaled so that their range,
    and 0, is covered, and rounded. So integers that do not fit `input_bits`, such as 0..255 with 4 bits, lose
    their lowest bits without a warning, as floats do; `input_bits=8` keeps them.

    Later images must be on the same scale. A batch that fills less than a tenth of the range causes an
    `InputScaleWarning`, and a value outside the range an `InputRangeError`.

    Every activation becomes one lookup, whose tables are made of integers here; everything linear merges into
    the layer before or after it. Layers are quantized in order, each on what the quantized ones before it
    deliver. What is "auto" in `config` is chosen before, on images that are held out.

    Raises `UnsupportedLayerError` for what cannot be compiled, `CalibrationError` where no scale can be
    chosen, `AccumulatorOverflowError` where `accumulator_bits` cannot be kept, `InvalidArgumentError` for
    images that do not go with the model.
    """
    config = QuantConfig() if config is None else config
    if not isinstance(config, QuantConfig):
        raise InvalidArgumentError(f"config is {config!r}; it must be a QuantConfig.")
    conv = single_convolution(module)
    images = _calibration_images(calibration, conv)
    network = capture(module if conv is None else conv, images.shape[1:])
    config.check_layers([layer.name for layer in network.layers if isinstance(layer, Layer)])
    calibrated = CalibratedInput(
        minimum=float(images.min()),
        maximum=float(images.max()),
        integral=images.dtype.kind in "iub",
        images=len(images),
    )
    if config.is_auto:
        config = allocate(network, images, calibrated, config).config
    return QuantizedNetwork.of(quantize_network(network, images, calibrated, config))


def _calibration_images(calibration: Any, conv: Conv | None) -> Array:
    images = as_array(calibration, "calibration")
    if conv is not None:
        axes = len(conv.geometry.kernel)
        if images.ndim == axes + 1:
            images = images[None]
        if images.ndim != axes + 2 or images.shape[1] != conv.in_channels:
            raise InvalidArgumentError(
                f"calibration has shape {images.shape}; layer {conv.name!r} takes images (n, "
                f"{conv.in_channels}, {', '.join('MND'[:axes])}), or one of them without n."
            )
    elif images.ndim < 2:
        raise InvalidArgumentError(
            f"calibration has shape {images.shape}; a model takes a batch, (n, C, M, N) for images."
        )
    if images.size == 0:
        raise CalibrationError("calibration is empty; give at least one image.")
    if not np.isfinite(images).all():
        raise CalibrationError("calibration contains NaN or infinity; remove those images.")
    if conv is not None:
        conv.geometry.output_size(images.shape[2:])
    return images
