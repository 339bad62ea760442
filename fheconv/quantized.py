"""Turns a trained model and calibration images into the network that users hold."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias, overload

import numpy as np

from fheconv.analysis.budget import report
from fheconv.analysis.budget_report import BudgetReport
from fheconv.analysis.forecast import Forecast, forecast
from fheconv.analysis.tiled_forecast import TiledForecast, forecast_tiled
from fheconv.analysis.trials import tried
from fheconv.arithmetic.geometry import PerAxis
from fheconv.basics.arrays import Array, ArrayLike
from fheconv.basics.compile_config import CompileConfig
from fheconv.basics.config import QuantConfig
from fheconv.basics.errors import AccumulatorOverflowError, CalibrationError, InvalidArgumentError
from fheconv.basics.keywords import answers_keywords
from fheconv.basics.samples import (
    MOST_CALIBRATED,
    Data,
    channel_remedy,
    images_of,
    share_right,
    with_classes,
)
from fheconv.capture.model import capture, image_axes, single_convolution
from fheconv.networks.floats import Conv, Layer
from fheconv.networks.integers import IntegerNetwork
from fheconv.networks.quantization import CalibratedInput
from fheconv.quantizer.allocation import allocate
from fheconv.quantizer.sparing import quantize_sparingly

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.nn import Module

    from fheconv.capture.outputs import Outputs
    from fheconv.training.trainable import TrainableNetwork


# What can be quantized: a model, an exported one, a convolution, or the weights of one.
Model: TypeAlias = "Module | ExportedProgram | Conv | ArrayLike"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class QuantizedNetwork(IntegerNetwork):
    """Adds to an integer network what users need: the budget report, the forecast and a torch module.

    `fheconv.quantize` and `fheconv.finetune` return it.

    Example:
        >>> network = quantize(np.ones((3, 3), np.int64), np.arange(64).reshape(1, 8, 8))
        >>> network.accumulator_shape
        (1, 6, 6)
    """

    def budget(self, accumulator_bits: int | None = None) -> BudgetReport:
        """Return a report of the proved widths, compared with a limit if one is given.

        Raises `InvalidArgumentError` for a limit that is not a positive integer.
        """
        return report(self, accumulator_bits)

    @overload
    def forecast(self, config: CompileConfig | None = None, *, tile: None = None) -> Forecast: ...

    @overload
    def forecast(self, config: CompileConfig | None = None, *, tile: PerAxis) -> TiledForecast: ...

    @answers_keywords
    def forecast(
        self, config: CompileConfig | None = None, *, tile: PerAxis | None = None
    ) -> Forecast | TiledForecast:
        """Return what one encrypted image costs when compiled with `config`. Nothing is compiled.

        With `tile`, it is the cost with `fheconv.compile_tiled`. Raises `InvalidArgumentError` then for
        tiles that there cannot be, and for a network that is not a single convolution.
        """
        return forecast(self, config) if tile is None else forecast_tiled(self, tile, config)

    @answers_keywords
    def score(self, x: Data, y: ArrayLike | None = None) -> float:
        """Return the share of images (n, *input_shape) that get their right class of `y` (n,), in clear.

        It is that of the exact integers. `FheCircuit.score` also simulates encryption, and runs it. Without
        `y`, `x` is a loader, a dataset or an iterable of pairs (images, classes). Raises
        `InvalidArgumentError` if there is not a class for each image, or not a score for each class, and
        `InputRangeError` for values outside the input range.
        """
        images, classes = with_classes(x, y, len(self.input_shape))
        return share_right(self(images), classes)

    def to_torch(self) -> "TrainableNetwork[QuantizedNetwork]":
        """Return a torch module that computes the same except for rounding. Its weights can be trained."""
        from fheconv.training.trainable import TrainableNetwork  # imports torch, which takes seconds

        return TrainableNetwork(self)


# What `quantize` takes for a network with lookups if no options are given: what somebody with experience
# would begin with. Lookups of 5 bits are the widest that are cheap.
WITH_LOOKUPS = QuantConfig(overflow="defined", rounding_bits=5)


@answers_keywords
def quantize(
    module: Model,
    calibration: Data,
    config: QuantConfig | None = None,
    *,
    outputs: "Outputs" = None,
) -> QuantizedNetwork:
    """Turn a trained model into exact integer arithmetic.

    `module` is a `torch.nn.Module`, the result of `torch.export.export`, a weight array (K, C/groups, *k) or
    (Hf, Wf), or a `fheconv.Conv`. `calibration` is a batch of images (N, C, *S), or one image (C, *S) for a
    single convolution. It may also be a pair of images and classes, a `DataLoader`, a `Dataset`, or an
    iterable of batches, with classes or without. Classes are ignored, and of a loader, dataset or iterable
    1,000 images are kept (`fheconv.basics.samples`).

    Of a model that returns several outputs, `outputs` picks one, by its index or its name. Only what it needs
    is computed. A last softmax or argmax is computed in clear, by whoever decrypts.

    Calibration fixes the image size and the scales. Integer images that fit `input_bits` stay as they are,
    with scale 1 and the whole range of the data type. Other images are scaled so that the integers cover
    their range and 0: small differences are lost. So integers that do not fit, such as 0..255 with 4 bits,
    lose their lowest bits without a warning; `input_bits=8` keeps them.

    Later images must be on the same scale. A batch that fills less than a tenth of the range causes an
    `InputScaleWarning`, and a value outside the range an `InputRangeError`.

    Without `config`, a network with lookups has windows where its values are, which are rounded to 5 bits
    (`QuantConfig(overflow="defined", rounding_bits=5)`), and a network without lookups is exact
    (`QuantConfig()`).

    A model that was trained for integers (QAT) is taken over as it is: with `torch.fake_quantize_...`,
    torch.ao.quantization (prepared or converted), PT2E of torch or torchao (converted), Brevitas (with or
    without QuantTensor), or rounding written by hand. Its scales, zero-points and widths are kept, whatever
    `config` says of widths, and calibration chooses nothing. A quantizer at the start becomes the client's:
    it takes no lookups, and clips images as the model does. The results are the model's to float rounding:
    without `config`, lookups are exact (`QuantConfig()`), which takes few bits in training, 4 or less; a
    lookup holds 16. `rounding_bits` makes them cheaper and approximate. Where branches of different scales
    are added, integers are exact for all pairs of values, if `accumulator_bits` allows it. A `method` other
    than "auto" rounds the weights anew; widths are then those of `config`. What cannot be kept, such as a
    layer that training has left in floats, is quantized by calibration, with a `RequantizationWarning`.

    Every activation becomes one lookup. Everything linear merges into the layer before or after it. Layers
    are quantized in order; each is calibrated on the results of the quantized layers before it. If images are
    few or alike, weights are rounded for inputs of any kind; the budget report then says so. Numbers that
    are "auto" in `config` are chosen first, on held-out images.

    Example:
        >>> sobel, image = [[1, 0, -1], [2, 0, -2], [1, 0, -1]], np.arange(64).reshape(1, 8, 8)
        >>> network = quantize(sobel, image, QuantConfig(input_bits=6))
        >>> network(image)[0, 0].tolist()
        [-8.0, -8.0, -8.0, -8.0, -8.0, -8.0]

    Raises `UnsupportedLayerError` for a model that cannot be compiled, `CalibrationError` if no scale can be
    chosen, `AccumulatorOverflowError` if a layer cannot fit `accumulator_bits`; its remedy was tried. Raises
    `InvalidArgumentError` for images that do not fit the model, or `outputs` that it does not have.
    """
    return quantized(module, calibration, config, outputs, advise=True)


def quantized(
    module: Model, calibration: Data, config: QuantConfig | None, outputs: "Outputs" = None, *, advise: bool
) -> QuantizedNetwork:
    """Quantize like `quantize`. Without `advise`, the remedies of errors are not tried, which takes long."""
    if config is not None and not isinstance(config, QuantConfig):
        raise InvalidArgumentError(f"config is {config!r}; it must be a QuantConfig.")
    conv = single_convolution(module)
    images = _calibration_images(calibration, conv, image_axes(module if conv is None else conv))
    network = capture(module if conv is None else conv, images.shape[1:], outputs)
    if config is None:
        exact = len(network.layers) == 1 or network.trained
        config = QuantConfig() if exact else WITH_LOOKUPS
    config.check_layers([layer.name for layer in network.layers if isinstance(layer, Layer)])
    calibrated = CalibratedInput(
        minimum=float(images.min()),
        maximum=float(images.max()),
        integral=images.dtype.kind in "iub",
        images=len(images),
    )

    def with_numbers(config: QuantConfig) -> QuantizedNetwork:
        chosen = allocate(network, images, calibrated, config).config if config.is_auto else config
        return QuantizedNetwork.of(quantize_sparingly(network, images, calibrated, chosen))

    try:
        return with_numbers(config)
    except AccumulatorOverflowError as error:
        if not advise:
            raise
        first = []
        if network.trained and not config.is_auto:
            # The integers of training are too wide. Kept in few bits they err much more than rounded anew.
            bits = WITH_LOOKUPS.rounding_bits
            anew = replace(
                config, overflow="defined", rounding_bits=bits, method="gptq", accumulator_bits=None
            )
            first.append(anew)
        raise tried(error, config, with_numbers, first=first) from error


def _calibration_images(calibration: Data, conv: Conv | None, image_axes: int | None) -> Array:
    images = images_of(calibration, "calibration", image_axes, MOST_CALIBRATED)
    if conv is not None:
        axes = len(conv.geometry.kernel)
        given = images.shape
        if images.ndim == axes + 1:
            images = images[None]
        if images.ndim != axes + 2 or images.shape[1] != conv.in_channels:
            raise InvalidArgumentError(
                f"calibration has shape {given}; layer {conv.name!r} takes images (n, "
                f"{conv.in_channels}, {', '.join('MND'[:axes])}), or one of them without n."
                + channel_remedy(given, conv.in_channels, axes + 1)
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
