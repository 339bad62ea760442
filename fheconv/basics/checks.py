"""Checks the numbers and words that users pass."""

from typing import Any, Literal, TypeAlias

import numpy as np

from fheconv.basics.errors import InvalidArgumentError

# The value is chosen from calibration images.
Auto: TypeAlias = Literal["auto"]


def _number(name: str, value: Any, least: int, greatest: int, *, auto: bool) -> int | Auto:
    """Return `value` as an int, or "auto" if `auto` allows it.

    Raises `InvalidArgumentError` for other values.
    """
    if auto and isinstance(value, str) and value == "auto":
        return "auto"
    check_integer(name, value, least, greatest)
    return int(value)  # numpy's integers lack int's methods


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def check_number(name: str, value: Any, least: float, greatest: float = np.inf) -> None:
    """Raise `InvalidArgumentError` unless `value` is a number strictly between `least` and `greatest`."""
    if not _is_number(value) or not least < value < greatest:
        limits = f"above {least:g}" if greatest == np.inf else f"above {least:g} and below {greatest:g}"
        raise InvalidArgumentError(f"{name}={value!r} must be a number {limits}.")


def check_integer(name: str, value: Any, least: int, greatest: int | None = None) -> None:
    """Raise `InvalidArgumentError` unless `value` is an integer from `least` to `greatest`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (greatest is not None and value > greatest):
        limits = f"of at least {least}" if greatest is None else f"from {least} to {greatest}"
        raise InvalidArgumentError(f"{name}={value!r} must be an integer {limits}.")


def check_token(token: str) -> None:
    """Raise `InvalidArgumentError` unless `token` can stand in a header.

    The message does not quote the token.
    """
    if not token.isascii() or not token.isprintable() or len(token.split()) != 1 or token != token.strip():
        raise InvalidArgumentError("The token must be one word of printable ASCII characters.")
