"""Warns of what is allowed and probably a mistake."""

import sys
import warnings


class InputScaleWarning(UserWarning):
    """All images of a batch fill a sliver of the input range. They are probably on another scale.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("ignore", InputScaleWarning)  # if they are only dark
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
