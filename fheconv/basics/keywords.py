"""Shows calls by their keywords."""

from collections.abc import Collection
from dataclasses import fields
from typing import Any


def shown_call(config: Any, always: Collection[str] = ()) -> str:
    """Return the call that makes a dataclass: the fields named in `always`, and others without defaults."""
    shown = (
        f"{field.name}={getattr(config, field.name)!r}"
        for field in fields(config)
        if field.name in always or getattr(config, field.name) != field.default
    )
    return f"{type(config).__name__}({', '.join(shown)})"
