"""Warns of what is allowed and probably a mistake."""

import sys
import warnings


class FheConvWarning(UserWarning):
    """The root: filter it to filter every warning of fheconv."""


class CostWarning(FheConvWarning):
    """A circuit takes over a minute an image, or has over 2 GB of keys."""


class InputRangeWarning(FheConvWarning):
    """Images lie a little outside the range of the network, and are clipped to it (`QuantConfig.slack`).

    Example:
        >>> import fheconv, numpy as np, warnings
        >>> network = fheconv.quantize([[1, 2]], np.linspace(0, 1, 16).reshape(1, 4, 4))
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     result = network(np.full((1, 4, 4), 1.04))
        >>> caught[0].category.__name__, bool((result == network(np.ones((1, 4, 4)))).all())
        ('InputRangeWarning', True)
    """


class InputScaleWarning(FheConvWarning):
    """All images of a batch fill a sliver of the input range. They are probably on another scale.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("ignore", InputScaleWarning)  # if they are only dark
    """


class RequantizationWarning(FheConvWarning):
    """A model was trained for integers, and some of its layers are quantized anew, by calibration.

    Their weights, or what their activations round to, are not whole numbers times one scale.
    """


def warn(message: str, category: type[Warning]) -> None:
    """Warn with `warnings.warn`, and name the line outside this package that led here.

    Python shows a warning once for each such line, unless it is told otherwise.
    """
    package = __name__.partition(".")[0]
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
